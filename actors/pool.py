"""Actors of one role that share work: each call is cut over those that live, and what a lost one was given is done again.

    pool.prepare("load", spec)                          # every actor, and again every one that is started anew
    parts = pool.map("score", groups, prompts)          # one share an actor, answers in order

| event | what follows |
|---|---|
| an actor dies | its share goes to whoever is free first; it returns, is prepared again, and takes shares |
| an actor takes longer than `deadline_s` | it is killed, then as above |
| an actor was started anew unnoticed | its call is refused there (`OtherLifeError`), then as above |
| an actor is lost more than `max_losses` times in a call, or for good | no more for it; the last one's end is an error |
| the role raises | its exception is raised, the others' calls are left behind |

What an answer is must not depend on how the work was cut. Calls from several threads take turns.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from actors.failures import ActorsLostError
from actors.host import DEFAULT_DEADLINE_S, ActorLostError, OtherLifeError, Pending
from actors.streams import REVIVAL_DEADLINE_S, StreamingHandle, Wait, ready

log = logging.getLogger(__name__)


@dataclass
class _Worker:
    """`life` None: to be asked for. `prepared`: the number of the preparation that this life has had."""

    handle: StreamingHandle
    life: str | None = None
    prepared: int = 0
    doing: Literal["nothing", "returning", "preparing", "working"] = "nothing"
    call: Pending | None = None
    share: int = -1
    until_s: float = 0.0
    losses: list[str] = field(default_factory=list)
    gone: bool = False


class Pool:
    """`name` says who they are, for messages. `wait` and `clock` are for tests."""

    def __init__(
        self,
        name: str,
        handles: Sequence[StreamingHandle],
        *,
        deadline_s: float = DEFAULT_DEADLINE_S,
        max_losses: int = 3,
        wait: Wait = ready,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._deadline_s, self._max_losses = name, deadline_s, max_losses
        self._wait, self._clock = wait, clock
        self._workers = [_Worker(handle) for handle in handles]
        self._joining: dict[str, tuple[StreamingHandle, Pending]] = {}
        self._leaving: set[str] = set()
        self._preparation: tuple[str, tuple[Any, ...]] | None = None
        self._number = 0
        self._turn = threading.Lock()

    @property
    def handles(self) -> list[StreamingHandle]:
        """The actors, those on their way back included."""
        return [worker.handle for worker in self._workers]

    def add(self, handle: StreamingHandle) -> None:
        """One more, once it has `joined`."""
        self._joining[handle.name] = handle, handle.revive()

    def joined(self, name: str) -> bool:
        """Whether a new one has started; it is then used, and prepared first. Raises ActorLostError when it never will."""
        if name in self._joining:
            handle, returned = self._joining[name]
            if not ready([returned], 0.0):
                return False
            self._workers = [*self._workers, _Worker(handle, returned.result(self._deadline_s))]
            del self._joining[name]
        return True

    def given_up(self, name: str) -> bool:  # noqa: ARG002 (the next call asks everybody again)
        """Nobody is."""
        return False

    def retire(self, name: str) -> None:
        """This one gets nothing from the next call on."""
        self._leaving.add(name)

    def idle(self, name: str) -> bool:  # noqa: ARG002 (they work together, or not at all)
        """Whether nobody works."""
        return not self._turn.locked()

    def remove(self, name: str) -> StreamingHandle:
        """Forget about this one, which has retired and is idle, or never joined."""
        if name in self._joining:
            return self._joining.pop(name)[0]
        worker = next(w for w in self._workers if w.handle.name == name)
        self._workers = [other for other in self._workers if other is not worker]
        self._leaving.discard(name)
        return worker.handle

    def prepare(self, method: str, *args: Any) -> None:
        """Call this on every actor that lives, and from now on on every one before it takes work."""
        with self._turn:
            self._preparation, self._number = (method, args), self._number + 1
            _Call(self, "", []).run()

    def map(self, method: str, *sequences: Sequence[Any]) -> list[Any]:
        """`method` on contiguous shares of equally long sequences; its answers, in order, one a share.

        Raises ActorsLostError naming every actor's causes, and whatever the role raises.
        """
        with self._turn:
            return _Call(self, method, self._cut(sequences)).run()

    def _cut(self, sequences: Sequence[Sequence[Any]]) -> list[tuple[Sequence[Any], ...]]:
        size = -(-len(sequences[0]) // len(self._taking()))
        starts = range(0, len(sequences[0]), max(1, size))
        return [tuple(items[first : first + size] for items in sequences) for first in starts]

    def _taking(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.handle.name not in self._leaving]


class _Call:
    """One `map` (or, without shares, one `prepare`)."""

    def __init__(self, pool: Pool, method: str, shares: list[tuple[Sequence[Any], ...]]) -> None:
        self._pool, self._method, self._shares = pool, method, shares
        self._queue = deque(range(len(shares)))
        self._workers = pool._taking()
        self._answers: dict[int, Any] = {}

    def run(self) -> list[Any]:
        for worker in self._workers:
            worker.losses, worker.gone = [], False
        try:
            while not self._over():
                self._require_worker()
                for worker in self._workers:
                    self._go_on(worker)
                self._look()
        finally:
            for worker in self._workers:
                self._abandon(worker)
        return [self._answers[i] for i in range(len(self._shares))]

    def _over(self) -> bool:
        if self._shares:
            return len(self._answers) == len(self._shares)
        ready_or_away = all(w.gone or w.doing == "returning" or self._is_prepared(w) for w in self._workers)
        return ready_or_away and any(self._is_prepared(w) for w in self._workers)

    def _is_prepared(self, worker: _Worker) -> bool:
        return worker.life is not None and worker.prepared == self._pool._number

    def _go_on(self, worker: _Worker) -> None:
        """Start what an idle worker is to do next."""
        if worker.gone or worker.call is not None:
            return
        if worker.life is None:
            self._start(worker, "returning", worker.handle.revive(), REVIVAL_DEADLINE_S)
        elif not self._is_prepared(worker):
            assert self._pool._preparation is not None
            method, args = self._pool._preparation
            self._start(worker, "preparing", worker.handle.submit_in(worker.life, method, *args), self._pool._deadline_s)
        elif self._queue:
            worker.share = self._queue.popleft()
            call = worker.handle.submit_in(worker.life, self._method, *self._shares[worker.share])
            self._start(worker, "working", call, self._pool._deadline_s)

    def _start(
        self, worker: _Worker, doing: Literal["returning", "preparing", "working"], call: Pending, limit_s: float
    ) -> None:
        worker.doing, worker.call, worker.until_s = doing, call, self._pool._clock() + limit_s

    def _look(self) -> None:
        """Wait until a call can be read, or the first deadline."""
        busy = [(worker, worker.call) for worker in self._workers if worker.call is not None]
        if not busy:
            return
        limit_s = max(0.0, min(worker.until_s for worker, _ in busy) - self._pool._clock())
        found = self._pool._wait([call for _, call in busy], limit_s)
        for worker, call in busy:
            if call in found:
                self._take(worker, call)
            elif self._pool._clock() >= worker.until_s:
                self._late(worker, call)

    def _take(self, worker: _Worker, call: Pending) -> None:
        doing, share = worker.doing, worker.share
        try:
            value = call.result(self._pool._deadline_s)
        except (ActorLostError, OtherLifeError) as error:
            self._lost(worker, str(error), for_good=doing == "returning")
            return
        worker.doing, worker.call, worker.share = "nothing", None, -1
        if doing == "returning":
            worker.life, worker.prepared = value, 0
        elif doing == "preparing":
            worker.prepared = self._pool._number
        else:
            self._answers[share] = value

    def _late(self, worker: _Worker, call: Pending) -> None:
        limit_s = REVIVAL_DEADLINE_S if worker.doing == "returning" else self._pool._deadline_s
        cause, returning = f"waited {limit_s:g} s for {call.what}", worker.doing == "returning"
        if not returning:
            worker.handle.end()
        self._lost(worker, cause, for_good=returning)

    def _lost(self, worker: _Worker, cause: str, *, for_good: bool) -> None:
        log.warning(
            "%s was lost (%s)%s", worker.handle.name, cause, "; its share goes to others" if worker.share >= 0 else ""
        )
        worker.losses.append(cause)
        worker.gone = for_good or len(worker.losses) > self._pool._max_losses
        if worker.share >= 0:
            self._queue.appendleft(worker.share)
        worker.doing, worker.call, worker.share, worker.life = "nothing", None, -1, None

    def _abandon(self, worker: _Worker) -> None:
        """Nobody reads what is under way any more. A preparation is made again by the next call."""
        worker.doing, worker.call, worker.share = "nothing", None, -1

    def _require_worker(self) -> None:
        if all(worker.gone for worker in self._workers):
            causes = "; ".join(f"{w.handle.name}: {', then '.join(w.losses)}" for w in self._workers)
            raise ActorsLostError(f"no {self._pool._name} actor is left for {self._method or 'its preparation'} ({causes})")
