"""What a run tells its report: the typed form of RUN/report.json, and how it is read.

The stages of a run write this file as they finish; the curves' points are not in it but in RUN/metrics/*.jsonl. Every
list may be empty and most fields may be missing, so that an unfinished run has a report too; a key that does not exist
is an error, because content that silently stays out of a report is worse.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from afm_rl.errors import UserError

Cell = bool | int | float | str | None


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(_Part):
    """One number worth reading: `value` as it should be read, `unit` right after it, `note` in small print."""

    label: str
    value: Cell
    unit: str = ""
    note: str = ""


class Table(_Part):
    """`rows` of as many cells as there are `columns`; numeric columns are set flush right."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""


class Curve(_Part):
    """A chart of this stage's metrics: one line for each of `tasks` (none given: all) and each column in `y`."""

    title: str
    x: str = "step"
    y: list[str] = Field(min_length=1)
    tasks: list[str] = []
    unit: str = ""


class StageResult(_Part):
    """What one stage of the topology did. `name` also names its metrics file; `paper` is the section it follows."""

    name: str
    title: str = ""
    paper: str = ""
    seconds: float = Field(default=0.0, ge=0)
    figures: list[Figure] = []
    tables: list[Table] = []
    curves: list[Curve] = []


class ActorUse(_Part):
    """One actor process: seconds it was busy, calls it served, its peak memory in MiB."""

    name: str
    role: str
    num_cpus: float | None = None
    busy_s: float = 0.0
    calls: int = 0
    peak_mib: float | None = None


class Answer(_Part):
    """What one policy answered; `passed` None: nothing checked it."""

    policy: str
    text: str
    passed: bool | None = None


class Sample(_Part):
    """One prompt with the answers of several policies."""

    prompt: str
    kind: str = ""
    expected: str | None = None
    answers: list[Answer] = []


class Report(_Part):
    """All of report.json. `topology` is the resolved topology as a nested dict; `total_s` wall-clock seconds."""

    name: str
    created: str = ""
    total_s: float = Field(default=0.0, ge=0)
    environment: dict[str, Any] = {}
    topology: dict[str, Any] = {}
    dashboard: str | None = None
    headline: list[Figure] = []
    actors: list[ActorUse] = []
    stages: list[StageResult] = []
    samples: list[Sample] = []


def load_report(run_path: Path) -> Report:
    """Read and check RUN/report.json. Raises UserError naming the file, the place in it, and what is wrong."""
    path = run_path / "report.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist: {run_path} is not a run folder, or no stage of it has finished yet")
    try:
        return Report.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {place}: {first['msg']} ({error.error_count()} problems in all)") from error
