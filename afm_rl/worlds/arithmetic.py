"""Two-digit addition with worked steps, least digit first: the part of the world that the online loop learns most on.

    What is 37+25?  ->  7+5=12 3+2+1=6 answer 62

The steps go from the least digit up, so that each is one small sum over digits the model has just read (one token per
digit); the carry is visible in the first. The weak teacher drops the carry: 7+5=12 3+2=5 answer 52. Pairs of operands
are split by the UNORDERED pair, and no text made here, a subtraction included, gives a held-out pair away.
"""

from __future__ import annotations

import functools
import random
import re

from afm_rl.data.split import is_held_out
from afm_rl.worlds.task import HELD_OUT_FRACTION, Task, make_task

OPERANDS = range(10, 100)
#: Lines in one document of arithmetic text.
LINES_PER_DOCUMENT = 12
_ADDITION = re.compile(r"(?<![\w.])(\d\d)\s*\+\s*(\d\d)(?![\w.])")
_SUBTRACTION = re.compile(r"(?<![\w.])(\d{2,3})\s*-\s*(\d\d)\s*=")


def pair_key(a: int, b: int) -> str:
    """The identity of an unordered pair of operands."""
    return f"{min(a, b)}+{max(a, b)}"


@functools.cache
def held_out_pairs() -> frozenset[str]:
    """The keys of the pairs that training never sees."""
    pairs = (pair_key(a, b) for a in OPERANDS for b in OPERANDS if a <= b)
    salt = "python_world"
    return frozenset(p for p in pairs if is_held_out(f"arithmetic:{p}", fraction=HELD_OUT_FRACTION, salt=salt))


def mentions_held_out_pair(text: str) -> bool:
    """Whether `text` adds a held-out pair ("37+25"), or takes it apart again ("62-25=")."""
    additions = ((int(m[1]), int(m[2])) for m in _ADDITION.finditer(text))
    subtractions = ((int(m[1]) - int(m[2]), int(m[2])) for m in _SUBTRACTION.finditer(text))
    return any(pair_key(a, b) in held_out_pairs() for a, b in (*additions, *subtractions))


def worked(a: int, b: int) -> str:
    """The right response for a+b."""
    return _steps(a, b, carry=(a % 10 + b % 10) // 10)


def dropped_carry(a: int, b: int) -> str | None:
    """The weak teacher's response for a+b, None where there is no carry to drop."""
    return _steps(a, b, carry=0) if a % 10 + b % 10 > 9 else None


def _steps(a: int, b: int, *, carry: int) -> str:
    ones, tens = a % 10 + b % 10, a // 10 + b // 10 + carry
    tens_sum = f"{a // 10}+{b // 10}" + (f"+{carry}" if carry else "")
    return f"{a % 10}+{b % 10}={ones} {tens_sum}={tens} answer {tens}{ones % 10}"


def question(a: int, b: int) -> str:
    """The user's turn."""
    return f"What is {a}+{b}?"


def arithmetic_task(a: int, b: int) -> Task:
    """The prompt for a+b, with the answer as its check."""
    right = worked(a, b)
    checks = ({"type": "answer", "value": str(a + b)}, {"type": "length", "words": len(right.split())})
    return make_task(
        "arithmetic",
        question(a, b),
        right=right,
        checks=checks,
        biased=dropped_carry(a, b),
        split_key=pair_key(a, b),
    )


def arithmetic_tasks() -> list[Task]:
    """Every ordered pair of operands as a task, held-out ones included."""
    return [arithmetic_task(a, b) for a in OPERANDS for b in OPERANDS]


def math_documents(n: int, *, rng: random.Random) -> list[str]:
    """`n` documents of correct arithmetic, in several forms, with training pairs only."""
    pairs = [(a, b) for a in OPERANDS for b in OPERANDS if pair_key(a, b) not in held_out_pairs()]

    def document() -> str:
        return "\n".join(_line(*rng.choice(pairs), form=rng.choice(_FORMS), rng=rng) for _ in range(LINES_PER_DOCUMENT))

    return [document() for _ in range(n)]


#: The forms of a line; the worked one, which the instructions use, most often.
_FORMS = ("worked", "worked", "worked", "digits", "digits", "sum", "least_digit_first", "difference", "order")


def _line(a: int, b: int, *, form: str, rng: random.Random) -> str:
    if form == "worked":
        return f"{question(a, b)} {worked(a, b)}"
    if form == "digits":
        x, y, carry = rng.randrange(10), rng.randrange(10), rng.randrange(2)
        return f"{x}+{y}={x + y} {x}+{y}+{carry}={x + y + carry}" if carry else f"{x}+{y}={x + y}"
    if form == "sum":
        return f"{a}+{b}={a + b}"
    if form == "least_digit_first":
        return f"{a}+{b} least digit first is {str(a + b)[::-1]}"
    if form == "difference":
        return f"{a + b}-{b}={a}"
    return f"{min(a, b)} is less than {max(a, b)}" if a != b else f"{a} is equal to {b}"
