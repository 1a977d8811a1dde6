"""The algorithms behind one face: equal where they must be, the weight of stale responses, and what is refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afm_rl.algorithms import ALGORITHMS, BASELINES, check_choice
from afm_rl.errors import UserError
from afm_rl.objectives.mdloo import leave_one_out, shaped_reward
from afm_rl.objectives.online import advantages, online_loss, staleness_weight
from afm_rl.objectives.online_dpo import best_and_worst
from afm_rl.objectives.reinforce import running_average

RNG = np.random.default_rng(0)
MASK = ((np.arange(6) >= 1) & (np.arange(6) < np.array([[6], [4], [5], [3]]))) * 1.0
LOGP = RNG.normal(-1.0, 0.5, (4, 6)).astype(np.float32)
BATCH: dict[str, Any] = {
    "mask_BT": MASK,
    "advantage_B": np.array([1.5, -0.5, 0.25, -1.25], np.float32),
    "num_sequences": np.float32(4),
    "num_tokens": np.float32(MASK.sum()),
    "sampler_logp_BT": LOGP + RNG.normal(0, 0.1, LOGP.shape).astype(np.float32),
    "stale_B": np.zeros(4, bool),
    "ref_logp_BT": RNG.normal(-1.0, 0.5, (4, 6)).astype(np.float32),
}
CONSTANTS = {"gamma": 0.5, "clip": 0.2, "beta": 0.3, "staleness_cap": 2.0}


def slope(algorithm: str, **changes: Any) -> np.ndarray:
    """d loss / d log pi of each token."""
    loss = partial(online_loss, algorithm, {**BATCH, **changes}, **CONSTANTS)
    return np.asarray(jax.jit(jax.grad(loss, has_aux=True))(LOGP)[0])


@pytest.mark.parametrize("algorithm", ["mdloo", "rloo", "reinforce"])
def test_at_theta_k_they_are_reinforce(algorithm: str) -> None:
    """Guards the common ground: -(1/N) A on every token, whatever gamma and the clip."""
    expected = -BATCH["advantage_B"][:, None] * MASK / 4
    np.testing.assert_allclose(slope(algorithm), expected, rtol=1e-6)
    np.testing.assert_allclose(slope(algorithm, behavior_logp_BT=LOGP), expected, rtol=1e-6)


@pytest.mark.parametrize("algorithm", ["mdloo", "rloo", "reinforce", "ppo", "grpo"])
def test_stale_responses_are_weighted_and_fresh_ones_are_not(algorithm: str) -> None:
    """Guards stop_grad(min(pi_k / pi_mu, cap)) on the stale rows, and a weight of exactly 1 elsewhere, bit for bit."""
    behavior = LOGP - np.float32(0.1)
    fresh = slope(algorithm, behavior_logp_BT=behavior)
    shifted = {"sampler_logp_BT": behavior - np.float32(0.01) * MASK, "behavior_logp_BT": behavior}
    np.testing.assert_array_equal(slope(algorithm, **shifted), fresh)
    stale = slope(algorithm, **shifted, stale_B=np.array([True, False, True, True]))
    weight = np.array([np.exp(0.05), 1.0, np.exp(0.04), np.exp(0.02)])[:, None]
    np.testing.assert_array_equal(stale[1], fresh[1])
    np.testing.assert_allclose(stale, weight * fresh, rtol=1e-5)


def test_staleness_weight_by_hand() -> None:
    """Guards the cap, the sum over the response's own tokens, and overflow."""
    behavior = np.array([[9.0, 0.1, 0.2], [9, 3, 0], [9, -0.7, 0], [9, 500, 0]], np.float32)
    mask = np.array([[0.0, 1, 1], [0, 1, 1], [0, 1, 1], [0, 1, 1]])
    found = staleness_weight(behavior, np.zeros((4, 3), np.float32), mask, np.ones(4, bool), cap=2.0)
    np.testing.assert_allclose(found, [np.exp(0.3), 2.0, np.exp(-0.7), 2.0], rtol=1e-6)
    np.testing.assert_array_equal(staleness_weight(behavior, 0 * behavior, mask, np.zeros(4, bool), cap=2.0), 1.0)


def test_the_kl_to_the_reference_is_inside_the_baseline() -> None:
    """Guards R: a group's advantages sum to 0; the KL added after the baseline leaves a sum, and so more variance."""
    reward, logp, reference = RNG.normal(size=(3, 5)), RNG.normal(-9, 2, (3, 5)), RNG.normal(-9, 2, (3, 5))
    inside = leave_one_out(shaped_reward(reward, logp, reference, beta=0.1))
    np.testing.assert_allclose(inside.sum(axis=1), 0, atol=1e-12)
    afterwards = shaped_reward(leave_one_out(reward), logp, reference, beta=0.1)
    assert np.abs(afterwards.sum(axis=1)).min() > 0.01


