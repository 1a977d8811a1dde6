"""The Grafana dashboard of a run, over the metrics that `actors.metrics.RaySink` sets and Ray exports to Prometheus.

`topologies/grafana/afm_rl.json` is what `python -m topologies.grafana_dashboard` writes; import it in Grafana. A gauge
METRIC of ours is `ray_afm_rl_METRIC` there, with the labels stage and task (of engines: the actor) beside Ray's own.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.metrics import ENGINE_STAGE

FILE = Path(__file__).parent / "grafana" / "afm_rl.json"
PREFIX = "ray_afm_rl_"
#: Panels of Grafana's 24 columns.
WIDTH, HEIGHT, COLUMNS = 8, 8, 24
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_JOB = f'{{SessionName=~"$session",stage=~"$stage",task=~"$task",stage!="{ENGINE_STAGE}"}}'
#: The gauges that an actor sets itself; the driver's rows of single iterations have a task with a slash.
_ENGINE = f'{{SessionName=~"$session",stage="{ENGINE_STAGE}",task!~".*/.*"}}'


@dataclass(frozen=True)
class Panel:
    """A chart: `lines` are (expression, legend)."""

    title: str
    lines: tuple[tuple[str, str], ...]
    unit: str = "short"
    note: str = ""
    top: float | None = None


def _job(title: str, *names: str, unit: str = "short", note: str = "", top: float | None = None) -> Panel:
    """Metrics of jobs, one line for each job and name."""
    lines = [
        (f"max by (stage, task) ({PREFIX}{name}{_JOB})", "{{task}}" + (f" {name}" if len(names) > 1 else ""))
        for name in names
    ]
    return Panel(title, tuple(lines), unit, note, top)


def _engine(title: str, *names: str, unit: str = "short", note: str = "", top: float | None = None) -> Panel:
    """Metrics of engines, one line for each actor and name."""
    lines = [
        (f"max by (task) ({PREFIX}{name}{_ENGINE})", "{{task}}" + (f" {name}" if len(names) > 1 else "")) for name in names
    ]
    return Panel(title, tuple(lines), unit, note, top)


ROWS: dict[str, tuple[Panel, ...]] = {
    "Learning": (
        _job("Reward", "reward"),
        _job("Accuracy on training prompts", "accuracy", unit="percentunit", top=1),
        _job("KL", "kl_to_reference", "kl_to_behavior", note="nats a response: to the reference, and to pi_k"),
        _job("Effective sample size", "effective_sample_fraction", unit="percentunit", top=1),
        _job("Importance ratio", "ratio_mean", "ratio_max"),
        _job("Log-prob mismatch", "logp_mismatch_max", "logp_mismatch_mean", note="a token's, sampler against learner"),
        _job("Staleness", "staleness_mean", "staleness_max", note="versions between sampling and update"),
        _job("Responses with a reward", "valid_fraction", unit="percentunit", top=1),
        _job("Loss", "loss", note="of jobs that train on given data"),
    ),
    "The loop": (
        _job("Sampled tokens a second", "tokens_per_s"),
        _job("An iteration's time", "generate_s", "reward_s", "update_s", "publish_s", unit="s"),
        _job("Who waits", "learner_wait_s", "sampler_wait_s", unit="s"),
        _job("Groups that wait for the learner", "queue_depth"),
        _job("Weights in sync", "weights_in_sync", note="1: every sampler has acknowledged the newest digest", top=1),
        _job("Version trained", "policy_version"),
    ),
    "Engines": (
        _engine("Tokens a second of an engine's steps", "tokens_per_s"),
        _engine("Batch rows in use", "batch_occupancy", unit="percentunit", top=1),
        _engine("Responses running and waiting", "running", "waiting"),
        _engine("Preemptions", "preemptions", note="of the last few seconds"),
        _engine("Free pages of the cache", "free_page_share", unit="percentunit", top=1),
        _engine("Version of the weights held", "weights_version"),
    ),
    "Actors": (
        Panel(
            "Actors alive, by role",
            (('sum by (Name) (ray_actors{SessionName=~"$session",Source="gcs",State="ALIVE"})', "{{Name}}"),),
        ),
        Panel(
            "Actors, by state",
            (('sum by (State) (ray_actors{SessionName=~"$session",Source="gcs"})', "{{State}}"),),
            note="RESTARTING and DEAD are what to look for",
        ),
        Panel(
            "Memory, by process",
            (('max by (Component) (ray_component_uss_bytes{SessionName=~"$session"})', "{{Component}}"),),
            unit="bytes",
        ),
    ),
}


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append(
            {"type": "row", "title": title, "collapsed": False, "gridPos": _grid(0, y, COLUMNS, 1), "id": len(panels) + 1}
        )
        y += 1
        for i, panel in enumerate(row):
            across = COLUMNS // WIDTH
            panels.append(_panel(panel, len(panels) + 1, _grid(i % across * WIDTH, y + i // across * HEIGHT, WIDTH, HEIGHT)))
        y += -(-len(row) // (COLUMNS // WIDTH)) * HEIGHT
    return {
        "title": "afm-rl",
        "uid": "afm-rl",
        "tags": ["afm-rl", "ray"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": _variables()},
        "panels": panels,
    }


def metric_names() -> set[str]:
    """Every metric that a panel asks for."""
    expressions = [expression for row in ROWS.values() for panel in row for expression, _ in panel.lines]
    return {name for expression in expressions for name in re.findall(r"\b(ray_\w+)\{", expression)}


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "custom": {"lineWidth": 2, "fillOpacity": 5, "showPoints": "auto"}}
    if panel.top is not None:
        defaults |= {"min": 0, "max": panel.top}
    return {
        "type": "timeseries",
        "id": number,
        "title": panel.title,
        "description": panel.note,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": expression, "legendFormat": legend, "datasource": _SOURCE}
            for i, (expression, legend) in enumerate(panel.lines)
        ],
    }


def _variables() -> list[dict[str, Any]]:
    source = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    chosen = f'{{SessionName=~"$session",stage!="{ENGINE_STAGE}"}}'
    asked = (
        ("session", "Ray session", f"label_values({PREFIX}step, SessionName)"),
        ("stage", "Stage", f"label_values({PREFIX}step{chosen}, stage)"),
        ("task", "Job", f"label_values({PREFIX}step{chosen}, task)"),
    )
    return [
        source,
        *(
            {"name": name, "label": label, "type": "query", "datasource": _SOURCE, "query": query, "definition": query,
             "refresh": 2, "sort": 1, "multi": True, "includeAll": True, "allValue": ".*",
             "current": {"text": "All", "value": "$__all"}}
            for name, label, query in asked
        ),
    ]  # fmt: skip


def _grid(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def text() -> str:
    """The file's content: a line for each panel."""
    content = dashboard()
    panels = ",\n".join(json.dumps(panel) for panel in content.pop("panels"))
    return f'{json.dumps(content)[:-1]},\n"panels": [\n{panels}\n]}}\n'


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    print(FILE)
