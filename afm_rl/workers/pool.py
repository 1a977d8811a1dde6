"""A pool of worker processes that call one function, each call under a time limit that really holds.

A thread cannot be interrupted and an alarm does not stop a long C call (`9**9**9`), so a call that is late costs its
process, which is killed and replaced; its start is paid once, not per call. A process that dies (a crash, os._exit, out of
memory) costs the call it was working on. Nothing is inherited from this process but the environment: no JAX, no threads.
"""

from __future__ import annotations

import math
import os
import select
import signal
import struct
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from afm_rl.errors import UserError
from afm_rl.workers import child

#: Seconds a worker may take to import its function.
START_LIMIT_S = 120.0
_HEAD = struct.Struct("<I")
_CHUNK_BYTES = 1 << 16

Cause = Literal["raised", "timeout", "died", "budget"]


class WorkerStartError(UserError):
    """The function of a worker cannot be loaded."""


@dataclass(frozen=True)
class Task:
    """What a pool's processes run. `options` not empty: `path` names a factory that takes them and returns the function.

    `memory_bytes` is what a call may take beside the function's imports; `search_path` goes in front of this process's own.
    """

    path: str
    options: Mapping[str, Any] = field(default_factory=dict)
    memory_bytes: int = 2**30
    search_path: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of one call: its value, or why there is none (`cause` and one line)."""

    value: Any = None
    cause: Cause | None = None
    problem: str = ""


class WorkerPool:
    """`workers` processes, started by `start`. Not thread safe; `close` (or the end of this process) ends them."""

    def __init__(self, task: Task, *, workers: int = 1) -> None:
        self._task = task
        self._workers = [_Worker(task) for _ in range(workers)]
        self.batch = False
        self._finalizer = weakref.finalize(self, _end_all, self._workers)

    def start(self) -> None:
        """Start every process. Raises WorkerStartError in the words of the first that cannot load the function."""
        for worker in self._workers:
            self.batch = worker.start()["batch"]

    def run(
        self, calls: Sequence[Sequence[Any]], *, limits_s: Sequence[float], budget_s: float = float("inf")
    ) -> list[Outcome]:
        """The outcome of every call, in order: arguments[i] within limits_s[i] seconds, all together within `budget_s`."""
        found: dict[int, Outcome] = {}
        waiting = deque(range(len(calls)))
        end_s = time.monotonic() + budget_s
        while len(found) < len(calls):
            if waiting and time.monotonic() >= end_s:
                late = Outcome(cause="budget", problem="its turn did not come within the time of this call")
                found |= dict.fromkeys(waiting, late)
                waiting.clear()
                continue
            for worker in self._workers:
                if waiting and worker.index is None:
                    index = waiting.popleft()
                    limit_s = min(limits_s[index], max(end_s - time.monotonic(), 0.0))
                    if (failed := worker.ask(index, calls[index], limit_s=limit_s)) is not None:
                        found[index] = failed
            for worker in _ready([w for w in self._workers if w.index is not None]):
                asked = worker.index
                if asked is not None and (outcome := worker.look()) is not None:
                    found[asked] = outcome
        return [found[index] for index in range(len(calls))]

    def close(self) -> None:
        """End the processes."""
        self._finalizer()


class _Worker:
    """One process and the call it works on (`index`)."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._process: subprocess.Popen[bytes] | None = None
        self._read = b""
        self.index: int | None = None
        self._limit_s = self._end_s = 0.0

    @property
    def fileno(self) -> int:
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    @property
    def left_s(self) -> float:
        return max(0.0, self._end_s - time.monotonic())

    def start(self) -> dict[str, Any]:
        """A fresh process with the function loaded; what it says of it. Raises WorkerStartError."""
        self.end()
        program = [sys.executable, "-P", str(Path(child.__file__))]
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            program,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # so that what it starts can be killed with it
            env={**os.environ, **one_thread},
        )
        os.set_blocking(self.fileno, False)
        os.set_blocking(self._stdin, False)
        self._begin(START_LIMIT_S)
        setup = {
            "path": self._task.path,
            "options": dict(self._task.options),
            "search_path": [*self._task.search_path, *sys.path],
            "memory_bytes": self._task.memory_bytes,
        }
        outcome = self._send(setup)
        while outcome is None:
            _ready([self])
            outcome = self.look()
        if outcome.cause is not None:
            self.end()
            raise WorkerStartError(outcome.problem)
        return outcome.value

    def ask(self, index: int, arguments: Sequence[Any], *, limit_s: float) -> Outcome | None:
        """Give it a call; an outcome at once only where no process can be started or reached."""
        if self._process is None:
            try:
                self.start()
            except WorkerStartError as error:
                return Outcome(cause="died", problem=f"its worker cannot start again: {error}")
        self.index = index
        self._begin(limit_s)
        return self._send({"arguments": list(arguments), "limit_s": limit_s})

    def look(self) -> Outcome | None:
        """The outcome of the call, if there is one by now."""
        try:
            while piece := os.read(self.fileno, _CHUNK_BYTES):
                self._read += piece
                if (answer := self._frame()) is not None:
                    self.index = None
                    problem = answer.get("error")
                    return Outcome(answer.get("value")) if problem is None else Outcome(cause="raised", problem=problem)
            return self._died()
        except BlockingIOError:
            return None if self.left_s else self._late()

    def end(self) -> None:
        """Kill the process and everything that it started."""
        process, self._process, self._read, self.index = self._process, None, b"", None
        if process is None:
            return
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()

    @property
    def _stdin(self) -> int:
        assert self._process is not None
        assert self._process.stdin is not None
        return self._process.stdin.fileno()

    def _begin(self, limit_s: float) -> None:
        self._limit_s, self._end_s = limit_s, time.monotonic() + limit_s

    def _send(self, message: object) -> Outcome | None:
        frame = BytesIO()
        child.write_frame(frame, message)
        rest = memoryview(frame.getvalue())
        while rest:
            try:
                rest = rest[os.write(self._stdin, rest) :]
            except BlockingIOError:
                if not _poll({self._stdin: select.POLLOUT}, self.left_s):
                    return self._late()
            except BrokenPipeError:
                return self._died()
        return None

    def _frame(self) -> dict[str, Any] | None:
        if len(self._read) < _HEAD.size:
            return None
        (length,) = _HEAD.unpack(self._read[: _HEAD.size])
        if len(self._read) < _HEAD.size + length:
            return None
        answer = child.read_frame(BytesIO(self._read))
        self._read = self._read[_HEAD.size + length :]
        return answer

    def _late(self) -> Outcome:
        self.end()
        return Outcome(cause="timeout", problem=f"took longer than {self._limit_s:g} s")

    def _died(self) -> Outcome:
        assert self._process is not None
        try:
            code: int | None = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            code = None  # it closed its pipes and lives: as good as dead
        self.end()
        how = "closed its pipes" if code is None else f"ended by signal {-code}" if code < 0 else f"exited with {code}"
        return Outcome(cause="died", problem=f"its worker process {how}")


def _ready(workers: Sequence[_Worker]) -> list[_Worker]:
    """Those with something to read or out of time; waits for the first."""
    if not workers:
        return []
    found = _poll({w.fileno: select.POLLIN for w in workers}, min(w.left_s for w in workers))
    return [w for w in workers if w.fileno in found or not w.left_s]


def _poll(events: Mapping[int, int], timeout_s: float) -> set[int]:
    """The descriptors that are ready (or closed) within the time."""
    poll = select.poll()
    for descriptor, event in events.items():
        poll.register(descriptor, event)
    return {descriptor for descriptor, _ in poll.poll(math.ceil(timeout_s * 1000))}


def _end_all(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.end()
