"""The sections of the report's page: head, run strip, stages, samples, timings, environment.

Each function turns one part of a `Report` into HTML and returns "" when the run has nothing to say there.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from actors.metrics import ENGINE_STAGE, GOODPUT_STAGE
from topologies.report_data import Answer, Curve, Report, Sample, StageResult, Table
from topologies.report_html import bar, compact, duration, escape, figures, mebibytes, number, share, table
from topologies.report_svg import COLOURS, SMOOTH_FROM, Series, line_chart

Rows = Sequence[Mapping[str, Any]]
#: The phases of the paper that colour the run strip, and the stages in them.
PHASES = {
    "pre-training": ("tokenizer", "pretrain", "prune"),
    "post-training": ("sft", "reward_model", "rl", "itec", "distill_committee"),
    "compression": ("quantize", "recover", "adapters"),
    "evaluation and serving": ("evaluate", "serve"),
}


def stage_names(report: Report) -> list[str]:
    """The names of the topology's stages in order; those that ran if the topology does not list them."""
    listed = report.topology.get("stages") or [stage.name for stage in report.stages]
    return [item if isinstance(item, str) else str(item.get("name") or next(iter(item))) for item in listed]


def head(report: Report) -> str:
    """The page's title, when and how long, and how far the run came."""
    seed, model, listed = report.topology.get("seed"), report.topology.get("model"), stage_names(report)
    model = model.get("preset") if isinstance(model, Mapping) else model  # resolved and shorthand forms
    facts = (
        "afm-rl run",
        report.created,
        f"{duration(report.total_s)} in all" if report.total_s else "",
        f"{len(report.stages)} of {len(listed)} stages so far" if len(report.stages) < len(listed) else "",
        f"model {model}" if isinstance(model, str) else "",
        f"seed {seed}" if seed is not None else "",
    )
    line = "".join(f"<span>{escape(fact)}</span>" for fact in facts if fact)
    link = ""
    if report.dashboard and report.dashboard.startswith(("http://", "https://")):
        link = f'<span><a href="{escape(report.dashboard)}">Ray dashboard</a> (while the run is up)</span>'
    return f'<h1>{escape(report.name)}</h1><p class="facts">{line}{link}</p>'


def phase_of(stage_name: str) -> int:
    """Index into PHASES, len(PHASES) for a stage of none of them."""
    found = (index for index, names in enumerate(PHASES.values()) if stage_name in names)
    return next(found, len(PHASES))


def run_strip(report: Report) -> str:
    """The whole run as one strip, every stage as wide as it took long, linked to its section."""
    total = sum(stage.seconds for stage in report.stages)
    if not total:
        return ""
    segments = []
    for index, stage in enumerate(report.stages, start=1):
        width = 100 * stage.seconds / total
        fits = width / len(stage.name)  # per cent of the strip a letter may take: 1.1 on a page, 2.6 on a phone
        size = "short" if fits > 2.6 else "long"
        name = f'<span class="{size}">{escape(stage.name)}</span>' if fits > 1.1 else ""
        title = escape(f"{stage.name}: {duration(stage.seconds)}")
        segments.append(
            f'<a href="#stage-{index}" class="phase-{phase_of(stage.name)}" style="--w:{width:.3f}" title="{title}" '
            f'aria-label="{title}">{name}</a>'
        )
    phases = list(PHASES)
    present = sorted({phase_of(stage.name) for stage in report.stages})
    keys = "".join(
        f'<li class="phase-{phase}">{phases[phase] if phase < len(phases) else "other"} '
        f"<b>{duration(sum(s.seconds for s in report.stages if phase_of(s.name) == phase))}</b></li>"
        for phase in present
    )
    return f'<nav class="strip" aria-label="stages by time">{"".join(segments)}</nav><ul class="keys">{keys}</ul>'


