"""The report's parts: number formats, tables, ticks, thinning and charts, by hand or against NumPy."""

import math
import re

import numpy as np
import pytest

from topologies.report_data import Curve, Figure, Report, StageResult, Table
from topologies.report_html import compact, duration, escape, figures, mebibytes, number, table
from topologies.report_sections import curve_series, timings_section
from topologies.report_svg import MAX_POINTS, Series, line_chart, running_mean, thin, ticks


def test_a_ragged_table_is_refused():
    """A row with a missing cell would silently shift its columns."""
    with pytest.raises(ValueError, match="row 1 has 1 cells for 2 columns"):
        table(Table(title="t", columns=["a", "b"], rows=[[1, 2], [3]]))


def test_numbers_read_as_people_write_them():
    """Formats of cells, axes and durations, by hand."""
    shown = [number(v) for v in (0.98642, 26512.0, 2048000, -3, 0.00021, 0.0, True, None, math.nan, "0.50")]
    assert shown == ["0.9864", "26,512", "2,048,000", "−3", "2.1e−4", "0", "yes", "–", "NaN", "0.50"]
    assert [compact(v) for v in (0, 2500, 12000, 3.4e6, -0.5, 2e-4)] == ["0", "2,500", "12k", "3.4M", "−0.5", "2e−4"]
    assert [duration(v) for v in (0.42, 12.34, 245, 3599.6, 4320)] == [
        "0.42 s", "12.3 s", "4 min 05 s", "1 h 00 min", "1 h 12 min",
    ]  # fmt: skip
    assert [mebibytes(v) for v in (942.4, 2048)] == ["942 MiB", "2.0 GiB"]
    assert escape("a\r\nb\x00\ud800") == "a\nb␀?"
    assert "0.986</td>" in table(Table(title="", columns=["a"], rows=[[0.9], [0.986]]))
    assert "0.900</td>" in table(Table(title="", columns=["a"], rows=[[0.9], [0.986]]))
    assert "words" in figures([Figure(label="l", value="a long sentence as a value")])


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (0, 1, 4, [0, 0.25, 0.5, 0.75, 1]),
        (0, 10, 5, [0, 2, 4, 6, 8, 10]),
        (2.31, 7.7, 4, [4, 6]),
        (-0.3, 0.3, 4, [-0.2, 0, 0.2]),
        (0, 1e-7, 4, [0, 2.5e-8, 5e-8, 7.5e-8, 1e-7]),
    ],
)
def test_ticks_are_round_and_inside(low, high, count, expected):
    """Axis marks, by hand."""
    assert ticks(low, high, count) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_thinning_keeps_spikes_ends_and_gaps():
    """A loss spike or a NaN in 20,000 steps survives being drawn on 460 pixels."""
    y = list(np.random.default_rng(0).normal(0, 1, 20_000))
    y[777], y[12_345], y[5_000] = 50.0, -50.0, None
    few = thin(Series("s", list(range(20_000)), y))
    assert len(few.x) <= MAX_POINTS * 1.1
    assert {0, 777, 5_000, 12_345, 19_999} <= set(few.x)
    assert list(few.x) == sorted(few.x)


def test_running_mean_matches_numpy():
    """Centred mean over 1/20 of the points, gaps left out, against NumPy's nanmean."""
    y = np.random.default_rng(1).normal(size=200)
    y[50] = np.nan
    expected = [np.nanmean(y[max(0, i - 5) : i + 6]) for i in range(200)]
    given = [None if np.isnan(v) else float(v) for v in y]
    assert running_mean(Series("s", list(range(200)), given)).y == pytest.approx(expected)


def test_a_chart_maps_values_to_pixels():
    """Points stand where the axes say: corners by hand; a gap starts a new run; single values are drawn."""
    svg = line_chart([Series("s", [0, 5, 10], [0.0, None, 1.0])], x_label="step", description="d")
    path = re.search(r'class="line"[^>]* d="([^"]*)"', svg).group(1)
    assert re.fullmatch(r"M50\.0 216\.0M446\.0 [\d.]+", path)
    assert "<circle" in line_chart([Series("s", [3], [2.0])], x_label="step", description="d")
    assert "NaN" not in line_chart([Series("s", [1, 2], [0.0, 0.0])], x_label="step", description="d")
    assert line_chart([Series("s", [1], [None])], x_label="step", description="d") == ""


def test_curve_rows_are_sorted_and_time_starts_at_zero():
    """Rows of a resumed run come out of order; clock time is shown from the stage's first row."""
    rows = [
        {"stage": "s", "task": "a", "step": step, "time": 100.0 + step, "loss": float(step), "kl": None}
        for step in (3, 1, 2)
    ]
    (line,) = curve_series(Curve(title="t", y=["loss"], x="time"), rows)
    assert (line.name, list(line.x), list(line.y)) == ("loss", [0.0, 1.0, 2.0], [1.0, 2.0, 3.0])
    two = curve_series(Curve(title="t", y=["loss", "kl"]), [*rows, {**rows[0], "task": "b"}])
    assert [one.name for one in two] == ["a · loss", "a · kl", "b · loss", "b · kl"]


def test_the_learners_time_is_a_table_by_job() -> None:
    """Guards goodput on the page: the last row of each job, in percent and seconds; nothing where no job ran."""
    row = {"stage": "goodput", "time": 0.0, "step": 4, "step_s": 3.0, "compile_s": 1.0, "goodput": 0.75}
    rows = [{**row, "task": "sft", "goodput": 0.1}, {**row, "task": "sft"}, {**row, "stage": "sft", "task": "sft"}]
    report = Report(name="r", total_s=4.0, stages=[StageResult(name="sft", title="SFT", seconds=4.0)])
    page = timings_section(report, rows)
    cells = re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", page)
    assert cells == ["job", "goodput, %", "step", "compile", "sft", "75", "3", "1"]
    assert "Learner" not in timings_section(report, [])


def test_what_engines_did_is_a_table_by_stage() -> None:
    """A sampler's row of a stage is shown, the rows of a stage's iterations are not; what was not measured is a dash."""
    done = {"response_tokens": 1200, "tokens_per_s": 345.6, "batch_occupancy": 0.875}
    done |= {"queue_depth": 1.25, "preemptions": 3, "compiled_programs": 7, "stage": "engine", "time": 0.0}
    rows = [{**done, "task": "sft/sampler-0", "step": 0}, {**done, "task": "itec-1-mdloo/sampler-1", "step": 0}]
    shown = timings_section(Report(name="r", total_s=9, stages=[StageResult(name="sft", seconds=5)]), rows)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", shown)
    assert cells == ["sft", "sampler-0", "1,200", "346", "87.5", "–", "1.2", "3", "7"]
