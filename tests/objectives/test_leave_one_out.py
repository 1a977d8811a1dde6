"""Leave-one-out advantages and shaped rewards against TRL's and by hand."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afm_rl.objectives.mdloo import leave_one_out, shaped_reward, usable_responses

FIXTURES = Path(__file__).parents[1] / "fixtures"


def test_advantages_match_the_fixture() -> None:
    """Guards Eq. 7 in float64, NumPy and JAX; advantages of a prompt sum to zero, and no spread is no advantage."""
    z = np.load(FIXTURES / "rloo.npz")
    advantage = leave_one_out(z["rewards"])
    assert isinstance(advantage, np.ndarray)
    assert advantage.dtype == np.float64
    np.testing.assert_allclose(advantage, z["advantages_f64"], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(advantage.sum(axis=1), 0.0, atol=1e-12)
    np.testing.assert_array_equal(advantage[1], 0.0)
    in_jax = jax.jit(leave_one_out)(jnp.asarray(z["rewards"], jnp.float32))
    np.testing.assert_allclose(in_jax, z["advantages_f64"], rtol=1e-5, atol=1e-6)


def test_shaped_rewards_match_trl() -> None:
    """Guards the KL to the reference inside the reward, hence inside the baseline."""
    z = np.load(FIXTURES / "rloo.npz")
    logp, ref_logp = z["old_logps/norm0_beta0.05"].reshape(8, 8), z["ref_logps_f64/norm0_beta0.05"].reshape(8, 8)
    advantage = leave_one_out(shaped_reward(z["rewards"], logp, ref_logp, beta=0.05))
    np.testing.assert_allclose(advantage.reshape(-1), z["advantages/norm0_beta0.05"], atol=1e-3)
    assert np.abs(leave_one_out(z["rewards"]) - advantage).max() > 0.05
    with pytest.raises(ValueError, match="ref_logp"):
        shaped_reward(z["rewards"], logp, ref_logp[:1], beta=0.05)


def test_invalid_responses_are_left_out() -> None:
    """Guards partial groups: the mean is over the other VALID rewards; fewer than two leave nothing to learn from."""
    reward = np.array([[1.0, 2.0, 6.0, np.nan], [1.0, 5.0, np.inf, 7.0], [1.0, np.nan, np.nan, np.nan], [np.nan] * 4])
    valid = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]], bool)
    expected = [[-3.0, -1.5, 4.5, 0.0], [-4.0, 4.0, 0.0, 0.0], [0.0] * 4, [0.0] * 4]
    usable = [[True, True, True, False], [True, True, False, False], [False] * 4, [False] * 4]
    for kind in (np.asarray, jnp.asarray):
        np.testing.assert_allclose(leave_one_out(kind(reward), valid), expected, rtol=1e-6)
        np.testing.assert_array_equal(usable_responses(kind(reward), valid), usable)


def test_equal_rewards_give_exactly_zero() -> None:
    """Guards against rounding noise that a normaliser would blow up, and against cancellation under a large offset."""
    np.testing.assert_array_equal(leave_one_out(np.full((1, 7), 0.1, np.float32)), 0.0)
    reward = np.array([[0.0, 1.0, 3.0]], np.float32)
    np.testing.assert_array_equal(leave_one_out(reward + 2.0**20), leave_one_out(reward))


@pytest.mark.parametrize("reward", [np.zeros(4), np.zeros((2, 2), np.int32)])
def test_bad_rewards_are_refused(reward: np.ndarray) -> None:
    """Guards against a flattened batch (one big group) and integer advantages."""
    with pytest.raises(ValueError, match="reward_PG"):
        leave_one_out(reward)