def contents(report: Report, *, rollouts: bool = False) -> str:
    """The list of sections beside the page. `rollouts`: there are some."""
    items = ['<a href="#topology">Topology</a>'] if report.topology.get("actors") or report.actors else []
    items += [
        f'<a href="#stage-{index}" class="phase-{phase_of(stage.name)}">{escape(stage.title or stage.name)}</a>'
        for index, stage in enumerate(report.stages, start=1)
    ]
    items += ['<a href="#rollouts">Rollouts</a>'] if rollouts else []
    items += ['<a href="#samples">Answers side by side</a>'] if report.samples else []
    items += ['<a href="#timings">Timings</a>', '<a href="#environment">Environment</a>']
    return f'<nav class="contents" aria-label="contents">{"".join(items)}</nav>'


def stage_section(index: int, stage: StageResult, rows: Rows) -> str:
    """One stage: title, figures, charts from its metric `rows`, tables."""
    paper = f"<span>paper {escape(stage.paper)}</span>" if stage.paper else ""
    charts = "".join(chart(curve, stage.name, rows) for curve in stage.curves)
    charts = f'<div class="charts">{charts}</div>' if charts else ""
    tables = "".join(table(one) for one in stage.tables)
    return (
        f'<section class="stage phase-{phase_of(stage.name)}" id="stage-{index}"><header>'
        f'<h2>{escape(stage.title or stage.name)}</h2><p class="facts"><span>stage {index}, '
        f"<code>{escape(stage.name)}</code></span>{paper}<span>{duration(stage.seconds)}</span></p></header>"
        f"{figures(stage.figures)}{charts}{tables}</section>"
    )


def chart(curve: Curve, stage_name: str, rows: Rows) -> str:
    """A curve with its legend (name and last value of every line), drawn from the rows of its stage."""
    series = curve_series(curve, [row for row in rows if row["stage"] == stage_name])
    label = "seconds" if curve.x == "time" else curve.x
    said = "; ".join(f"{one.name}: last {number(_last(one))}" for one in series)
    svg = line_chart(series, x_label=label, description=f"{curve.title}. {said}")
    unit = f" <span>{escape(curve.unit)}</span>" if curve.unit else ""
    title = f"<figcaption>{escape(curve.title)}{unit}</figcaption>"
    if not svg:
        wanted = escape(", ".join(curve.y))
        missing = f"No values of {wanted} in metrics/{escape(stage_name)}.jsonl."
        return f'<figure class="plot">{title}<p class="none">{missing}</p></figure>'
    legend = "".join(
        f'<li style="--c:var(--series-{index % COLOURS})"><i></i>{escape(one.name)} <b>{_legend_value(one)}</b></li>'
        for index, one in enumerate(series)
    )
    smooth = any(len(one.x) >= SMOOTH_FROM for one in series)
    note = '<p class="note">Bold: running mean. Faint: the values themselves.</p>' if smooth else ""
    return f'<figure class="plot">{title}<ul class="legend">{legend}</ul>{svg}{note}</figure>'


def curve_series(curve: Curve, rows: Rows) -> list[Series]:
    """The lines of a curve: for each task and each column in `y` the rows that have both x and y, sorted by x."""
    tasks = curve.tasks or list(dict.fromkeys(str(row["task"]) for row in rows))
    start = min((row["time"] for row in rows), default=0.0) if curve.x == "time" else 0.0
    found = []
    for task in tasks:
        for column in curve.y:
            points = sorted(
                ((row[curve.x] - start, row[column]) for row in rows if _has(row, task, curve.x, column)),
                key=lambda point: point[0],
            )
            if points:
                name = column if len(tasks) == 1 else task if len(curve.y) == 1 else f"{task} · {column}"
                found.append(Series(name, [x for x, _ in points], [y for _, y in points]))
    return found


def _has(row: Mapping[str, Any], task: str, x: str, y: str) -> bool:
    return row["task"] == task and y in row and isinstance(row.get(x), int | float)


def _last(series: Series) -> float | None:
    return next((value for value in reversed(series.y) if value is not None), None)


def _legend_value(series: Series) -> str:
    last = _last(series)
    return "" if last is None else compact(last)


