"""Scores many sequences by a random reward model, alone and in every company, and fails where a bit differs.

python tests/programs/reward_bits.py DTYPE FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np

from actors.artifacts import save_artifact
from actors.reward_model_scores import RewardModelScorer, padded_width
from afm_rl.config import ModelConfig
from afm_rl.parameters import init_params
from afm_rl.reward_model import init_heads

CONFIG = ModelConfig(512, 64, 192, 3, 4, 2, 16, max_positions=512)


def main() -> None:
    dtype, folder = sys.argv[1], Path(sys.argv[2]) / "model"
    trunk, heads = jax.random.split(jax.random.key(0))
    params = {"trunk": init_params(CONFIG, trunk), "heads": init_heads(CONFIG, heads)}
    params["heads"]["reward"] = jax.random.normal(trunk, (1, CONFIG.dim))
    save_artifact(folder, jax.tree.map(np.asarray, params), CONFIG)
    score = RewardModelScorer(folder, compute_dtype=dtype)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(7, 512, size=n).astype(np.int32) for n in rng.integers(1, 200, size=300)]
    assert len({padded_width(len(s)) for s in sequences}) == 7
    first = score(sequences)
    assert len(set(first.reward_B.tolist())) > 250
    for _ in range(4):
        order = rng.permutation(len(sequences))
        shuffled = score([sequences[i] for i in order])
        np.testing.assert_array_equal(shuffled.reward_B, first.reward_B[order])
        np.testing.assert_array_equal(shuffled.grades_B4, first.grades_B4[order])
    for start in range(0, len(sequences), 37):
        np.testing.assert_array_equal(score(sequences[start : start + 37]).reward_B, first.reward_B[start : start + 37])
    for i in range(12):
        np.testing.assert_array_equal(score([sequences[i]]).reward_B, first.reward_B[i : i + 1])


if __name__ == "__main__":
    main()
