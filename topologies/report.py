"""The run's report: RUN/report.html, one self-contained page made from the run folder alone.

Reads RUN/report.json (what the stages said, see `report_data`), RUN/metrics/*.jsonl (the curves), RUN/rollouts (a sample)
and RUN/topology.yaml. May be written again at any time, also while the run is under way: it shows the stages that have
finished. The page asks nothing of the network and treats every text of a model as hostile.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.metrics import read_metrics
from topologies import report_sections as sections
from topologies.report_data import Report, load_report
from topologies.report_html import escape, figures
from topologies.report_picture import topology_picture
from topologies.report_rollouts import TaskRollouts, rollouts_section, sample_rollouts
from topologies.report_template import page


def write_report(run_path: str | Path) -> Path:
    """Write RUN/report.html and return its path. Raises UserError if RUN/report.json is missing or not as described."""
    run_path = Path(run_path)
    report = load_report(run_path)
    topology = run_path / "topology.yaml"
    text = topology.read_text(encoding="utf-8") if topology.exists() else ""
    path = run_path / "report.html"
    fresh = run_path / ".report.html.new"
    page_text = render(report, read_metrics(run_path / "metrics"), text, sample_rollouts(run_path))
    fresh.write_text(page_text, encoding="utf-8")
    os.replace(fresh, path)  # whoever has the page open never sees half of it
    return path


def render(
    report: Report, rows: Sequence[Mapping[str, Any]], topology_text: str = "", rollouts: Sequence[TaskRollouts] = ()
) -> str:
    """The page as text. `rows` are metric rows as `read_metrics` gives them, `topology_text` is shown as it is."""
    stages = "".join(sections.stage_section(index, stage, rows) for index, stage in enumerate(report.stages, start=1))
    body = (
        f"<header>{sections.head(report)}{sections.run_strip(report)}</header>{figures(report.headline, 'headline')}"
        f"{_picture(report)}{stages}{rollouts_section(rollouts)}{sections.samples_section(report.samples)}"
        f"{sections.timings_section(report, rows)}{sections.environment_section(report, topology_text)}"
    )
    return page(
        title=f"{escape(report.name)}: run report", contents=sections.contents(report, rollouts=bool(rollouts)), body=body
    )


def _picture(report: Report) -> str:
    if not (report.topology.get("actors") or report.actors):
        return ""
    return (
        '<section id="topology"><header><h2>Topology</h2><p class="lead">Every box is an actor role: stacked cards are '
        "replicas, the bar below is the share of the run it was busy.</p></header>"
        f'<div class="picture-frame">{topology_picture(report, sections.stage_names(report))}</div></section>'
    )
