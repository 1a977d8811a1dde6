"""Requests over samplers: groups come back as they are finished, each request's exactly once, whatever becomes of a sampler.

    requests -> queue -> up to `window` responses at each sampler -> groups, as they finish
                  ^---- what a lost or silent sampler had not answered, with its seeds ----'

| event | what follows |
|---|---|
| a sampler has answered a quarter of its window | it gets more: a faster one takes more of the queue |
| a sampler dies | its unanswered requests go to the head of the queue; it gets more once its next life answers |
| a sampler finishes nothing for `deadline_s` | its process is killed, then as above |
| a sampler is lost for the (max_losses + 1)th time, or does not return | it gets no more; the last one's end is an error |
| a request can never run | it is its own error, raised when all others are answered |

Which sampler answers a request is not reproducible, and need not be: with the engine's deterministic mode a token depends on
its own sequence and seed alone; without it, tokens of equal seeds may differ in rare roundings, as they do between batches.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Protocol

from actors.failures import ActorsLostError, DataError
from actors.host import ActorLostError, Pending
from actors.sampler import UnacknowledgedError
from actors.streams import END, MAX_STREAMS, REVIVAL_DEADLINE_S, Stream, StreamingHandle, Wait, ready
from afm_rl.types import Answered, GenerationRequest, Group, Refused

log = logging.getLogger(__name__)

#: A sampler gets more once so much of its window is free: fewer, larger batches of requests.
REFILL = 0.25


class RequestsRefusedError(DataError):
    """Some requests can never run; all others have been answered."""

    def __init__(self, refused: Sequence[Refused], *, answered: int) -> None:
        shown = "; ".join(one.reason for one in refused[:3]) + ("; ..." if len(refused) > 3 else "")
        super().__init__(f"{len(refused)} of {len(refused) + answered} requests cannot run: {shown}")
        self.refused = tuple(refused)


@dataclass(frozen=True, kw_only=True)
class DispatchOptions:
    """`window`: responses outstanding at a sampler, running and queued; `deadline_s`: without a finished group, until a
    sampler is taken for frozen; `max_losses`: of one sampler, within one call."""

    window: int = 320
    deadline_s: float = 600.0
    max_losses: int = 3


@dataclass
class _Open:
    """A batch that a sampler works on; `waiting` maps indices in it to those of the requests."""

    stream: Stream
    waiting: dict[int, int]


@dataclass
class _Worker:
    """`away`: the call that must end before it is asked; `listed`: it still belongs to those who are asked."""

    handle: StreamingHandle
    open: list[_Open] = field(default_factory=list)
    outstanding: int = 0  # responses
    silent_s: float = 0.0  # for so long it was waited for since its last group, or since it was lost
    losses: list[str] = field(default_factory=list)
    away: Pending | None = None
    listed: bool = True
    gone: bool = False

    @property
    def works(self) -> bool:
        return self.listed and not self.gone and self.away is None


class Members(Protocol):
    """Who may be asked, which may change at any time (`actors/roster.py`)."""

    @property
    def look_s(self) -> float:
        """Seconds after which it is looked again who is there."""

    def handles(self) -> Sequence[StreamingHandle]:
        """Those who are asked, or will be once they are back."""

    def away(self, handle: StreamingHandle) -> Pending | None:
        """The call that must end before this one may be asked, or None."""

    def lost(self, handle: StreamingHandle, cause: str) -> None:
        """Its process is gone: from now on it is away."""

    def returned(self, handle: StreamingHandle, pending: Pending) -> None:
        """Read the call that was waited for; ActorLostError when this one never comes back."""

    def answered(self, handle: StreamingHandle) -> None:
        """It has finished a request."""

    def streaming(self, handle: StreamingHandle, change: int) -> None:
        """It has so many more, or fewer, streams under way."""

    def causes(self) -> str:
        """Why those who are no longer listed were given up."""


class Dispatch:
    """One call's bookkeeping. `wait` and `clock` are for tests."""

    def __init__(
        self,
        members: Members,
        requests: Sequence[GenerationRequest],
        *,
        policy: str,
        options: DispatchOptions | None = None,
        wait: Wait = ready,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._requests, self._policy, self._options = requests, policy, options or DispatchOptions()
        self._members = members
        self._workers: list[_Worker] = []
        self._queue = deque(range(len(requests)))
        self._wait, self._clock = wait, clock

    def groups(self) -> Generator[tuple[int, Group], None, None]:
        """(index of its request, group) as they are finished.

        Raises RequestsRefusedError after all others where some can never run, ActorsLostError when no sampler is left, and
        whatever a sampler raises.
        """
        refused = []
        with closing(self.answers()) as answers:
            for one in answers:
                if isinstance(one.result, Refused):
                    refused.append(one.result)
                else:
                    yield one.index, one.result
        if refused:
            raise RequestsRefusedError(refused, answered=len(self._requests) - len(refused))

    def answers(self) -> Generator[Answered, None, None]:
        """Every request's answer, once, as it is finished; `index` is the request's."""
        left = len(self._requests)
        try:
            while left:
                self._call_the_roll()
                self._issue()
                self._require_worker(left)
                for call in self._look():
                    answer = self._take(call)
                    if answer is not None:
                        left -= 1
                        yield answer
        finally:
            for worker in self._workers:
                self._close(worker)

    def _call_the_roll(self) -> None:
        listed = self._members.handles()
        known = {id(worker.handle) for worker in self._workers}
        self._workers += [_Worker(handle) for handle in listed if id(handle) not in known]
        now = {id(handle) for handle in listed}
        for worker in self._workers:
            worker.listed = id(worker.handle) in now
            worker.away = self._members.away(worker.handle) if worker.listed and not worker.gone else None

    def _issue(self) -> None:
        """Deal the head of the queue to whoever has the least to do, as far as the windows go."""
        room, window = REFILL * self._options.window, self._options.window
        takers = [w for w in self._workers if w.works and len(w.open) < MAX_STREAMS and w.outstanding <= window - room]
        dealt: dict[int, list[int]] = {id(worker): [] for worker in takers}
        refilled = list(takers)
        while self._queue and takers:
            responses = self._requests[self._queue[0]].num_responses
            worker = min(takers, key=lambda w: w.outstanding)
            if worker.outstanding and worker.outstanding + responses > window:
                takers.remove(worker)
                continue
            dealt[id(worker)].append(self._queue.popleft())
            worker.outstanding += responses
        for worker in refilled:
            if indices := dealt[id(worker)]:
                stream = worker.handle.stream("answer", self._policy, [self._requests[i] for i in indices])
                worker.open.append(_Open(stream, dict(enumerate(indices))))
                self._members.streaming(worker.handle, 1)

    def _look(self) -> list[Pending | Stream]:
        """What can be read; a sampler's silence counts only while it is waited for."""
        calls: list[Pending | Stream] = []
        limit_s = self._members.look_s
        for worker in self._workers:
            calls += [worker.away] if worker.away is not None else []
            calls += [one.stream for one in worker.open]
            if worker.away is not None or worker.open:
                limit_s = min(limit_s, self._patience_s(worker) - worker.silent_s)
        began_s = self._clock()
        found = self._wait(calls, max(0.0, limit_s))
        waited_s = self._clock() - began_s
        for worker in self._workers:
            heard = worker.away in found or any(one.stream in found for one in worker.open)
            worker.silent_s = 0.0 if heard else worker.silent_s + waited_s
            if not heard and (worker.open or worker.away) and worker.silent_s >= self._patience_s(worker):
                self._silent(worker)
        return found

    def _take(self, call: Pending | Stream) -> Answered | None:
        """Read a call that is ready; what it answers, if it is an answer."""
        for worker in self._workers:
            if worker.away is call:
                self._returned(worker, worker.away)
                return None
            for one in worker.open:
                if one.stream is call:
                    return self._read(worker, one)
        return None  # of a worker that was lost since

    def _read(self, worker: _Worker, one: _Open) -> Answered | None:
        try:
            item = one.stream.next(self._options.deadline_s)
        except (ActorLostError, UnacknowledgedError) as error:
            self._lost(worker, str(getattr(error, "cause", error)))  # Ray wraps what an actor raised
            return None
        except TimeoutError:
            self._silent(worker)
            return None
        if item is END:
            worker.open.remove(one)
            self._members.streaming(worker.handle, -1)
            if one.waiting:
                ids = ", ".join(self._requests[i].id for i in one.waiting.values())
                raise RuntimeError(f"{one.stream.what} ended without answers to {ids}")
            return None
        index = one.waiting.pop(item.index)
        worker.outstanding -= self._requests[index].num_responses
        self._members.answered(worker.handle)
        return Answered(index, item.result)

    def _silent(self, worker: _Worker) -> None:
        if not worker.open:
            worker.losses.append(f"did not return within {REVIVAL_DEADLINE_S:.0f} s")
            worker.away, worker.gone = None, True
            return
        worker.handle.end()
        self._lost(worker, f"finished no group for {self._options.deadline_s:g} s")

    def _lost(self, worker: _Worker, cause: str) -> None:
        """Take back what the sampler had not answered, and wait for its next life if it may have one."""
        worker.losses.append(cause)
        back = sorted(index for one in worker.open for index in one.waiting.values())
        log.warning("%s was lost (%s); %d requests go to others", worker.handle.name, cause, len(back))
        self._queue.extendleft(reversed(back))
        self._close(worker)
        self._members.lost(worker.handle, cause)
        worker.gone = len(worker.losses) > self._options.max_losses
        worker.away = None if worker.gone else self._members.away(worker.handle)

    def _returned(self, worker: _Worker, pending: Pending) -> None:
        worker.away = None
        try:
            self._members.returned(worker.handle, pending)
        except ActorLostError as error:
            worker.losses.append(str(error))
            worker.gone = True

    def _close(self, worker: _Worker) -> None:
        for one in worker.open:
            one.stream.close()
            self._members.streaming(worker.handle, -1)
        worker.open, worker.outstanding, worker.silent_s = [], 0, 0.0

    def _patience_s(self, worker: _Worker) -> float:
        return self._options.deadline_s if worker.open else REVIVAL_DEADLINE_S

    def _require_worker(self, left: int) -> None:
        if all(worker.gone or not (worker.listed or worker.open) for worker in self._workers):
            lost = [f"{w.handle.name}: {', then '.join(w.losses)}" for w in self._workers if w.losses]
            causes = "; ".join([*lost, *filter(None, [self._members.causes()])])
            raise ActorsLostError(f"no sampler is left to answer {left} of {len(self._requests)} requests ({causes})")
