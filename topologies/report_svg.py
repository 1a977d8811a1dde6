"""Line charts as inline SVG, drawn without a plotting library and readable in both colour schemes.

A chart is sized for a phone's column (its letters stay legible at 340 pixels) and set two abreast on a wide page. Long
series are thinned to what a screen can show, keeping each interval's extremes, and drawn faint with their running mean
on top. The numbers under the pointer come from the same points, carried in `data-chart` as JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from topologies.report_html import compact, escape

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 12, 34
MAX_POINTS = 240  # per series: about two a pixel on a phone
SMOOTH_FROM = 60  # shorter series are drawn as they are
COLOURS = 8


@dataclass(frozen=True)
class Series:
    """One line: equally long `x` and `y`; None in `y` (a value that was not finite) breaks the line."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten apart) within [low, high]; high > low."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def thin(series: Series, limit: int = MAX_POINTS) -> Series:
    """At most about `limit` points: of each run of rows the lowest and the highest, the ends and every gap's start."""
    count = len(series.x)
    if count <= limit:
        return series
    bucket = math.ceil(2 * count / limit)
    kept = {0, count - 1}
    for start in range(0, count, bucket):
        rows = range(start, min(start + bucket, count))
        known = [(value, row) for row in rows if (value := series.y[row]) is not None]
        if known:
            kept |= {min(known)[1], max(known)[1]}
        kept |= {next(row for row in rows if series.y[row] is None)} if len(known) < len(rows) else set()
    rows_kept = sorted(kept)
    return Series(series.name, [series.x[row] for row in rows_kept], [series.y[row] for row in rows_kept])


def running_mean(series: Series) -> Series:
    """Centred mean over 1/20 of the series (at the ends over what there is); None counts for nothing."""
    half = max(1, len(series.y) // 40)
    means: list[float | None] = []
    for row in range(len(series.y)):
        around = [value for value in series.y[max(0, row - half) : row + half + 1] if value is not None]
        means.append(sum(around) / len(around) if around else None)
    return Series(series.name, series.x, means)


def line_chart(series: Sequence[Series], *, x_label: str, description: str) -> str:
    """One chart of `series` (colours by position). Returns an `<svg>`, or "" when no series has a point."""
    drawn = [one for one in series if any(value is not None for value in one.y)]
    if not drawn:
        return ""
    frame = _Frame.around(drawn)
    parts = [_grid(frame, x_label)]
    for colour, one in ((colour, one) for colour, one in enumerate(series) if one in drawn):
        style = f"--c:var(--series-{colour % COLOURS})" + (";stroke-dasharray:5 3" if colour >= COLOURS else "")
        if len(one.x) >= SMOOTH_FROM:
            parts.append(f'<path class="line faint" style="{style}" d="{_path(frame, thin(one))}"/>')
            parts.append(f'<path class="line" style="{style}" d="{_path(frame, thin(running_mean(one)))}"/>')
        else:
            parts.append(f'<path class="line" style="{style}" d="{_path(frame, one)}"/>')
            if len(one.x) <= 12:
                parts += [_dot(frame, x, y, style) for x, y in zip(one.x, one.y, strict=True) if y is not None]
    parts.append('<g class="cursor"><line/><g class="dots"></g></g>')
    data = escape(json.dumps(frame.data(series, x_label), separators=(",", ":")))
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}" '
        f'data-chart="{data}">{"".join(parts)}</svg>'
    )


@dataclass(frozen=True)
class _Frame:
    """The data window of a chart and its map to pixels."""

    x0: float
    x1: float
    y0: float
    y1: float

    @classmethod
    def around(cls, series: Sequence[Series]) -> _Frame:
        xs = [x for one in series for x in one.x]
        ys = [y for one in series for y in one.y if y is not None]
        x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
        if x1 == x0:
            x0, x1 = x0 - 1, x1 + 1
        if 0 <= y0 <= 0.4 * y1:
            y0 = 0.0  # near enough: show the true proportions
        margin = 0.06 * (y1 - y0) or abs(y1) * 0.1 or 1.0
        return cls(x0, x1, y0 if y0 == 0 < y1 else y0 - margin, y1 + margin)

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)

    def data(self, series: Sequence[Series], x_label: str) -> dict[str, object]:
        """What the page's script needs to find and show the values under the pointer."""
        lines = []
        for colour, one in enumerate(series):
            few = thin(one)
            lines.append(
                {
                    "name": one.name,
                    "colour": colour % COLOURS,
                    "x": [_short(x) for x in few.x],
                    "y": [None if y is None else _short(y) for y in few.y],
                }
            )
        window = [_short(value) for value in (self.x0, self.x1, self.y0, self.y1)]
        return {"window": window, "box": [LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM, TOP], "x": x_label, "series": lines}


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _grid(frame: _Frame, x_label: str) -> str:
    parts = []
    for value in ticks(frame.y0, frame.y1, 4):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 7}" y="{y + 4:.1f}">{compact(value)}</text>')
    floor = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    for value in ticks(frame.x0, frame.x1, 5):
        x = frame.x(value)
        if x < WIDTH - RIGHT - 8 - 6 * len(x_label):  # the axis' own name stands at the right end
            parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 4}"/>')
            parts.append(f'<text class="tick middle" x="{x:.1f}" y="{floor + 18}">{compact(value)}</text>')
    parts.append(f'<text class="tick end name" x="{WIDTH - RIGHT}" y="{floor + 18}">{escape(x_label)}</text>')
    return "".join(parts)


def _path(frame: _Frame, series: Series) -> str:
    commands, pen = [], "M"
    for x, y in zip(series.x, series.y, strict=True):
        if y is None:
            pen = "M"
        else:
            commands.append(f"{pen}{frame.x(x):.1f} {frame.y(y):.1f}")
            pen = "L"
    return "".join(commands)


def _dot(frame: _Frame, x: float, y: float, style: str) -> str:
    return f'<circle class="dot" style="{style}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3"/>'
