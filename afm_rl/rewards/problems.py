"""Why a response has no reward: one line that begins with the component and the kind of failure, and counts of these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from afm_rl.types import ScoredGroup


def problem(component: str, cause: str, detail: str) -> str:
    """One line, e.g. "math timeout: took longer than 5 s"."""
    return f"{component} {cause}: {detail}"


def kind_of(text: str) -> str:
    """Component and cause of a problem as one word, e.g. "math_timeout"."""
    return "_".join(text.partition(":")[0].split())


def invalid_by_cause(scored: Iterable[ScoredGroup]) -> dict[str, float]:
    """Metrics: how many responses have no reward, in all (`invalid`) and by cause (`invalid_math_timeout`, ...)."""
    scored = list(scored)
    counts = Counter(kind_of(text) for one in scored for text in one.problems if text)
    invalid = sum(int((~one.valid_G).sum()) for one in scored)
    return {"invalid": float(invalid), **{f"invalid_{kind}": float(count) for kind, count in sorted(counts.items())}}
