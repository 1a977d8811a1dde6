"""The Grafana dashboard asks for metrics that exist: by name in our code, and with their labels as Ray exports them."""

from __future__ import annotations

import re
import time
import urllib.request
from pathlib import Path

import pytest

from actors.engine_use import EngineUse, LiveGauges
from actors.metrics import Metrics, RaySink
from tests.topologies.online_run import online_values
from topologies.grafana_dashboard import FILE, PREFIX, ROWS, dashboard, metric_names, text

ROOT = Path(__file__).resolve().parents[2]
EXPRESSIONS = [expression for row in ROWS.values() for panel in row for expression, _ in panel.lines]


def test_the_shipped_file_is_the_generated_one() -> None:
    """Guards the file against its source: `python -m topologies.grafana_dashboard` writes it anew."""
    assert FILE.read_text() == text()


def test_panels_lie_side_by_side_with_their_own_ids() -> None:
    """Guards the layout: no two panels share a place or an id, and none is outside the 24 columns."""
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = [
        (x, y)
        for p in panels
        for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
        for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])
    ]
    assert len(set(taken)) == len(taken)
    assert max(x for x, _ in taken) == 23


def test_every_name_of_ours_is_logged_somewhere() -> None:
    """Guards against a renamed metric: its panel would be empty without a word."""
    code = "".join(
        path.read_text() for folder in ("actors", "afm_rl", "topologies/online") for path in (ROOT / folder).rglob("*.py")
    )
    for name in metric_names():
        if name.startswith(PREFIX):
            assert f'"{name.removeprefix(PREFIX)}"' in code, name


@pytest.mark.slow
def test_ray_exports_every_metric_with_the_labels_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards names and tags as Prometheus sees them: each expression's selector picks at least one exported sample."""
    import ray

    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        actor = ray.remote(num_cpus=0.1)(_Engine).options(name="sampler-0").remote()
        ray.get(actor.work.remote(), timeout=60)
        Metrics([RaySink()]).log(stage="rl", task="rl", step=3, values={**online_values(3, 0.5, 0.5), "loss": 1.0})
        [node] = ray.nodes()
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        end_s, missing = time.monotonic() + 60, EXPRESSIONS
        while missing:
            assert time.monotonic() < end_s, missing
            time.sleep(1)
            samples = urllib.request.urlopen(address, timeout=10).read().decode().splitlines()
            missing = [expression for expression in missing if not any(_picks(expression, sample) for sample in samples)]
    finally:
        ray.shutdown()


class _Engine:
    def work(self) -> None:
        """Set the gauges as a sampler does."""
        self.gauges = LiveGauges("sampler-0", [RaySink()])
        use = EngineUse(
            response_tokens=64, busy_s=0.1, steps=8, occupied_row_steps=60, row_steps=64, pages=10, free_pages=4, version=3
        )
        self.gauges.update(lambda: use, busy=False)


def _picks(expression: str, sample: str) -> bool:
    """Whether the expression's selector takes this line of Prometheus's text format; variables stand for anything."""
    selected = re.search(r"(ray_\w+)\{(.*)\}", expression)
    assert selected is not None
    if not sample.startswith(selected[1] + "{"):
        return False
    labels = dict(re.findall(r'(\w+)="([^"]*)"', sample))
    for label, sign, value in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', selected[2]):
        matches = value.startswith("$") or re.fullmatch(value, labels[label]) is not None
        if matches != (sign in ("=", "=~")):
            return False
    return True