def samples_section(samples: Sequence[Sample]) -> str:
    """An overview (policies × prompts) and, for every prompt, all answers side by side."""
    if not samples:
        return ""
    kinds = list(dict.fromkeys(sample.kind for sample in samples if sample.kind))
    options = "".join(f'<option value="{escape(kind)}">{escape(kind)}</option>' for kind in kinds)
    choose = f'<label>Kind <select id="kind"><option value="">all</option>{options}</select></label>' if kinds else ""
    controls = (
        f'<form class="controls">{choose}<label><input type="checkbox" id="split"> '
        f'only where the policies disagree</label><output id="shown"></output></form>'
    )
    cards = "".join(_sample(index, sample) for index, sample in enumerate(samples, start=1))
    return (
        f'<section id="samples"><header><h2>Answers side by side</h2><p class="lead">The same prompts, answered '
        "by every policy of the run; those that answered alike share a column.</p></header>"
        f"{_overview(samples)}{controls}{cards}"
        "</section>"
    )


def _overview(samples: Sequence[Sample]) -> str:
    policies = list(dict.fromkeys(answer.policy for sample in samples for answer in sample.answers))
    lines = []
    for policy in policies:
        cells, passed, checked = "", 0, 0
        for index, sample in enumerate(samples, start=1):
            answer = next((answer for answer in sample.answers if answer.policy == policy), None)
            if answer is None:
                cells += "<i></i>"
                continue
            state, mark = _verdict(answer)
            checked += answer.passed is not None
            passed += answer.passed is True
            cells += f'<a class="{state}" href="#sample-{index}" title="prompt {index}: {state}">{mark}</a>'
        rate = f"{passed} / {checked}" if checked else number(None)
        lines.append(f'<div>{escape(policy)}</div><div class="rate">{rate}</div><div class="marks">{cells}</div>')
    return f'<div class="overview">{"".join(lines)}</div>'


def _verdict(answer: Answer) -> tuple[str, str]:
    return {True: ("pass", "✓"), False: ("fail", "✗"), None: ("unchecked", "·")}[answer.passed]


def _sample(index: int, sample: Sample) -> str:
    expected = f'<p class="expected">expected <code>{escape(sample.expected)}</code></p>' if sample.expected else ""
    kind = f'<span class="kind">{escape(sample.kind)}</span>' if sample.kind else ""
    alike: dict[tuple[str, bool | None], list[Answer]] = {}
    for answer in sample.answers:
        alike.setdefault((answer.text, answer.passed), []).append(answer)
    split = int(len({answer.passed for answer in sample.answers}) > 1)
    return (
        f'<article class="sample" id="sample-{index}" data-kind="{escape(sample.kind)}" data-split="{split}">'
        f'<div class="asked"><p class="by">prompt {index}{kind}</p><pre dir="auto">{escape(sample.prompt)}</pre>'
        f'{expected}</div><div class="answers">{"".join(map(_answer, alike.values()))}</div></article>'
    )


def _answer(alike: Sequence[Answer]) -> str:
    """One answer under the names of the policies that gave it."""
    state, mark = _verdict(alike[0])
    text = alike[0].text
    shown = f'<pre dir="auto">{escape(text)}</pre>' if text else '<p class="none">(empty)</p>'
    return (
        f'<div class="answer {state}"><p class="by"><span>{escape(", ".join(answer.policy for answer in alike))}</span>'
        f'<span class="chip {state}">{mark} {state}</span></p>{shown}</div>'
    )


