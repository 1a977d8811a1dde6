"""What a launch says about itself while it runs: RUN/live.json, written anew every second, for `afm-rl watch`.

A thread of its own asks every actor for a pulse (`actors/signs.py`) and waits for none: one that is frozen shows as silent,
one that Ray starts anew as restarting. Whoever reads the file needs no Ray, and tells from its age whether the launch lives.
Nothing here can hold up or end a run: what fails is logged once.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

from actors.failures import InfrastructureError
from actors.host import Handle, Pending
from actors.signs import Signs
from actors.streams import ready
from topologies.live_file import EVERY_S, FILE
from topologies.progress import ProgressView
from topologies.run_folder import RunFolder
from topologies.system import System

log = logging.getLogger(__name__)

#: An actor that owes an answer for so many seconds is shown as silent.
SILENT_AFTER_S = 5.0
#: The share of time that an actor was busy is of about so many seconds.
BUSY_OVER_S = 10.0
#: Warnings and errors kept.
MESSAGES = 20
#: Seconds that the thread may take to end.
END_DEADLINE_S = 5.0


@dataclass
class _Known:
    """An actor as it was last heard of."""

    state: str = "starting"
    cause: str = ""
    pulse: Signs | None = None
    lives: set[str] = field(default_factory=set)
    busy: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=round(BUSY_OVER_S / EVERY_S)))
    asked_s: float = 0.0
    pending: Pending | None = None


class Actors:
    """The actors of `handles()`, asked without waiting. `look` is for one thread."""

    def __init__(self, handles: Callable[[], Sequence[Handle]], clock: Callable[[], float] = time.monotonic) -> None:
        self._handles, self._clock = handles, clock
        self._known: dict[str, _Known] = {}
        self._of: dict[str, list[str]] = {}

    def look(self) -> list[dict[str, Any]]:
        """Read the answers that are there, ask those again that owe none, and describe every actor, in order.

        States: starting, working, idle, silent (`silent_s`), restarting, dead (`cause`), away (its place is lent out).
        """
        rows = []
        for handle in self._handles():
            names = self._of.get(handle.name, [])
            for name in names:
                self._read(self._known[name])
            if all(self._known[name].pending is None for name in names):
                names = self._of[handle.name] = self._ask(handle)
            rows += [self._row(name) for name in names]
        return rows

    def _ask(self, handle: Handle) -> list[str]:
        calls = handle.pulses()
        for name, call in calls.items():
            known = self._known.setdefault(name, _Known())
            known.pending, known.asked_s = call, self._clock()
            self._read(known)  # an inline actor has answered already
        if not calls:
            self._known[handle.name] = _Known(state="away")
        return list(calls) or [handle.name]

    def _read(self, known: _Known) -> None:
        if known.pending is None or not ready([known.pending], 0.0):
            return
        pending, known.pending = known.pending, None
        try:
            self._heard(known, pending.result(0.0))
        except InfrastructureError as error:
            known.state, known.cause = _loss(error), str(error)
            known.busy.clear()

    def _heard(self, known: _Known, pulse: Signs | None) -> None:
        known.cause = ""
        if pulse is None:
            known.state = "starting"
            return
        if known.pulse is None or pulse.life != known.pulse.life:
            known.busy.clear()
        known.pulse, known.state = pulse, "working" if pulse.working else "idle"
        known.lives.add(pulse.life)
        known.busy.append((self._clock(), pulse.busy_s))

    def _row(self, name: str) -> dict[str, Any]:
        known = self._known[name]
        owed_s = self._clock() - known.asked_s if known.pending is not None else 0.0
        silent = owed_s >= SILENT_AFTER_S and known.pulse is not None
        row: dict[str, Any] = {"name": name, "state": "silent" if silent else known.state, "restarts": len(known.lives) - 1}
        row["restarts"] = max(0, row["restarts"])
        if silent:
            row["silent_s"] = round(owed_s, 1)
        if known.cause:
            row["cause"] = known.cause[:300]
        if known.pulse is not None:
            row |= asdict(known.pulse) | {"busy_share": _share(known.busy)}
        return row


def _share(busy: Sequence[tuple[float, float]]) -> float | None:
    """Of the time between the first and the last of (now, seconds busy so far)."""
    if len(busy) < 2 or busy[-1][0] <= busy[0][0]:
        return None
    return round(min(1.0, max(0.0, (busy[-1][1] - busy[0][1]) / (busy[-1][0] - busy[0][0]))), 3)


def _loss(error: InfrastructureError) -> str:
    """Whether Ray brings the actor back."""
    from ray.exceptions import ActorUnavailableError

    return "restarting" if isinstance(error.__cause__, ActorUnavailableError) else "dead"


class LiveState:
    """Keeps RUN/live.json up to date while the block runs, and says at its end how it ended.

    Use: `with LiveState(run, system, progress) as live: ... live.enter(stage)`.
    """

    def __init__(self, run: RunFolder, system: System, progress: ProgressView) -> None:
        self._path, self._system, self._progress = run.path / FILE, system, progress
        self._actors = Actors(lambda: system.handles)
        self._messages = _Messages()
        self._start = {
            "name": run.path.name,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": time.time(),
            "launcher": system.launcher,
            "dashboard": system.dashboard,
        }
        self._stage: dict[str, Any] | None = None
        self._rows: list[dict[str, Any]] = []
        self._over, self._failed = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name="live", daemon=True)

    def enter(self, stage: str) -> None:
        """This stage begins now."""
        self._stage = {"name": stage, "since": time.time()}

    def __enter__(self) -> LiveState:
        logging.getLogger().addHandler(self._messages)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join(END_DEADLINE_S)
        logging.getLogger().removeHandler(self._messages)
        if error is not None and not isinstance(error, KeyboardInterrupt):
            self._messages.add("ERROR", type(error).__name__, str(error))
        self._guarded(lambda: self._write("ended" if error is None else "failed"))

    def _work(self) -> None:
        while not self._over.is_set():
            self._guarded(self._tick)
            self._over.wait(EVERY_S)

    def _tick(self) -> None:
        self._rows = self._actors.look()
        if not self._over.is_set():  # or the end would be overwritten by one who looked for too long
            self._write("running")

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:  # whatever it is, the run goes on
            if not self._failed:
                self._failed = True
                log.warning("%s is not kept up to date, so `afm-rl watch` shows old numbers", self._path, exc_info=True)

    def _write(self, state: str) -> None:
        bars = [{"name": bar.name, "done": bar.done, "total": bar.total} for bar in self._progress.bars]
        content = {**self._start, "written": time.time(), "state": state, "stage": self._stage, "bars": bars}
        content |= {"actors": self._rows, "messages": list(self._messages.kept)}
        temporary = self._path.with_name(f"{FILE}.tmp-{threading.get_ident()}")
        temporary.write_text(json.dumps(content), encoding="utf-8")
        os.replace(temporary, self._path)


class _Messages(logging.Handler):
    """Keeps the newest warnings and errors. Where nobody else handles them, they are printed as Python would without it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.kept: deque[dict[str, Any]] = deque(maxlen=MESSAGES)

    def emit(self, record: logging.LogRecord) -> None:
        self.add(record.levelname, record.name, record.getMessage())
        if logging.getLogger().handlers == [self] and logging.lastResort is not None:
            logging.lastResort.handle(record)

    def add(self, level: str, source: str, text: str) -> None:
        """One line of at most 400 characters."""
        self.kept.append({"time": time.time(), "level": level, "source": source, "text": " ".join(text.split())[:400]})
