"""Where a learner's time goes, and what it counts as speed: the seconds of steps, not of handing them over."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from actors.jobs import TrainingJob
from actors.learner import Learner
from afm_rl.config import ModelConfig
from afm_rl.goodput import KINDS
from afm_rl.packing import Batch, Example, pad
from afm_rl.recipe import OptimizerSpec

CONFIG = ModelConfig(64, 64, 128, 2, 4, 2, 16)


def batch(step: int) -> Batch:
    rng = np.random.default_rng(step)
    return pad([Example(rng.integers(1, 64, size=64)) for _ in range(8)], pad_id=0, length=64)


def test_speed_and_goodput_are_those_of_the_clock(tmp_path: Path) -> None:
    """Guards against timing the dispatch: the kinds add up to the time that passed, and tokens/s to the tokens of it."""
    learner = Learner()
    checkpoints = str(tmp_path / "checkpoints")
    learner.begin(
        TrainingJob("t", "supervised", OptimizerSpec("adamw", 0.01), checkpoints, config=CONFIG, checkpoint_every=4)
    )
    learner.train([batch(0)])
    learner.train([batch(step) for step in range(1, 5)])  # the first checkpoint imports its library
    before, began_s = learner.goodput(), time.perf_counter()
    time.sleep(0.2)
    measured = learner.train([batch(step) for step in range(5, 15)])
    took_s = time.perf_counter() - began_s
    spent = {kind: learner.goodput()[f"{kind}_s"] - before[f"{kind}_s"] for kind in KINDS}
    assert 0.9 * took_s < sum(spent.values()) < 1.02 * took_s
    assert spent["data_wait"] > 0.19
    assert spent["checkpoint"] > 0
    tokens_per_s = measured[0]["tokens_per_s"]
    np.testing.assert_allclose(tokens_per_s, 10 * 8 * 64 / spent["step"], rtol=1e-6)
    assert tokens_per_s < 10 * 8 * 64 / (0.3 * (took_s - 0.2 - spent["checkpoint"]))