def timings_section(report: Report, rows: Rows) -> str:
    """Where the time went: by stage, by actor as a share of the run, and inside the learner by job."""
    spent = sum(stage.seconds for stage in report.stages)
    total = max(report.total_s, spent)
    if not total:
        return ""
    entries = [(stage.title or stage.name, stage.seconds, phase_of(stage.name)) for stage in report.stages]
    if total - spent > 0.01 * total:
        entries.append(("between stages (start, hand-over, report)", total - spent, len(PHASES)))
    longest = max(seconds for _, seconds, _ in entries)
    stages = "".join(
        f'<div class="phase-{phase}"><span class="who">{escape(name)}</span>{bar(seconds / longest)}'
        f'<span class="much">{duration(seconds)}</span><span class="much">{share(seconds / total)}</span></div>'
        for name, seconds, phase in entries
    )
    actors = "".join(
        f'<div><span class="who">{escape(actor.name)} <small>{escape(actor.role)}</small></span>'
        f'{bar(actor.busy_s / total)}<span class="much">{duration(actor.busy_s)}</span>'
        f'<span class="much">{actor.calls:,} calls</span>'
        f'<span class="much">{"" if actor.peak_mib is None else mebibytes(actor.peak_mib)}</span></div>'
        for actor in sorted(report.actors, key=lambda actor: -actor.busy_s)
    )
    busy = f'<h3>Actors: busy time as a share of the run</h3><div class="bars actors">{actors}</div>' if actors else ""
    engines = _engines(rows, {stage.name for stage in report.stages})
    return (
        f'<section id="timings"><header><h2>Timings</h2></header><h3>Stages</h3>'
        f'<div class="bars stages">{stages}</div>{busy}{_learner_time(rows)}{engines}</section>'
    )


def _learner_time(rows: Rows) -> str:
    """The last goodput row of every job of the learner, as a table."""
    jobs = {row["task"]: row for row in rows if row["stage"] == GOODPUT_STAGE}
    if not jobs:
        return ""
    kinds = [name for name in next(iter(jobs.values())) if name.endswith("_s")]
    return table(
        Table(
            title="Learner: seconds of each job, by what they went into",
            columns=["job", "goodput, %", *(kind.removesuffix("_s").replace("_", " ") for kind in kinds)],
            rows=[
                [task, round(100 * row["goodput"], 1), *(round(row[kind], 2) for kind in kinds)]
                for task, row in jobs.items()
            ],
            note="goodput is the share of steps; compiling is taken off the step it happened in",
        )
    )


def _engines(rows: Rows, stages: Collection[str]) -> str:
    """What the engine of every sampler did in every stage, as a table; the rows of single iterations are for the curves."""
    done = [(*row["task"].split("/", 1), row) for row in rows if row["stage"] == ENGINE_STAGE and "/" in row["task"]]
    lines = [(stage, actor, row) for stage, actor, row in done if stage in stages]
    if not lines:
        return ""
    return table(
        Table(
            title="Samplers and committee: what their engines did, by stage",
            columns=[
                "stage",
                "actor",
                "tokens",
                "tokens/s",
                "rows used, %",
                "from cache, %",
                "queue",
                "preempted",
                "programs",
            ],
            rows=[
                [
                    stage,
                    actor,
                    row["response_tokens"],
                    _rounded(row.get("tokens_per_s"), 0),
                    _rounded(row.get("batch_occupancy"), 1, scale=100),
                    _rounded(row.get("cache_hit_rate"), 1, scale=100),
                    _rounded(row.get("queue_depth"), 1),
                    row["preemptions"],
                    row["compiled_programs"],
                ]
                for stage, actor, row in lines
            ],
            note="tokens a second of an engine's own steps; its queue at a step in requests; a resumed stage: its last part",
        )
    )


def _rounded(value: float | None, digits: int, *, scale: float = 1) -> float | None:
    return None if value is None else round(scale * value, digits)


def environment_section(report: Report, topology_text: str) -> str:
    """Machine and versions, and the topology file as resolved."""
    items = "".join(
        f"<div><dt>{escape(str(key))}</dt><dd>{escape(_plain(value))}</dd></div>"
        for key, value in report.environment.items()
    )
    listing = f"<dl>{items}</dl>" if items else ""
    source = (
        f"<details><summary>topology.yaml, as resolved</summary><pre>{escape(topology_text)}</pre></details>"
        if topology_text
        else ""
    )
    return f'<section id="environment"><header><h2>Environment</h2></header>{listing}{source}</section>'


def _plain(value: Any) -> str:
    return number(value) if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)
