"""The final answer of a response: how it is found, and when two answers are the same.

In this order: the last \\boxed{...}; the last "#### ..."; what follows the last "answer" ("answer 62", "the answer is:
62"); else the last number when a number is expected; else the whole response. Numbers compare by value ("1,000" is
"1000.0"), other answers as text without case and outer punctuation. No answer is ever evaluated, so none is an attack.
"""

from __future__ import annotations

import re
from decimal import Decimal

# A minus is a sign only where it does not stand behind a number ("7-5" holds 7 and 5). Longer numbers are no answers.
_NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?<!\d)(?:\d{1,3}(?:,\d{3})+|\d{1,40})(?:\.\d{1,40})?(?!\d)")
_MARKER = re.compile(r"\banswer\b(?:\s+is\b)?\s*[:=]?[^\S\n]*([^\n]*)", re.IGNORECASE)
_HASHES = re.compile(r"####[^\S\n]*([^\n]*)")
# The look-behinds keep it from starting inside a longer sum, which would be wrong and take quadratic time.
_EQUATION = re.compile(
    r"(?<![\w.])(?<![-+*])(?<![-+*] )(\d{1,12}(?: ?[-+*] ?\d{1,12})+) ?= ?(-?\d{1,40})(?![\d.]*\d)", re.ASCII
)


def final_answer(response: str, *, numeric: bool) -> str | None:
    """The final answer in `response`, None when there is none; `numeric` looks for a number only."""
    marked = _boxed(response)
    for pattern in (_HASHES, _MARKER):
        if marked is None:
            marked = next((text for text in reversed(pattern.findall(response)) if text.strip()), None)
    if not numeric:
        return (marked if marked is not None else response).strip() or None
    if marked is not None:
        found = _NUMBER.search(marked)
        return found.group() if found else None
    numbers = _NUMBER.findall(response)
    return numbers[-1] if numbers else None


def same_answer(given: str, expected: str) -> bool:
    """Equal as numbers where both are numbers, else equal as text."""
    a, b = (_NUMBER.fullmatch(text.strip().strip("$ ").removesuffix(".")) for text in (given, expected))
    if a and b:
        return Decimal(a.group().replace(",", "")) == Decimal(b.group().replace(",", ""))
    return _as_text(given) == _as_text(expected)


def false_equations(response: str) -> list[str]:
    """The worked steps like "7+5=13" (whole numbers, + - *) in `response` that are wrong."""
    return [m.group() for m in _EQUATION.finditer(response) if _value(m.group(1)) != int(m.group(2))]


def _value(expression: str) -> int:
    total = 0
    for sign, product in re.findall(r"([-+]?)((?:\d+\*)*\d+)", expression.replace(" ", "")):
        value = 1
        for factor in product.split("*"):
            value *= int(factor)
        total += -value if sign == "-" else value
    return total


def _boxed(response: str) -> str | None:
    """The content of the last complete \\boxed{...}, inner braces included; one pass, for responses may be hostile."""
    opened: list[int | None] = []
    last = (-1, -1)
    for brace in re.finditer(r"(\\boxed)?\{|\}", response):
        if brace.group() != "}":
            opened.append(brace.end() if brace.group(1) else None)
        elif opened:
            start = opened.pop()
            if start is not None:
                last = max(last, (start, brace.start()))
    return response[last[0] : last[1]] if last[0] >= 0 else None


def _as_text(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .!?\"'$")
