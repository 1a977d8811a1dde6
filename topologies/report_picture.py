"""The topology as a picture: the four floors of the house, the stages on top, the actors and the online loop below.

Drawn twice from the same description, wide for a page and narrow for a phone; the style sheet shows the one that fits.
Every box carries what the topology asks for (replicas, CPUs) and, below, how busy the run kept it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from topologies.report_data import Report
from topologies.report_html import escape, mebibytes, number, share

#: What stands on the two lower floors, by package.
FLOOR_2 = ("tokenizer training", "Soft-Top-K pruning", "palettization", "bit allocation", "recovery", "package")
FLOOR_1 = ("model", "tokenizer", "objectives", "optimizer", "generation", "checkpoints", "worlds")
#: The nodes of the loop that are not roles of their own in a topology file.
LOOP_DATA = {"prompts": "prompts", "buffer": "group buffer", "weights": "weight store"}
Route = Literal["across", "vertical", "over", "gutter", "margin"]


class _Point(NamedTuple):
    x: float
    y: float


class Edge(NamedTuple):
    """What flows between two nodes."""

    source: str
    target: str
    carries: str


EDGES = (
    Edge("prompts", "sampler", ""),
    Edge("sampler", "reward", "groups"),
    Edge("reward", "buffer", "scored"),
    Edge("buffer", "learner", "batch"),
    Edge("learner", "weights", "publish"),
    Edge("weights", "sampler", "weights k + 1"),
    Edge("committee", "annotator", "pairs"),
    Edge("annotator", "reward", "preferences"),
    Edge("learner", "quantizer", "policies"),
    Edge("quantizer", "server", "package"),
)
LOOP = {"prompts", "sampler", "reward", "buffer", "learner", "weights"}


@dataclass(frozen=True)
class _Layout:
    """Where boxes go: `slots` gives each node's (column, row); sizes in pixels of the drawing."""

    name: str
    width: int
    column_xs: tuple[int, ...]
    row_ys: tuple[int, ...]
    box: tuple[int, int]
    slots: Mapping[str, tuple[int, int]]
    spare: tuple[tuple[int, int], ...]
    routes: Mapping[tuple[str, str], Route]


_WIDE = _Layout(
    name="wide",
    width=1000,
    column_xs=(16, 186, 357, 527, 698, 868),
    row_ys=(74, 196, 290),
    box=(116, 70),
    slots={
        "prompts": (0, 0),
        "sampler": (1, 0),
        "reward": (2, 0),
        "buffer": (3, 0),
        "learner": (4, 0),
        "weights": (5, 0),
        "committee": (1, 1),
        "annotator": (2, 1),
        "quantizer": (4, 1),
        "server": (5, 1),
    },
    spare=((0, 1), (3, 1), *((column, 2) for column in range(6))),
    routes={("weights", "sampler"): "over"},
)
_NARROW = _Layout(
    name="narrow",
    width=360,
    column_xs=(14, 194),
    row_ys=(44, 148, 252, 356, 460, 564, 668),
    box=(134, 70),
    slots={
        "prompts": (0, 0),
        "weights": (1, 0),
        "sampler": (0, 1),
        "learner": (1, 1),
        "reward": (0, 2),
        "buffer": (1, 2),
        "annotator": (0, 3),
        "quantizer": (1, 3),
        "committee": (0, 4),
        "server": (1, 4),
    },
    spare=tuple((column, row) for row in (5, 6) for column in (0, 1)),
    routes={("weights", "sampler"): "gutter", ("learner", "quantizer"): "margin"},
)


def topology_picture(report: Report, stage_names: Sequence[str]) -> str:
    """Two `<svg>` drawings of the topology; of `stage_names`, in order, those with results link to their section."""
    return "".join(_draw(layout, report, stage_names) for layout in (_WIDE, _NARROW))


@dataclass(frozen=True)
class _Floor:
    """What is drawn on one floor, and its height."""

    svg: str
    height: int


def _draw(layout: _Layout, report: Report, stage_names: Sequence[str]) -> str:
    done = {stage.name: f"stage-{index}" for index, stage in enumerate(report.stages, start=1)}
    loop_note = "the online loop runs along the top" if layout is _WIDE else "the online loop runs on top"
    parts, y = [], 0
    for number_, name, note, floor in (
        (4, "topologies", "the stages, in order", _chips(layout, stage_names, done, arrows=True)),
        (3, "actors", loop_note, _actors(layout, report)),
        (2, "pretrain, quant", "", _chips(layout, FLOOR_2, {})),
        (1, "afm_rl", "arrays in, arrays out, no Ray", _chips(layout, FLOOR_1, {})),
    ):
        parts.append(
            f'<g transform="translate(0 {y})" style="--f:var(--floor-{number_})">'
            f'<rect class="floor" x="0.5" y="0.5" width="{layout.width - 1}" height="{floor.height - 1}" rx="7"/>'
            f'<text class="floor-name" x="16" y="23">{number_}  {name}'
            f'<tspan class="floor-note" dx="10">{note}</tspan></text>{floor.svg}</g>'
        )
        y += floor.height + 8
    label = "The topology on its four floors: stages, actors with the online loop, libraries"
    return (
        f'<svg class="picture {layout.name}" viewBox="0 0 {layout.width} {y - 8}" role="img" aria-label="{label}">'
        f"<defs>{_arrow_head(layout, 'loop')}{_arrow_head(layout, 'side')}</defs>{''.join(parts)}</svg>"
    )


