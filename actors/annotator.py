"""The annotator's role: committee pairs in, preferences with level and grades out (E.1).

A plain class without Ray. In the paper people annotate; this version has the simulated annotator only, which computes
its judgement from the checks of the prompts (`afm_rl/worlds/annotate.py`). What it says of a pair depends on the seed,
the prompt and the two texts alone: not on the order of the pairs, the replica, or which response comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from afm_rl.errors import UserError
from afm_rl.types import Pair, Preference
from afm_rl.worlds.annotate import judge, pair_rng

Outcome = Literal["win", "tie", "loss"]

#: What a topology may name; the ones of KINDS that are not in AVAILABLE_KINDS are refused.
KINDS = ("simulated", "judge", "human")
AVAILABLE_KINDS = ("simulated",)


def check_kind(kind: str) -> None:
    """Raises UserError for a kind of annotator that does not exist or that this version does not have."""
    valid = f"valid: {', '.join(AVAILABLE_KINDS)}"
    if kind not in KINDS:
        raise UserError(f"actors.annotator.kind: unknown kind {kind!r}; {valid}")
    if kind not in AVAILABLE_KINDS:
        raise UserError(f"actors.annotator.kind: {kind!r} is not available in this version; {valid}")


class Annotator:
    """Judges pairs. `flip_rate` (0..1) is how often it errs, to see what noise in the labels does."""

    def __init__(self, *, kind: str = "simulated", seed: int = 0, flip_rate: float = 0.0) -> None:
        """Raises UserError for a kind that is not available or a flip rate outside 0..1."""
        check_kind(kind)
        if not 0.0 <= flip_rate <= 1.0:
            raise UserError(f"actors.annotator.flip_rate must be between 0 and 1, got {flip_rate}")
        self.name = f"{kind}-{seed}"
        self._seed = seed
        self._flip_rate = flip_rate

    def annotate(self, pairs: Sequence[Pair]) -> list[Preference]:
        """A preference for every pair that can be told apart, in the order of the pairs; ties are left out.

        Raises UserError for a prompt without checks, for which there is no ground truth to simulate with.
        """
        judged = [self._judge(pair) for pair in pairs]
        return [preference for preference in judged if preference is not None]

    def compare(self, pairs: Sequence[Pair]) -> list[Outcome]:
        """Whether response a wins, ties with, or loses to response b, in the order of the pairs; for evaluation: no error.

        Raises UserError as `annotate` does.
        """
        outcomes: list[Outcome] = []
        for pair in pairs:
            preference = self._judge(pair, flip_rate=0.0)
            outcomes.append("tie" if preference is None else "win" if preference.chosen == pair.response_a else "loss")
        return outcomes

    def _judge(self, pair: Pair, *, flip_rate: float | None = None) -> Preference | None:
        if not pair.prompt.checks:
            raise UserError(
                f"prompt {pair.prompt.id!r} has no checks: the simulated annotator has nothing to judge by; "
                'give the prompt "checks" (docs/data.md), or leave it out of the prompts of itec'
            )
        rng = pair_rng(pair, seed=self._seed)
        rate = self._flip_rate if flip_rate is None else flip_rate
        return judge(pair, flip_rate=rate, rng=rng, annotator=self.name)
