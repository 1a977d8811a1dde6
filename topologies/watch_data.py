"""What `afm-rl watch` knows of a run: read from files of the run folder alone, and on each look only what is new in them.

RUN/live.json says what the launch and its actors do (`live.py`), RUN/metrics/*.jsonl how jobs go, RUN/journal.msgpack which
stages are done and which groups are issued, finished, consumed. Neither Ray nor the launch is asked for anything, so that a
finished run, a dead one, and one on another machine's disk look the same way.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from actors.metrics import ENGINE_STAGE, GOODPUT_STAGE
from topologies.journal import JournalTail
from topologies.live_file import EVERY_S, read_live
from topologies.online.ledger import KIND, counts
from topologies.run_folder import FINISHED, RunFolder

#: A launch that has written nothing for so many seconds gives no sign of life.
LOST_AFTER_S = 8 * EVERY_S
#: Rows kept of a job, and bytes of a metrics file that the first look goes back.
HISTORY, LOOK_BACK_BYTES = 400, 8 * 2**20
#: A column that only rows of online jobs have.
ONLINE = "policy_version"

RunState = Literal["running", "finished", "ended", "failed", "lost", "unknown"]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """`state`: done, current or waiting; `seconds` it took, or takes."""

    name: str
    state: Literal["done", "current", "waiting"]
    seconds: float | None = None


@dataclass(frozen=True)
class Job:
    """A series of metric rows, the newest last. `groups` of an online job: how many are issued, finished, consumed."""

    task: str
    stage: str
    rows: tuple[Row, ...]
    groups: Mapping[str, int] | None = None

    @property
    def online(self) -> bool:
        """Whether it is a job of online RL."""
        return self.groups is not None or (bool(self.rows) and ONLINE in self.rows[-1])

    @property
    def changed(self) -> float:
        """When its newest row was written, in seconds since the epoch; a job without one is the newest."""
        return float(self.rows[-1]["time"]) if self.rows else float("inf")


@dataclass(frozen=True)
class View:
    """One look. `age_s`: since the launch's last sign of life; `why`: of a lost or failed run; `live`: live.json, or {}."""

    name: str
    path: str
    state: RunState
    age_s: float | None
    why: str
    live: Mapping[str, Any]
    stages: tuple[Stage, ...]
    jobs: tuple[Job, ...]
    engines: Mapping[str, Row] = field(default_factory=dict)


