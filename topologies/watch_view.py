"""How `afm-rl watch` looks: a `View` as rich tables and lines, from 80 columns on.

Everything that comes from the run (names, messages) is plain text, never markup or control codes of the terminal's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from topologies.report_html import compact, duration, mebibytes, number, share
from topologies.watch_data import Job, Row, View

#: Actors listed by name, and jobs and messages shown, at most.
ACTORS, JOBS, MESSAGES = 24, 3, 4
#: From so many columns on there is room for what is less asked for.
WIDE = 120
#: Seconds of an iteration that are worth a line, and what they are called.
TIMES = {
    "generate_s": "generate",
    "reward_s": "reward",
    "update_s": "update",
    "publish_s": "publish",
    "learner_wait_s": "learner waits",
    "sampler_wait_s": "samplers wait",
}
_STATES = {
    "running": ("running", "green"),
    "finished": ("finished", "green"),
    "ended": ("stopped before its end", "yellow"),
    "failed": ("failed", "red"),
    "lost": ("no sign of life", "red"),
    "unknown": ("not launched", "yellow"),
}
_ACTOR_COLOURS = {"working": "green", "silent": "red", "restarting": "yellow", "dead": "red", "starting": "yellow"}
_BLOCKS, _ASCII_BLOCKS = "▁▂▃▄▅▆▇█", ".:-=+*#@"


def frame(view: View, *, console: Console) -> RenderableType:
    """One look as something to print on `console`, whose width decides how much of it is shown."""
    width, ascii_only = console.width, console.options.ascii_only
    online = [job for job in view.jobs if job.online]
    others = [job for job in view.jobs if not job.online and job.rows][: 1 if online else JOBS]
    parts: list[RenderableType] = [*_head(view), _stages(view, width)]
    parts += [part for job in online[:JOBS] for part in _online(job, view, width=width, ascii_only=ascii_only)]
    parts += [part for job in others for part in _other(job, view, width=width, ascii_only=ascii_only)]
    if actors := view.live.get("actors"):
        parts += [_rule("actors" if view.state == "running" else "actors, when last heard of"), _actors(actors, view, width)]
    if messages := view.live.get("messages"):
        parts += [_rule("last warnings and errors"), *map(_message, messages[-MESSAGES:])]
    return Group(*parts)


def sparkline(values: Sequence[float | None], width: int, *, ascii_only: bool = False) -> str:
    """The values, oldest first, in at most `width` characters, from their lowest to their highest; a gap for None."""
    blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
    size = max(1, -(-len(values) // max(1, width)))
    means = [_mean(values[at : at + size]) for at in range(0, len(values), size)]
    known = [mean for mean in means if mean is not None]
    if not known:
        return ""
    low, span = min(known), (max(known) - min(known)) or 1.0
    return "".join(" " if m is None else blocks[min(7, int(8 * (m - low) / span))] for m in means)


def plain(text: object) -> str:
    """Text of the run on one line, without anything that a terminal would act on."""
    return "".join(char if char.isprintable() else "�" for char in " ".join(str(text).split()))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _rule(title: str) -> Rule:
    return Rule(Text(title), align="left", style="dim")


def _head(view: View) -> list[RenderableType]:
    said, colour = _STATES[view.state]
    live, line = view.live, Text(no_wrap=False)
    line.append(plain(view.name), style="bold").append("  ")
    line.append(said, style=f"bold {colour}")
    if view.state == "lost" and view.age_s is not None:
        line.append(f" for {duration(view.age_s)}", style=f"bold {colour}")
    if "pid" in live:
        line.append(f"  {plain(live.get('host'))}, process {live['pid']}, {plain(live.get('launcher'))}", style="dim")
    if live.get("started") and live.get("written"):
        line.append(f", {duration(max(0.0, live['written'] - live['started']))}", style="dim")
    parts: list[RenderableType] = [line]
    if view.why:
        parts.append(Text(plain(view.why), style=colour))
    if live.get("dashboard") and view.state == "running":
        parts.append(Text(f"Ray dashboard {plain(live['dashboard'])}", style="dim"))
    return parts


def _stages(view: View, width: int) -> Text:
    marks = {"done": ("✓", "green"), "current": ("▶", "bold"), "waiting": ("·", "dim")}
    items = []
    for stage in view.stages:
        mark, style = marks[stage.state]
        took = f" {duration(stage.seconds)}" if stage.seconds is not None else ""
        items.append(Text(f"{mark} {plain(stage.name)}{took}", style=style))
    return _lines(items, width)


def _lines(items: Sequence[Text], width: int) -> Text:
    """The items one after the other, each whole, on as many lines as they need."""
    lines: list[list[Text]] = [[]]
    for item in items:
        if lines[-1] and sum(len(one) + 2 for one in lines[-1]) + len(item) > width:
            lines.append([])
        lines[-1].append(item)
    return Text("\n").join(Text("  ").join(line) for line in lines)


def _online(job: Job, view: View, *, width: int, ascii_only: bool) -> Iterable[RenderableType]:
    """Title with how far it is, the figures in pairs with their sparklines, what waits where, and where the time goes."""
    row: Row = job.rows[-1] if job.rows else {}
    yield _rule(_title(job, view))
    wide = max(8, min(40, (width - 58) // 2 + 4))
    grid = Table.grid(padding=(0, 1))
    for _ in range(2):
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(justify="right", no_wrap=True)
        grid.add_column(style="cyan", no_wrap=True, min_width=wide + 1)
    figures = [
        ("reward", "reward"),
        ("KL to reference", "kl_to_reference"),
        ("accuracy", "accuracy"),
        ("KL to pi_k", "kl_to_behavior"),
        ("tokens/s", "tokens_per_s"),
        ("staleness", "staleness_mean"),
    ]
    cells = [
        (label, _value(row.get(key)), sparkline(_column(job, key), wide, ascii_only=ascii_only)) for label, key in figures
    ]
    for left, right in zip(cells[::2], cells[1::2], strict=True):
        grid.add_row(*left, *right)
    yield grid
    yield _queues(job, row, width)
    times = [f"{name} {number(round(row[key], 2))}" for key, name in TIMES.items() if row.get(key) is not None]
    if times:
        yield _lines([Text("seconds an iteration:", style="dim"), *(Text(time, style="dim") for time in times)], width)


def _queues(job: Job, row: Row, width: int) -> Text:
    synced = row.get("weights_in_sync")
    said, style = ("", "") if synced is None else ("in sync", "green") if synced >= 1 else ("NOT in sync", "bold red")
    items = [Text("weights ").append(said, style=style)] if said else []
    items.append(Text(f"queue {_value(row.get('queue_depth'))}"))
    if row.get("staleness_max") is not None:
        items.append(Text(f"staleness at most {_value(row['staleness_max'])}"))
    if job.groups is not None:
        shown = {"issued": "under way", "finished": "finished", "consumed": "consumed"}
        counted = ", ".join(f"{job.groups.get(event, 0):,} {name}" for event, name in shown.items())
        items.append(Text(f"groups: {counted}"))
    return _lines(items, width)


def _title(job: Job, view: View) -> str:
    bar = next((bar for bar in view.live.get("bars", ()) if bar.get("name") == job.task), None)
    title = plain(job.task) + (f" ({plain(job.stage)})" if job.stage not in ("", job.task) else "")
    if bar is None or view.state != "running":
        return f"{title}: {'step' if not job.online else 'iteration'} {job.rows[-1]['step']}" if job.rows else title
    done, total = bar.get("done", 0), bar.get("total", 0)
    pace_s = _pace(job.rows)
    left = f", about {duration((total - done) * pace_s)} left" if pace_s is not None and total > done else ""
    return f"{title}: {done:,} of {total:,}{left}"


def _pace(rows: Sequence[Row]) -> float | None:
    """Seconds a step of the last few took."""
    last = rows[-20:]
    steps = last[-1]["step"] - last[0]["step"] if last else 0
    return (last[-1]["time"] - last[0]["time"]) / steps if steps > 0 else None


def _other(job: Job, view: View, *, width: int, ascii_only: bool) -> Iterable[RenderableType]:
    """One line for a job that trains on given data: its loss, or its first number."""
    row = job.rows[-1]
    names = [name for name in row if name not in ("stage", "task", "step", "time")]
    key = "loss" if "loss" in row else next(iter(names), None)
    if key is not None:
        yield _rule(_title(job, view))
        line = Text(f"{plain(key)} ", style="dim").append(_value(row.get(key)), style="default").append(" ")
        yield line.append(sparkline(_column(job, key), width // 2, ascii_only=ascii_only), style="cyan")


def _column(job: Job, key: str) -> list[float | None]:
    return [row.get(key) for row in job.rows]


def _value(value: Any) -> str:
    if isinstance(value, float) and abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if isinstance(value, float) else number(value)


def _actors(rows: Sequence[Mapping[str, Any]], view: View, width: int) -> RenderableType:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    names = ["actor", "state", "busy", "version", "memory", "restarts"]
    names += ["running", "tokens/s", "peak", "calls", "where"] if width >= WIDE else []
    for name in names:
        flush = "left" if name in ("actor", "state", "where") else "right"
        table.add_column(name, justify=flush, no_wrap=name != "state", overflow="ellipsis")
    troubled = [row for row in rows if row.get("state") in ("silent", "dead", "restarting")]
    shown = list(rows)[:ACTORS] if len(rows) <= ACTORS else [*troubled, *(r for r in rows if r not in troubled)][:ACTORS]
    for row in shown:
        table.add_row(*_actor(row, view, wide=width >= WIDE))
    if len(shown) == len(rows):
        return table
    left = [row.get("state") for row in rows if row not in shown]
    return Group(table, Text(f"and {len(left)} more: " + ", ".join(f"{left.count(s)} {s}" for s in dict.fromkeys(left))))


def _actor(row: Mapping[str, Any], view: View, *, wide: bool) -> list[RenderableType]:
    state, name, engine = plain(row.get("state", "")), plain(row.get("name", "")), row.get("engine") or {}
    said = f"{state} {duration(row['silent_s'])}" if "silent_s" in row else state
    restarts, busy, version = row.get("restarts", 0), row.get("busy_share"), engine.get("version", -1)
    cells: list[RenderableType] = [
        Text(name),
        Text(said, style=_ACTOR_COLOURS.get(state, "dim")),
        share(busy) if busy is not None else "",
        str(version) if version >= 0 else "",
        mebibytes(row["mib"]) if "mib" in row else "",
        Text(str(restarts), style="yellow" if restarts else "dim"),
    ]
    if not wide:
        return cells
    running = f"{engine['running']} + {engine['waiting']}" if engine else ""
    speed = view.engines.get(name, {}).get("tokens_per_s")
    where = f"{plain(row['host'])}:{row['pid']}" if "pid" in row else ""
    peak, calls = mebibytes(row["peak_mib"]) if "peak_mib" in row else "", compact(row["calls"]) if "calls" in row else ""
    return [*cells, running, f"{speed:,.0f}" if speed else "", peak, calls, Text(where, style="dim")]


def _message(message: Mapping[str, Any]) -> Text:
    level = plain(message.get("level", ""))
    at = datetime.fromtimestamp(message.get("time", 0)).strftime("%H:%M:%S")
    line = Text(f"{at} ", style="dim").append(level.lower(), style="red" if level in ("ERROR", "CRITICAL") else "yellow")
    return line.append(f" {plain(message.get('source', ''))}: ", style="dim").append(plain(message.get("text", "")))
