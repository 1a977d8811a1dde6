"""Key-value recall in long text: what the context-lengthening stage trains on and is measured by.

Statements "The code of NAME is 4 7 ..." are strewn over ordinary text; at the end the text asks for them again. It is
the simplest of RULER's retrieval tasks and takes the place of the paper's synthetic long-context Q&A (3.2.3).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

#: What has a code: words short and common enough to be one or two tokens.
KEYS = (
    *("apple", "river", "stone", "table", "green", "house", "light", "paper", "north", "south", "water", "glass"),
    *("horse", "mouse", "train", "plane", "bread", "sugar", "metal", "cloud", "storm", "field", "tower", "wheel"),
)
DIGITS = 3
#: Statements a training document makes and asks for again; the evaluation asks for one of as many.
STATEMENTS = 6


@dataclass(frozen=True)
class NeedleCase:
    """A text to continue and what must follow. `depth` is the needle's place: 0 the beginning, 1 the end."""

    prompt: str
    answer: str
    depth: float

    def passes(self, continuation: str) -> bool:
        """Whether what the model wrote after `prompt` begins with the answer."""
        return continuation.strip().startswith(self.answer)


def _statement(key: str, value: str) -> str:
    return f"The code of {key} is {value}."


def _facts(rng: random.Random) -> list[tuple[str, str]]:
    return [(key, f"{rng.randrange(10**DIGITS):0{DIGITS}d}") for key in rng.sample(KEYS, STATEMENTS)]


def _haystack(filler: Sequence[str], *, length_chars: int, rng: random.Random) -> list[str]:
    """Lines of ordinary text, `length_chars` together (0 or less: none)."""
    lines: list[str] = []
    left = length_chars
    while left > 0:
        line = rng.choice(filler)[:left]
        lines.append(line)
        left -= len(line) + 1
    return lines


def _strew(lines: list[str], statements: Sequence[str], rng: random.Random) -> tuple[str, list[int]]:
    """The lines with the statements between them, in order, and the offset of each statement."""
    places = sorted(rng.randrange(len(lines) + 1) for _ in statements)
    merged: list[tuple[str, bool]] = [(line, False) for line in lines]
    for place, statement in reversed(list(zip(places, statements, strict=True))):
        merged.insert(place, (statement, True))
    offsets, position = [], 0
    for line, is_statement in merged:
        if is_statement:
            offsets.append(position)
        position += len(line) + 1
    return "\n".join(line for line, _ in merged), offsets


def needle_documents(n: int, *, filler: Sequence[str], length_chars: int, rng: random.Random) -> list[str]:
    """`n` training documents, each between half of and all of `length_chars` long (or as long as its statements)."""
    documents: list[str] = []
    for _ in range(n):
        statements = [_statement(key, value) for key, value in _facts(rng)]
        asked = rng.sample(statements, len(statements))
        room = rng.randint(length_chars // 2, length_chars) - 2 * sum(len(s) + 1 for s in statements)
        text, _offsets = _strew(_haystack(filler, length_chars=room, rng=rng), statements, rng)
        documents.append("\n".join([text, *asked]))
    return documents


def make_needle_cases(n: int, *, filler: Sequence[str], length_chars: int, seed: int) -> list[NeedleCase]:
    """`n` cases of about `length_chars` characters; ValueError when that has no room for the statements."""
    rng = random.Random(f"needle-{seed}")
    cases: list[NeedleCase] = []
    for index in range(n):
        facts = _facts(rng)
        statements = [_statement(key, value) for key, value in facts]
        room = length_chars - sum(len(s) + 1 for s in statements) - len(statements[0])
        if room < 0:
            raise ValueError(f"length_chars {length_chars} is too short for {STATEMENTS} statements; give 400 or more")
        text, offsets = _strew(_haystack(filler, length_chars=room, rng=rng), statements, rng)
        asked = index % STATEMENTS
        key, value = facts[asked]
        cases.append(NeedleCase(f"{text}\nThe code of {key} is", value, depth=offsets[asked] / len(text)))
    return cases
