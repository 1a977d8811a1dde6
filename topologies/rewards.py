"""The reward actors as stages use them: load a reward, then score, rerank and measure over all that live.

An actor that dies in the middle is started anew, loads the reward again, and its share is scored by whoever is free: a
response's score does not depend on who computes it, nor with what.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actors.pool import Pool
from actors.reward import RewardSpec, SequenceScores
from actors.streams import StreamingHandle
from afm_rl.types import Group, Prompt, ScoredGroup
from topologies.actor_options import Working


class Rewards:
    """The actors of the role "reward"."""

    def __init__(self, handles: Sequence[StreamingHandle], options: Working) -> None:
        self.pool = Pool("reward", handles, deadline_s=options.call_deadline_s, max_losses=options.max_restarts)

    def load(self, spec: RewardSpec) -> None:
        """Score by this from now on. Raises what `Reward.load` does."""
        self.pool.prepare("load", spec)

    def score(self, groups: Sequence[Group | ScoredGroup], prompts: Sequence[Prompt]) -> list[ScoredGroup]:
        """Rewards of every response, in order; prompts[i] is what groups[i] answers."""
        return [scored for part in self.pool.map("score", groups, prompts) for scored in part]

    def rerank(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[int]:
        """Per prompt, the index of the response with the highest reward (4.3.2)."""
        return [index for part in self.pool.map("rerank", prompts, responses) for index in part]

    def sequence_scores(self, sequences: Sequence[np.ndarray]) -> SequenceScores:
        """Reward [B] and grade classes [B, 4] of whole token sequences by the learned model."""
        parts: list[SequenceScores] = self.pool.map("sequence_scores", sequences)
        return SequenceScores(
            np.concatenate([part.reward_B for part in parts]), np.concatenate([part.grades_B4 for part in parts])
        )
