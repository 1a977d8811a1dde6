"""What length and truncation do to a reward: the soft overlong punishment of DAPO, a price per token, and cut responses.

The paper says nothing of either; all are off by default (a cut response keeps the reward of what it says).
Lengths count the policy's own tokens, the end of a turn included, and not what an environment said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class SoftOverlong:
    """DAPO's equation 13 (arXiv 2503.14476): 0 up to `max_tokens - buffer_tokens`, then linear, -1 from `max_tokens` on."""

    max_tokens: int
    buffer_tokens: int

    def __call__(self, tokens_G: np.ndarray) -> np.ndarray:
        """[G] token counts -> [G] float32 in -1..0."""
        over_G = (np.asarray(tokens_G) - (self.max_tokens - self.buffer_tokens)) / self.buffer_tokens
        return -np.clip(over_G, 0.0, 1.0).astype(np.float32)


@dataclass(frozen=True)
class PerToken:
    """Every token costs the same: -1 a token, times the component's weight."""

    def __call__(self, tokens_G: np.ndarray) -> np.ndarray:
        """[G] token counts -> [G] float32, at most 0."""
        return -np.asarray(tokens_G, np.float32)


@dataclass(frozen=True)
class Truncation:
    """What becomes of a response that no end-of-turn token ends.

    keep: the sum of its components; zero: 0 in place of that sum; penalty: the sum less `penalty`; invalid: no reward, so
    that it is left out of its group. `end` says what counts as an end: "any" stop token (or stop string), or the "turn"'s own.
    """

    kind: Literal["keep", "zero", "penalty", "invalid"] = "keep"
    penalty: float = 0.0
    end: Literal["any", "turn"] = "any"

    def cut_G(self, finished: tuple[bool, ...], responses: tuple[np.ndarray, ...], *, end_of_turn_id: int) -> np.ndarray:
        """Which of G responses count as cut -> [G] bool."""
        ended = np.asarray(finished, bool)
        if self.end == "turn":
            ended &= np.array([len(r) > 0 and int(r[-1]) == end_of_turn_id for r in responses], bool)
        return ~ended

    def apply(self, total_G: np.ndarray, cut_G: np.ndarray) -> np.ndarray:
        """The rewards with the policy applied; NaN where it makes a response invalid."""
        if self.kind == "keep":
            return total_G
        changed_G = {"zero": 0.0 * total_G, "penalty": total_G - self.penalty}.get(self.kind, np.full_like(total_G, np.nan))
        return np.where(cut_G, changed_G, total_G)
