"""Tables that more than one stage puts into the report."""

from __future__ import annotations

from collections.abc import Sequence

from topologies.report_data import Cell, Table
from topologies.stages.measure import Measured, percent


def accuracy_by_kind(measured: Sequence[Measured], *, title: str = "Accuracy by kind of prompt (greedy / sampled)") -> Table:
    """One row per policy: overall and per kind, greedy / sampled, in percent."""
    kinds = sorted({kind for m in measured for kind in m.greedy_by_kind})
    rows: list[list[Cell]] = []
    for m in measured:
        cells = [f"{percent(m.greedy_by_kind.get(k))} / {percent(m.sampled_by_kind.get(k))}" for k in kinds]
        rows.append([m.policy, f"{percent(m.greedy)} / {percent(m.sampled)}", *cells])
    return Table(title=title, columns=["policy", "all", *kinds], rows=rows, note="percent of held-out prompts")
