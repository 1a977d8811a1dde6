"""One generator answering several streams at a time: their requests share its batch, and whoever waits for one steps it.

A generator is for one thread at a time. Threads take turns in the order of asking, so that a stream that steps without end
does not keep another one, or new weights, from their turn. Inline there is one thread, and reading a stream is what drives
the generator.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from actors.engine_use import EngineUse
from afm_rl.generate import Generator
from afm_rl.types import Answered, GenerationRequest, Group, Refused


class Turns:
    """A lock that is granted in the order of asking."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        mine.acquire()

    def __exit__(self, *exc_info: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False


@dataclasses.dataclass
class _Reader:
    """A stream: what is ready for it, the keys of its requests that are not, and what another stream's step failed with."""

    ready: deque[Answered] = dataclasses.field(default_factory=deque)
    unfinished: dict[str, int] = dataclasses.field(default_factory=dict)
    failure: BaseException | None = None


class SharedEngine:
    """A generator with several readers. `after_step` is called with whether anything is left to do."""

    def __init__(self, generator: Generator, *, after_step: Callable[[bool], None]) -> None:
        self._generator, self._after_step = generator, after_step
        self._version = -1
        self._turns = Turns()
        self._readers: dict[str, tuple[_Reader, GenerationRequest]] = {}
        self._keys = 0
        self._busy_s, self._queued_steps = 0.0, 0
        self._use = self._look()

    def load(self, params: Mapping[str, Any], *, policy: str, version: int) -> None:
        """New weights, between two steps; what becomes of running requests is the engine's `on_update`.

        Raises ValueError for weights that are not finite: the old ones go on serving.
        """
        with self._turns:
            self._generator.load(params, policy=policy, version=version)
            self._version = version
            self._use = self._look()

    def use(self) -> EngineUse:
        """What the generator did until its last step, and its state then: for any thread, without a turn."""
        return self._use

    def _look(self) -> EngineUse:
        stats = self._generator.stats
        counted = {name: getattr(stats, name) for name in EngineUse.of_generator()}
        return EngineUse(**counted, version=self._version, busy_s=self._busy_s, queued_steps=self._queued_steps)

    def rest(self) -> None:
        """Give the cache's memory back until the next request, unless something is under way."""
        with self._turns:
            if not self._generator.unfinished:
                self._generator.rest()
                self._use = self._look()

    def stream(self, requests: Sequence[GenerationRequest]) -> Iterator[Answered]:
        """Every request's answer as it is finished, those refused first. What nobody reads on is cancelled.

        What a step raises is raised in every stream that had requests in it: the generator has given them up.
        """
        reader = _Reader()
        try:
            with self._turns:
                for index, request in enumerate(requests):
                    self._submit(reader, index, request)
            while reader.ready or reader.unfinished:
                if not reader.ready:
                    with self._turns:
                        if reader.failure is not None:
                            raise RuntimeError("the step that another stream took has failed") from reader.failure
                        if not reader.ready:  # another reader may have stepped meanwhile
                            self._step()
                while reader.ready:
                    yield reader.ready.popleft()
        finally:
            if reader.unfinished:
                with self._turns:
                    self._cancel(reader)

    def _submit(self, reader: _Reader, index: int, request: GenerationRequest) -> None:
        # The engine tells requests apart by their ids; those of two streams may be alike.
        key = request.id
        while key in self._readers:
            self._keys += 1
            key = f"{request.id}#{self._keys}"
        try:
            self._generator.submit(dataclasses.replace(request, id=key))
        except ValueError as error:
            reader.ready.append(Answered(index, Refused(request.id, str(error))))
            return
        self._readers[key] = reader, request
        reader.unfinished[key] = index

    def _step(self) -> None:
        began_s = time.perf_counter()
        try:
            groups = self._generator.step()
        except BaseException as error:
            for reader, _ in self._readers.values():
                reader.failure = error
            raise
        self._busy_s += time.perf_counter() - began_s
        self._queued_steps += self._generator.stats.waiting
        self._use = self._look()
        for group in groups:
            self._hand_over(group)
        self._after_step(self._generator.unfinished > 0)

    def _hand_over(self, group: Group) -> None:
        reader, request = self._readers.pop(group.id)
        index = reader.unfinished.pop(group.id)
        reader.ready.append(Answered(index, dataclasses.replace(group, id=request.id)))

    def _cancel(self, reader: _Reader) -> None:
        for key in reader.unfinished:
            self._generator.cancel(key)
            del self._readers[key]
        reader.unfinished.clear()
        self._use = self._look()
