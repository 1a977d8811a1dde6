"""The reward model's loss: levels by hand, TRL's Bradley-Terry value as a special case, gradings against NumPy."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afm_rl.objectives import reward
from afm_rl.objectives.reward import P_LEVEL, grading_loss, soft_label_loss
from afm_rl.types import GRADINGS, LEVELS

FIXTURES = Path(__file__).parents[1] / "fixtures"
reward_loss = jax.jit(reward.reward_loss)


def test_target_probabilities_are_the_papers() -> None:
    """Guards the table and its order: E.1 names them from significantly to negligibly better, LEVELS goes up."""
    expected = {"significantly": 0.95, "better": 0.85, "slightly": 0.75, "negligibly": 0.65}
    assert dict(zip(LEVELS, P_LEVEL, strict=True)) == expected


def test_soft_label_loss_by_hand() -> None:
    """Guards Eq. 3 for each level at a margin of 2 nats, and its minimum at log(p / (1 - p))."""
    win, lose = np.log1p(np.exp(-2.0)), np.log1p(np.exp(2.0))
    for level, p in enumerate(P_LEVEL):
        one = {"rejected_B": jnp.array([1.0]), "level_B": jnp.array([level])}
        got = soft_label_loss(chosen_B=jnp.array([3.0]), **one)
        np.testing.assert_allclose(got, p * win + (1 - p) * lose, rtol=1e-6)
        slope = jax.grad(lambda c, one=one: soft_label_loss(chosen_B=c, **one))
        np.testing.assert_allclose(slope(jnp.array([1.0 + np.log(p / (1 - p))])), 0.0, atol=1e-6)


def test_certain_labels_give_trls_bradley_terry_loss() -> None:
    """Guards sign and mean: with every target at 1 the loss is TRL's -log sigmoid(r_c - r_r)."""
    z = np.load(FIXTURES / "reward_model.npz")
    rewards = jnp.asarray(z["rewards_f32"])
    loss = soft_label_loss(chosen_B=rewards[:6], rejected_B=rewards[6:], level_B=jnp.zeros(6, jnp.int32), p_level=(1.0,) * 4)
    np.testing.assert_allclose(loss, z["trl_loss/center0"], rtol=1e-6)


def test_soft_labels_survive_extreme_margins() -> None:
    """Guards against log(0): a margin of +-500 costs 500 nats times the probability of the other side."""
    for chosen, expected in [(500.0, 0.05 * 500.0), (-500.0, 0.95 * 500.0)]:
        loss = soft_label_loss(chosen_B=jnp.array([chosen]), rejected_B=jnp.zeros(1), level_B=jnp.array([3]))
        np.testing.assert_allclose(loss, expected, rtol=1e-5)


def make_gradings() -> tuple[dict, dict]:
    rng = np.random.default_rng(0)
    logits = {name: (rng.normal(size=(5, 3)), rng.normal(size=(5, 3))) for name in GRADINGS}
    grades = {name: (rng.integers(0, 3, 5), rng.integers(0, 3, 5)) for name in GRADINGS}
    return logits, grades


def test_grading_loss_sums_gradings_and_sides() -> None:
    """Guards Eq. 4: a sum over eight cross-entropies per pair, a mean over pairs only."""
    logits, grades = make_gradings()
    expected = 0.0
    for name in GRADINGS:
        for u, z in zip(logits[name], grades[name], strict=True):
            expected -= np.mean([u[i, z[i]] - np.log(np.exp(u[i]).sum()) for i in range(5)])
    with jax.enable_x64(True):
        as_jax = jax.tree.map(jnp.asarray, logits)
        np.testing.assert_allclose(grading_loss(grade_logits=as_jax, grades=grades), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="gradings differ"):
        grading_loss(grade_logits=logits, grades={})


def test_ungraded_responses_contribute_nothing() -> None:
    """Guards -1: no loss, no gradient, and not counted in the accuracy (one_hot, not an index that wraps around)."""
    logits, grades = make_gradings()
    none = {name: (np.full(5, -1), np.full(5, -1)) for name in GRADINGS}
    assert float(grading_loss(grade_logits=jax.tree.map(jnp.asarray, logits), grades=none)) == 0.0
    right = {name: (u.argmax(-1), np.full(5, -1)) for name, (u, _) in logits.items()}
    pair = {"chosen_B": jnp.ones(5), "rejected_B": jnp.zeros(5), "level_B": jnp.zeros(5, jnp.int32)}
    _, metrics = reward_loss(**pair, grade_logits=jax.tree.map(jnp.asarray, logits), grades=right, lam=0.1)
    assert float(metrics["grading_accuracy"]) == 1.0
    assert set(grades) == set(GRADINGS)


def test_reward_loss_adds_lambda_times_the_gradings() -> None:
    """Guards Eq. 5 and the metrics of a step."""
    logits, grades = make_gradings()
    logits = jax.tree.map(jnp.asarray, logits)
    pair = {
        "chosen_B": jnp.array([1.0, -1, 2, 0, 3]),
        "rejected_B": jnp.zeros(5),
        "level_B": jnp.array([0, 1, 2, 3, 0]),
    }
    loss, metrics = reward_loss(**pair, grade_logits=logits, grades=grades, lam=0.25)
    expected = soft_label_loss(**pair) + 0.25 * grading_loss(grade_logits=logits, grades=grades)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose([metrics["accuracy"], metrics["margin"]], [0.6, 1.0], rtol=1e-6)
    with pytest.raises(ValueError, match="level_B"):
        soft_label_loss(**{**pair, "level_B": jnp.zeros((5, 1), jnp.int32)})
