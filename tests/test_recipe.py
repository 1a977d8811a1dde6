"""What a recipe builds: the right schedule, and muParam (simple) for the pre-training optimizer only."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afm_rl.recipe import OptimizerSpec


def moved(spec: OptimizerSpec, width: int) -> dict[str, float]:
    """How far a matrix, a norm and an embedding, all ones, move in the first step after equal gradients."""
    optimizer = spec.build(width=width)
    params = {"layers": {"q": jnp.ones((1, 2, 2)), "norm": jnp.ones((1, 2))}, "embed": {"weight": jnp.ones((3, 2))}}

    @jax.jit
    def step(params: Any) -> Any:
        grads = jax.tree.map(lambda p: 0.1 * p, params)
        return optimizer.update(grads, optimizer.init(params), params)[0]

    updates = step(params)
    leaves = {"q": updates["layers"]["q"], "norm": updates["layers"]["norm"], "embed": updates["embed"]["weight"]}
    return {name: float(np.asarray(leaf).flat[0]) for name, leaf in leaves.items()}


def test_without_a_length_the_rate_stays() -> None:
    """Guards SFT's constant learning rate (4.2) after its warm-up."""
    schedule = OptimizerSpec("adamw", 1e-3, warmup_steps=4).schedule
    np.testing.assert_allclose([schedule(t) for t in (1, 2, 4, 1000)], [0.25, 0.5, 1.0, 1.0])


def test_with_a_length_it_decays() -> None:
    """Guards the cosine (3.2.1): the middle and the end, which stays."""
    schedule = OptimizerSpec("afm", 1e-3, warmup_steps=2, total_steps=12, end_fraction=0.1).schedule
    np.testing.assert_allclose([schedule(t) for t in (2, 7, 12, 50)], [1.0, 0.55, 0.1, 0.1], rtol=1e-5)


def test_a_warm_up_longer_than_the_run_is_cut() -> None:
    """Guards smoke runs, which shorten a stage below its warm-up."""
    schedule = OptimizerSpec("afm", 1e-3, warmup_steps=100, total_steps=4, end_fraction=0.5).schedule
    np.testing.assert_allclose([schedule(t) for t in (3, 4)], [1.0, 0.5], rtol=1e-5)


def test_mu_param_scales_linear_layers_of_the_pretraining_optimizer() -> None:
    """Guards 3.2.1: half the width doubles the rate of matrices alone; AdamW ignores the width."""
    afm = OptimizerSpec("afm", 0.01)
    narrow, wide = moved(afm, 384), moved(afm, 768)
    assert narrow["q"] == pytest.approx(2 * wide["q"])
    assert (narrow["norm"], narrow["embed"]) == (wide["norm"], wide["embed"])
    assert moved(OptimizerSpec("adamw", 0.01), 384) == moved(OptimizerSpec("adamw", 0.01), 768)


def test_rates_and_decay_reach_the_optimizers() -> None:
    """Guards each field: the first step of AdamW is the rate, decay is times the rate there and not in the paper's."""
    plain = moved(OptimizerSpec("adamw", 0.01), 768)
    assert plain["q"] == pytest.approx(-0.01, rel=1e-4)
    assert moved(OptimizerSpec("adamw", 0.01, weight_decay=0.5), 768)["q"] == pytest.approx(-0.015, rel=1e-4)
    afm = moved(OptimizerSpec("afm", 0.01), 768)
    assert moved(OptimizerSpec("afm", 0.01, weight_decay=0.5), 768)["q"] == pytest.approx(afm["q"] - 0.5, rel=1e-4)
    assert moved(OptimizerSpec("adamw", 0.01, warmup_steps=2), 768)["q"] == pytest.approx(-0.005, rel=1e-4)