@pytest.mark.parametrize("baseline", ["leave_one_out", "group_mean", "group_standardized"])
def test_a_constant_added_to_a_prompts_rewards_changes_nothing(baseline: str) -> None:
    """Guards what a group's baseline is for; constants that float64 adds without rounding."""
    reward, valid = RNG.integers(-8, 8, (3, 4)) / 8.0, np.array([[1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 0, 0]], bool)
    plain = advantages(baseline, reward, valid)
    shifted = advantages(baseline, reward + np.array([[1.0], [-1000.0], [0.5]]), valid)
    np.testing.assert_array_equal(shifted.usable_PG, plain.usable_PG)
    np.testing.assert_allclose(shifted.advantage_PG, plain.advantage_PG, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(plain.usable_PG, [[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0]])
    np.testing.assert_allclose(plain.advantage_PG.sum(axis=1), 0, atol=1e-12)


def test_group_mean_and_no_baseline_by_hand() -> None:
    """Guards the other baselines: over all valid rewards, the own one included, and none at all."""
    reward, valid = np.array([[1.0, 2.0, 6.0], [5.0, np.nan, 7.0]]), np.array([[1, 1, 1], [1, 1, 0]], bool)
    np.testing.assert_allclose(advantages("group_mean", reward, valid).advantage_PG, [[-2, -1, 3], [0, 0, 0]], atol=1e-12)
    plain = advantages("none", reward, valid)
    np.testing.assert_array_equal(plain.advantage_PG, [[1, 2, 6], [5, 0, 0]])
    np.testing.assert_array_equal(plain.usable_PG, [[1, 1, 1], [1, 0, 0]])
    with pytest.raises(ValueError, match="unknown baseline 'median'"):
        advantages("median", reward, valid)


def test_running_average_by_hand() -> None:
    """Guards the order: advantages against the average of the iterations before, then the average moves."""
    reward, valid = np.array([[1.0, 3.0], [5.0, np.nan]]), np.array([[1, 1], [1, 1]], bool)
    first, average = running_average(reward, valid, None, decay=0.9)
    np.testing.assert_allclose(first, [[-2.0, 0.0], [2.0, 0.0]])
    assert average == pytest.approx(3.0)
    second, average = running_average(reward + 10, valid, average, decay=0.9)
    np.testing.assert_allclose(second, [[8.0, 10.0], [12.0, 0.0]])
    assert average == pytest.approx(0.9 * 3 + 0.1 * 13)
    nothing, same = running_average(reward, np.zeros((2, 2), bool), average, decay=0.9)
    assert not nothing.any()
    assert same == average


def test_pairs_are_the_best_and_the_worst() -> None:
    """Guards online DPO's choice: valid responses only, none where rewards are equal, never a response with itself."""
    reward = np.array([[1.0, 9.0, 4.0, 99.0], [2.0, 2.0, 2.0, 2.0], [7.0, 1.0, 0.0, 0.0], [0.0, 5.0, 3.0, 1.0]])
    valid = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 1, 1]], bool)
    pairs, differ = best_and_worst(reward, valid)
    np.testing.assert_array_equal(differ, [True, False, False, True])
    np.testing.assert_array_equal(pairs[[0, 3]], [[1, 0], [1, 3]])
    assert (pairs[:, 0] != pairs[:, 1]).all()


def test_online_dpo_by_hand() -> None:
    """Guards its pairs (chosen rows first), the mean over present ones, and their gradient, in NumPy."""
    mask = MASK.copy()
    mask[[1, 3]] = 0  # the second pair is absent
    batch = {"mask_BT": mask, "num_sequences": np.float32(2)}
    h = ((LOGP - BATCH["ref_logp_BT"]) * mask).sum(-1, dtype=np.float64)
    margin = h[0] - h[2]
    loss, of_sequence = online_loss("online_dpo", {**BATCH, **batch}, jnp.asarray(LOGP), **CONSTANTS)
    assert float(loss) == pytest.approx(np.log1p(np.exp(-0.3 * margin)), rel=1e-5)
    np.testing.assert_allclose(np.asarray(of_sequence["margin_B"])[[0, 2]], margin, rtol=1e-5)
    by_margin = -0.3 / (1 + np.exp(0.3 * margin))
    expected = by_margin * np.array([[1.0], [0], [-1], [0]]) * mask
    np.testing.assert_allclose(slope("online_dpo", **batch), expected, rtol=1e-5)


def test_choices_that_no_algorithm_has_are_refused() -> None:
    """Guards topologies and settings: the message says what there is instead."""
    wrong = {
        "unknown algorithm 'dqn'; there are mdloo, ppo": ("dqn", {}),
        "unknown form 'k3' of the KL": ("mdloo", {"kl": "k3"}),
        "kl: full belongs to mdloo; rloo has no KL": ("rloo", {"kl": "full"}),
        "grpo has no baseline 'leave_one_out'; there are group_standardized": ("grpo", {"baseline": "leave_one_out"}),
        "online_dpo needs a beta above 0": ("online_dpo", {"beta": 0.0}),
    }
    for message, (algorithm, changes) in wrong.items():
        with pytest.raises(UserError, match=message):
            check_choice(algorithm, **{"kl": "sampled", "baseline": "own", "beta": 0.1, **changes})  # type: ignore[arg-type]
    for name, algorithm in ALGORITHMS.items():
        for baseline in algorithm.baselines:
            assert baseline in BASELINES
            check_choice(name, kl="sampled", baseline=baseline, beta=0.1)
