"""The small parts of the report's page: escaping, number formats, figures, tables, bars.

Everything that enters the page goes through `escape` exactly once, where it is put between tags. Model text may hold
anything: control characters are shown as their pictures, lone surrogates as a question mark.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence

from topologies.report_data import Cell, Figure, Table

_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
MISSING = "–"
_NUMBER_TEXT = re.compile(r"[-−+±]?[\d.,]+\s?\S{0,4}")  # "71 %", "1.5x", "−0.3 nats"


def escape(text: str) -> str:
    """`text` safe between tags and inside quoted attributes, every character visible and encodable in UTF-8."""
    shown = text.replace("\r\n", "\n").translate(_PICTURES)
    return html.escape(shown.encode("utf-8", "replace").decode("utf-8"), quote=True)


def number(value: Cell) -> str:
    """A cell as plain text: four significant digits, thousands separated, a real minus sign; text stays as it is."""
    match value:
        case None:
            return MISSING
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}".replace("-", "−")
        case float():
            return _float(value)
        case _:
            return value


def _float(value: float) -> str:
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    size = abs(value)
    if size >= 1000:
        text = f"{value:,.0f}"
    elif size >= 1e-3 or size == 0:
        text = f"{value:.4g}"
    else:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return text.replace("-", "−")


def compact(value: float) -> str:
    """A number for an axis or a legend: 12k, 3.4M, 2e−4."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.4g}{suffix}".replace("-", "−")
    return _float(value)


def duration(seconds: float) -> str:
    """Seconds as people say them: 0.42 s, 12.3 s, 4 min 05 s, 1 h 12 min."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s" if minutes < 60 else "1 h 00 min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def mebibytes(mib: float) -> str:
    """An amount of memory given in MiB: 942 MiB, 1.9 GiB."""
    return f"{mib:.0f} MiB" if mib < 1000 else f"{mib / 1024:.1f} GiB"


def figures(items: Sequence[Figure], kind: str = "") -> str:
    """A row of figures: label, large value with its unit, note."""
    if not items:
        return ""
    cells = []
    for item in items:
        unit = f' <span class="unit">{escape(item.unit)}</span>' if item.unit else ""
        note = f'<p class="note">{escape(item.note)}</p>' if item.note else ""
        said = number(item.value)
        size = " words" if len(said) > 14 else " long" if len(said) > 9 else ""
        value = f'<p class="value{size}">{escape(said)}{unit}</p>'
        cells.append(f'<div class="figure"><p class="label">{escape(item.label)}</p>{value}{note}</div>')
    return f'<div class="figures {kind}">{"".join(cells)}</div>'


def table(data: Table) -> str:
    """A table that scrolls by itself where the page is too narrow. Raises ValueError on a row of another length."""
    for index, row in enumerate(data.rows):
        if len(row) != len(data.columns):
            raise ValueError(
                f"report table {data.title!r}: row {index} has {len(row)} cells for {len(data.columns)} columns"
            )
    columns = [[row[index] for row in data.rows] for index in range(len(data.columns))]
    numeric = [any(_is_number(c) for c in column) and all(_is_number(c) or c is None for c in column) for column in columns]
    texts = [_column(column) for column in columns]
    head = "".join(f"<th{_right(right)}>{escape(name)}</th>" for name, right in zip(data.columns, numeric, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{_right(numeric[c])}>{escape(texts[c][r])}</td>" for c in range(len(columns))) + "</tr>"
        for r in range(len(data.rows))
    )
    note = f'<p class="note">{escape(data.note)}</p>' if data.note else ""
    return (
        f'<figure class="table"><figcaption>{escape(data.title)}</figcaption><div class="scroll" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}</figure>"
    )


def _is_number(cell: Cell) -> bool:
    if isinstance(cell, str):
        return _NUMBER_TEXT.fullmatch(cell) is not None
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def _right(right: bool) -> str:
    return ' class="right"' if right else ""


def _column(cells: Sequence[Cell]) -> list[str]:
    """The texts of a column; floats of like size share their number of decimals, so that the points line up."""
    floats = [cell for cell in cells if isinstance(cell, float) and math.isfinite(cell)]
    if not floats or max(map(abs, floats)) >= 1000 or any(0 < abs(cell) < 1e-3 for cell in floats):
        return [number(cell) for cell in cells]
    decimals = min(4, max(len(f"{cell:.4g}".partition(".")[2]) for cell in floats))
    return [
        f"{cell:.{decimals}f}".replace("-", "−") if isinstance(cell, float) and math.isfinite(cell) else number(cell)
        for cell in cells
    ]


def bar(fraction: float) -> str:
    """A horizontal bar filled to `fraction` of its track (clamped to 0..1)."""
    percent = 100 * min(1.0, max(0.0, fraction))
    return f'<span class="bar" style="--w:{percent:.2f}%"></span>'


def share(fraction: float) -> str:
    """A fraction as per cent: 42 %, 0.4 %."""
    return f"{100 * fraction:.0f} %" if fraction >= 0.0995 or fraction == 0 else f"{100 * fraction:.1f} %"
