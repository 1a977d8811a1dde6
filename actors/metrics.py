"""Metrics of a run: one call, several sinks (JSON lines, TensorBoard, Ray's own metrics).

The JSON lines under `metrics/` are what the report draws; TensorBoard and Ray show the same numbers while the run
is up. A sink is a plain object: an actor builds its own where it runs. `ray` is imported only inside `RaySink`, so
that the rest works without Ray. Not in the paper, which shows its curves and not how it collected them.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, SupportsFloat

import numpy as np

Scalar = int | float
#: Columns every row has; a metric may not take one of these names.
RESERVED = ("stage", "task", "step", "time")
#: The stage of rows that say where a job's time went (`afm_rl/goodput.py`).
GOODPUT_STAGE = "goodput"
#: The stage of rows that say what the engines of samplers did (`actors/engine_use.py`).
ENGINE_STAGE = "engine"

_log = logging.getLogger(__name__)
_STAGE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class MetricsSink(Protocol):
    """Where rows of numbers go. `values` are Python numbers, NaN and infinities included; none is named in RESERVED."""

    def log(self, *, stage: str, task: str, step: int, values: Mapping[str, Scalar]) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """Checks one row of values and hands it to every sink.

    `stage` names the file, `task` tells the series of a stage apart (core, round 1 mdloo), `step` counts within one.
    """

    def __init__(self, sinks: Sequence[MetricsSink]) -> None:
        self.sinks = tuple(sinks)

    def log(self, *, stage: str, task: str, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Log scalars: Python, NumPy or JAX numbers of shape [] or one element. Raises on any other value or name."""
        if not _STAGE_NAME.fullmatch(stage):
            raise ValueError(f"metrics: stage {stage!r} must be letters, digits, '_', '-' or '.': it names a file")
        row = {name: _scalar(name, value) for name, value in values.items()}
        for sink in self.sinks:
            sink.log(stage=stage, task=task, step=int(step), values=row)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class JsonlSink:
    """Appends rows {"stage", "task", "step", "time", **values} to FOLDER/STAGE.jsonl, one write a row.

    `time` is seconds since the epoch; a value that is not finite is written as null, which JSON has and NaN it has not.
    Holds no open file: safe to pickle, and several processes may append to one stage.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._mended: set[str] = set()

    def log(self, *, stage: str, task: str, step: int, values: Mapping[str, Scalar]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        row = {"stage": stage, "task": task, "step": step, "time": round(time.time(), 3), **finite}
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        path = self.folder / f"{stage}.jsonl"
        if stage not in self._mended:  # a process killed in mid-line must not spoil the next row too
            self.folder.mkdir(parents=True, exist_ok=True)
            line = (b"\n" if _ends_in_mid_line(path) else b"") + line
            self._mended.add(stage)
        with path.open("ab", buffering=0) as file:
            file.write(line)

    def close(self) -> None:
        """Nothing to release: every row is already in its file."""


class TensorBoardSink:
    """Writes event files into FOLDER for `tensorboard --logdir FOLDER`; a tag is STAGE/TASK/METRIC."""

    def __init__(self, folder: str | Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, *, stage: str, task: str, step: int, values: Mapping[str, Scalar]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{stage}/{task}/{name}" if task else f"{stage}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class RaySink:
    """Sets one Ray gauge a metric, `PREFIX_METRIC` with tags stage and task; Ray exports it as `ray_PREFIX_METRIC`.

    Must live in a process connected to Ray. `PREFIX_step` carries the step.
    """

    def __init__(self, prefix: str = "afm_rl") -> None:
        self.prefix = prefix
        self._gauges: dict[str, Any] = {}

    def log(self, *, stage: str, task: str, step: int, values: Mapping[str, Scalar]) -> None:
        for name, value in {**values, "step": step}.items():
            self._gauge(name).set(float(value), tags={"stage": stage, "task": task})

    def _gauge(self, name: str) -> Any:
        exported = re.sub(r"[^A-Za-z0-9_]", "_", f"{self.prefix}_{name}")  # Prometheus takes nothing else
        if exported not in self._gauges:
            from ray.util.metrics import Gauge

            self._gauges[exported] = Gauge(exported, description=f"{name} of a stage", tag_keys=("stage", "task"))
        return self._gauges[exported]

    def close(self) -> None:
        """Ray keeps the last values until its own process ends."""


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Every row of FOLDER/*.jsonl, stages by file name, rows in the order written; [] where there is no folder.

    Of rows with the same stage, task and step the last one counts and stands where the first stood: a resumed run
    repeats the steps after its checkpoint. A line cut by a kill is reported through `logging` and skipped.
    """
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    for path in sorted(Path(folder).glob("*.jsonl")):
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            row = _parse(line)
            if row is None:
                _log.warning("%s:%d is not a metrics row (cut by a kill?); skipped: %r", path, number, line[:80])
            else:
                rows[row["stage"], row["task"], row["step"]] = row
    return list(rows.values())


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and all(name in row for name in RESERVED) else None


def _scalar(name: str, value: SupportsFloat) -> Scalar:
    if name in RESERVED:
        raise ValueError(f"metrics: {name!r} names a column of every row; rename the metric (taken: {RESERVED})")
    array = np.asarray(value)
    if array.size != 1 or not (array.dtype.kind in "biuf" or array.dtype.name.startswith(("bfloat", "float"))):
        raise TypeError(f"metrics: {name!r} must be one number, got {array.dtype} {array.shape}: {value!r:.80}")
    return int(array.item()) if array.dtype.kind in "biu" else float(array.item())


def _ends_in_mid_line(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"