class RunReader:
    """Reads one run again and again. `clock` counts seconds since the epoch, `passed` seconds of this process."""

    def __init__(
        self, run: RunFolder, *, clock: Callable[[], float] = time.time, passed: Callable[[], float] = time.monotonic
    ) -> None:
        self._run, self._clock, self._passed = run, clock, passed
        self._stage_names = run.topology.stage_names
        self._journal = JournalTail(run.journal_file)
        self._tails: dict[Path, LineTail] = {}
        self._series: dict[tuple[str, str], deque[Row]] = {}
        self._done: dict[str, float] = {}
        self._finished = False
        self._groups: dict[str, list[Any]] = {}
        self._counted: dict[str, tuple[int, Mapping[str, int]]] = {}
        self._written, self._heard_s = None, None

    _written: float | None
    _heard_s: float | None

    def look(self) -> View:
        """Everything as of now. Raises JournalError where the journal is damaged."""
        self._read_journal()
        self._read_metrics()
        live = read_live(self._run.path) or {}
        age_s = self._age(live)
        state, why = self._state(live, age_s)
        engines = {task: rows[-1] for (stage, task), rows in self._series.items() if stage == ENGINE_STAGE}
        return View(
            name=self._run.path.name,
            path=str(self._run.path),
            state=state,
            age_s=age_s,
            why=why,
            live=live,
            stages=tuple(self._stages(live, state)),
            jobs=tuple(sorted(self._jobs(), key=lambda job: -job.changed)),
            engines={task.rpartition("/")[2]: row for task, row in engines.items()},
        )

    def _read_journal(self) -> None:
        for record in self._journal.new():
            if record == FINISHED:
                self._finished = True
            elif isinstance(record, dict) and record.get("kind") == KIND:
                self._groups.setdefault(record["task"], []).append(record)
            elif isinstance(record, dict) and str(record.get("key", "")).startswith("stage/"):
                result = record["result"]
                seconds = result.get("seconds") if isinstance(result, dict) else None
                self._done[record["key"].removeprefix("stage/")] = float(seconds or 0.0)

    def _read_metrics(self) -> None:
        for path in sorted(self._run.metrics.glob("*.jsonl")):
            tail = self._tails.setdefault(path, LineTail(path, back_bytes=LOOK_BACK_BYTES))
            for line in tail.new():
                if (row := _row(line)) is not None:
                    self._add(row)

    def _add(self, row: Row) -> None:
        rows = self._series.setdefault((row["stage"], row["task"]), deque(maxlen=HISTORY))
        while rows and rows[-1]["step"] >= row["step"]:  # a resumed job repeats the steps after its checkpoint
            rows.pop()
        rows.append(row)

    def _jobs(self) -> Iterator[Job]:
        found = {task: (stage, rows) for (stage, task), rows in self._series.items() if stage not in _ASIDE}
        for task in self._groups.keys() | found.keys():
            stage, rows = found.get(task, ("", deque()))
            yield Job(task, stage, tuple(rows), self._count(task) if task in self._groups else None)

    def _count(self, task: str) -> Mapping[str, int]:
        records = self._groups[task]
        if self._counted.get(task, (-1, {}))[0] != len(records):
            self._counted[task] = len(records), counts(records, task)
        return self._counted[task][1]

    def _stages(self, live: Mapping[str, Any], state: RunState) -> Iterator[Stage]:
        current = live.get("stage") or {}
        since = current.get("since")
        until = live.get("written", 0.0) if state in ("lost", "failed") else self._clock()
        for name in self._stage_names:
            if name in self._done:
                yield Stage(name, "done", self._done[name])
            elif name == current.get("name") and state != "finished":
                yield Stage(name, "current", max(0.0, until - since) if since else None)
            else:
                yield Stage(name, "waiting")

    def _age(self, live: Mapping[str, Any]) -> float | None:
        """By the file's own time at first; once it was seen to change, by our clock, as the two may be of two machines."""
        written = live.get("written")
        if written is None:
            return None
        if self._written is not None and written != self._written:
            self._heard_s = self._passed()
        self._written = written
        wall_s = max(0.0, self._clock() - written)
        return wall_s if self._heard_s is None else self._passed() - self._heard_s

    def _state(self, live: Mapping[str, Any], age_s: float | None) -> tuple[RunState, str]:
        if self._finished:
            return "finished", ""
        if age_s is None:
            return "unknown", "no launch has said anything here yet"
        if live.get("state") == "failed":
            return "failed", str((live.get("messages") or [{}])[-1].get("text", ""))
        if live.get("state") == "ended":
            return "ended", ""
        pid, host = live.get("pid"), live.get("host")
        if host == socket.gethostname() and isinstance(pid, int) and not _exists(pid):
            return "lost", f"its process {pid} is gone; continue it with: afm-rl launch FILE --resume"
        if age_s > LOST_AFTER_S:
            return "lost", f"is process {pid} on {host} stopped, or its disk out of reach?"
        return "running", ""


#: Rows that are about actors or the learner's time, not about how a job goes.
_ASIDE = (ENGINE_STAGE, GOODPUT_STAGE)


class LineTail:
    """The whole lines of a growing file, each once; at first those of its last `back_bytes`."""

    def __init__(self, path: Path, *, back_bytes: int) -> None:
        self._path, self._back_bytes = path, back_bytes
        self._at: int | None = None

    def new(self) -> list[bytes]:
        """What was added since the last look. A file that became shorter is read from its beginning."""
        with self._path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if self._at is None:
                self._at = max(0, size - self._back_bytes)
                if self._at:
                    file.seek(self._at)
                    self._at += len(file.readline())  # most likely half a line
            elif self._at > size:
                self._at = 0
            file.seek(self._at)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._at += len(whole) + len(newline)
        return whole.splitlines()


def _row(line: bytes) -> Row | None:
    """A metrics row; None for a line that a kill has cut."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(row, dict) and all(name in row for name in ("stage", "task", "step", "time"))
    return row if whole else None


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