def _arrow_head(layout: _Layout, kind: str) -> str:
    size = 11 if kind == "loop" else 9
    return (
        f'<marker id="{kind}-{layout.name}" class="{kind}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="{size}" '
        f'markerHeight="{size}" markerUnits="userSpaceOnUse" orient="auto" style="--f:var(--floor-3)">'
        f'<path d="M0 0.6L7.4 4L0 7.4z"/></marker>'
    )


def _chips(layout: _Layout, texts: Sequence[str], links: Mapping[str, str], arrows: bool = False) -> _Floor:
    """Texts in rounded boxes, wrapped to the layout's width; with `arrows` in order, those without a link waiting."""
    parts, x, y = [], 16.0, 36
    for index, text in enumerate(texts):
        width = 7.1 * len(text) + 18
        if x + width > layout.width - 12:
            x, y = 16.0, y + 32
        elif arrows and index:
            parts.append(f'<path class="chevron" d="M{x - 10:.0f} {y + 8}l4 4.5l-4 4.5"/>')
        kind = "chip" if text in links or not arrows else "chip waiting"
        chip = (
            f'<rect class="{kind}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="25" rx="5"/>'
            f'<text class="chip-text" x="{x + width / 2:.1f}" y="{y + 17}">{escape(text)}</text>'
        )
        parts.append(f'<a href="#{links[text]}">{chip}</a>' if text in links else chip)
        x += width + (16 if arrows else 8)
    return _Floor("".join(parts), y + 37)


def _actors(layout: _Layout, report: Report) -> _Floor:
    configured: Mapping[str, Any] = report.topology.get("actors") or {}
    roles = list(dict.fromkeys([*configured, *(actor.role for actor in report.actors)]))
    if {"sampler", "learner"} <= set(roles):
        roles += [name for name in LOOP_DATA if name not in roles]
    slots = {role: layout.slots[role] for role in roles if role in layout.slots}
    slots |= dict(zip([role for role in roles if role not in slots], layout.spare, strict=False))
    boxes = {
        role: _Box(layout.column_xs[column], layout.row_ys[row], *layout.box, _facts(role, configured.get(role), report))
        for role, (column, row) in slots.items()
    }
    drawn = [_edge(layout, boxes, edge) for edge in EDGES if edge.source in boxes and edge.target in boxes]
    drawn += [_draw_box(box, role) for role, box in boxes.items()]
    return _Floor("".join(drawn), max((box.y + box.height for box in boxes.values()), default=18) + 20)


@dataclass(frozen=True)
class _Facts:
    replicas: int
    lines: tuple[str, ...]
    busy: float | None  # of the run's time, mean over replicas


def _facts(role: str, spec: Any, report: Report) -> _Facts:
    """What a role asks for by the topology (`spec`), and what its actors used by the report."""
    spec = spec if isinstance(spec, Mapping) else {}
    used = [actor for actor in report.actors if actor.role == role]
    replicas = int(spec.get("replicas") or spec.get("processes") or max(1, len(used)))
    cpus = spec.get("num_cpus", used[0].num_cpus if used else None)
    asked = [f"{number(cpus)} CPU"] if cpus is not None else []
    asked += [f"{number(spec['num_gpus'])} GPU"] if spec.get("num_gpus") else []
    resources = " + ".join(asked)
    if replicas > 1:
        resources = f"{replicas} × {resources}" if asked else f"{replicas} replicas"
    peak = max((actor.peak_mib for actor in used if actor.peak_mib), default=None)
    busy = sum(actor.busy_s for actor in used) / len(used) / report.total_s if used and report.total_s else None
    lines = (
        _joined(str(spec.get("kind") or ""), resources),
        _joined(mebibytes(peak) if peak else "", f"{share(busy)} busy" if busy is not None else ""),
    )
    return _Facts(replicas, tuple(line for line in lines if line), busy)


def _joined(*parts: str) -> str:
    return " · ".join(part for part in parts if part)


