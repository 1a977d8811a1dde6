"""Scores of token sequences by the learned reward model, each the same bits whatever else is asked with it.

A sequence is padded to a width that follows from its own length, and a width has one compiled program with a fixed number
of rows: what fills the other rows changes neither shapes nor the order of any sum. Widths grow by at most a quarter, so that
programs stay few. Shapes: B sequences, T time, R rows of a program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from actors.artifacts import load_artifact
from afm_rl.compute import Compute
from afm_rl.config import ModelConfig
from afm_rl.reward_model import Scores, score
from afm_rl.types import GRADINGS

#: Positions of one forward pass, and the least rows that it has. Rows are a power of two: with 21 rows of 96 positions XLA
#: computes the last rows by other code on CPU, and a sequence's score depends on which row it stands in.
PASS_TOKENS, LEAST_ROWS = 1024, 8
#: The narrowest width, and the step by which widths grow at first.
WIDTH = 32


@dataclass(frozen=True)
class SequenceScores:
    """Reward [B] and most likely grade classes [B, 4] of B sequences."""

    reward_B: np.ndarray
    grades_B4: np.ndarray


class RewardModelScorer:
    """A reward model in memory."""

    def __init__(self, folder: str, *, compute_dtype: str) -> None:
        """Raises ValueError for a folder that holds a policy."""
        artifact = load_artifact(folder)
        if "heads" not in artifact.params:
            raise ValueError(f"{folder} is a policy, not a reward model: it has no heads")
        assert artifact.config is not None
        self._params = jax.tree.map(jnp.asarray, artifact.params)
        self._run = partial(_score, config=artifact.config, dtype=compute_dtype)

    def __call__(self, sequences: Sequence[np.ndarray]) -> SequenceScores:
        """Scores of whole token sequences [T_b] int32, in order."""
        widths = np.array([padded_width(len(s)) for s in sequences], np.int64)
        rewards, grades = np.empty(len(sequences), np.float32), np.empty((len(sequences), len(GRADINGS)), np.int32)
        running = []  # every pass is started before the first is read: the device never waits for the host
        for width in np.unique(widths).tolist():
            places, rows = np.flatnonzero(widths == width), rows_of(width)
            for start in range(0, len(places), rows):
                taken = places[start : start + rows]
                tokens_RT, length_R = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
                for row, place in enumerate(taken):
                    tokens_RT[row, : len(sequences[place])] = sequences[place]
                    length_R[row] = len(sequences[place])
                running.append((taken, self._run(self._params, tokens_RT, length_R)))
        for taken, out in running:
            rewards[taken] = np.asarray(out.reward_B)[: len(taken)]
            classes = np.stack([np.asarray(out.grade_logits[name]).argmax(-1) for name in GRADINGS], axis=-1)
            grades[taken] = classes[: len(taken)]
        return SequenceScores(rewards, grades)


def padded_width(length: int) -> int:
    """The width of a sequence's program: a multiple of 32 up to 256, then four widths per doubling.

    At most 31 positions or a quarter are padding, whichever is more.
    """
    step = max(WIDTH, 1 << max(0, (length - 1).bit_length() - 3))
    return max(1, -(-length // step)) * step


def rows_of(width: int) -> int:
    """Rows of the program of a width, a power of two: at most PASS_TOKENS positions, unless LEAST_ROWS has more."""
    return max(LEAST_ROWS, 1 << max(0, (PASS_TOKENS // width).bit_length() - 1))


@partial(jax.jit, static_argnames=("config", "dtype"))
def _score(params: Any, tokens_RT: jax.Array, length_R: jax.Array, *, config: ModelConfig, dtype: str) -> Scores:
    return score(params, tokens_RT, length_R, config=config, compute=Compute(dtype=dtype))