@dataclass(frozen=True)
class _Box:
    """A role's rectangle, and what is written in it."""

    x: int
    y: int
    width: int
    height: int
    facts: _Facts

    @property
    def cards(self) -> int:
        """Cards drawn behind the front one, each 4 pixels further up and right."""
        return min(self.facts.replicas, 3) - 1

    @property
    def middle_x(self) -> float:
        return self.x + self.width / 2

    @property
    def middle_y(self) -> float:
        return self.y + self.height / 2


def _draw_box(box: _Box, role: str) -> str:
    lines = box.facts.lines
    passive = " passive" if role in LOOP_DATA and not lines else ""
    parts = [
        f'<rect class="box{passive}" x="{box.x + 4 * behind}" y="{box.y - 4 * behind}" width="{box.width}" '
        f'height="{box.height}" rx="6"/>'
        for behind in range(box.cards, -1, -1)
    ]
    top = box.middle_y + 5 - 8 * len(lines)
    parts.append(f'<text class="role" x="{box.middle_x}" y="{top}">{escape(LOOP_DATA.get(role, role))}</text>')
    for index, line in enumerate(lines, start=1):
        parts.append(f'<text class="fact" x="{box.middle_x}" y="{top + 1 + 15 * index}">{escape(line)}</text>')
    if box.facts.busy is not None:
        at = f'x="{box.x + 8}" y="{box.y + box.height - 7}" height="3" rx="1.5"'
        filled = (box.width - 16) * min(1.0, box.facts.busy)
        parts.append(f'<rect class="track" {at} width="{box.width - 16}"/>')
        parts.append(f'<rect class="busy" {at} width="{filled:.1f}"/>')
    return f"<g>{''.join(parts)}</g>"


def _edge(layout: _Layout, boxes: Mapping[str, _Box], edge: Edge) -> str:
    a, b = boxes[edge.source], boxes[edge.target]
    route = layout.routes.get((edge.source, edge.target), "across" if a.y == b.y else "vertical")
    a_right, b_top, b_right = a.x + a.width + 4 * a.cards, b.y - 4 * b.cards - 3, b.x + b.width + 4 * b.cards + 3
    label, anchor = edge.carries, "middle"
    points: list[_Point]
    if route == "across":
        points = [_Point(a_right, a.middle_y), _Point(b.x - 3, b.middle_y)]
        text = _Point((a_right + b.x) / 2 - 2, a.middle_y - 7)
    elif route == "vertical":
        start, end = (a.y + a.height, b_top) if b.y > a.y else (a.y - 4 * a.cards, b.y + b.height + 3)
        points = [_Point(a.middle_x, start), _Point(a.middle_x, end)]
        text, anchor = _Point(a.middle_x + 8, (start + end) / 2 + 4), "start"
    elif route == "over":
        level = a.y - 26
        points = [
            _Point(a.middle_x, a.y),
            _Point(a.middle_x, level),
            _Point(b.middle_x, level),
            _Point(b.middle_x, b_top),
        ]
        text = _Point((a.middle_x + b.middle_x) / 2, level - 7)
    else:
        lane, start = ((a.x + b_right) / 2, a.x) if route == "gutter" else (layout.width - 14, a_right)
        corners = [_Point(lane, a.middle_y), _Point(lane, b.middle_y)]
        points = [_Point(start, a.middle_y), *corners, _Point(b_right, b.middle_y)]
        text = _Point(lane, a.middle_y - 7)
        if route == "gutter":
            label = "k + 1"  # the lane is too narrow for more
        else:
            text, anchor = _Point(lane - 6, b.y - 14), "end"
    kind = "loop" if edge.source in LOOP and edge.target in LOOP else "side"
    path = f'<path class="flow {kind}" d="{_rounded(points)}" marker-end="url(#{kind}-{layout.name})"/>'
    said = f'<text class="flows" text-anchor="{anchor}" x="{text.x:.0f}" y="{text.y:.0f}">{label}</text>' if label else ""
    return path + said


def _rounded(points: Sequence[_Point], radius: float = 9) -> str:
    """A polyline of horizontal and vertical runs as a path with rounded corners."""
    path = f"M{points[0].x:.1f} {points[0].y:.1f}"
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        enter, leave = _towards(corner, before, radius), _towards(corner, after, radius)
        path += f"L{enter.x:.1f} {enter.y:.1f}Q{corner.x:.1f} {corner.y:.1f} {leave.x:.1f} {leave.y:.1f}"
    return path + f"L{points[-1].x:.1f} {points[-1].y:.1f}"


def _towards(start: _Point, end: _Point, distance: float) -> _Point:
    length = abs(end.x - start.x) + abs(end.y - start.y)
    part = min(distance, length / 2) / length if length else 0.0
    return _Point(start.x + (end.x - start.x) * part, start.y + (end.y - start.y) * part)
