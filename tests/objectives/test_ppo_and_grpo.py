"""PPO-clip and GRPO against plain NumPy in float64, token by token, and what the clip does to a gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afm_rl.objectives.grpo import group_standardized, grpo_loss
from afm_rl.objectives.ppo import ppo_loss

RNG = np.random.default_rng(0)
LENGTHS = (4, 1, 3, 2)
MASK = np.array([[0.0] * 2 + [1.0] * n + [0.0] * (4 - n) for n in LENGTHS])
LOGP, BEHAVIOR, REFERENCE = (RNG.normal(-1.0, 0.5, (4, 6)) for _ in range(3))
ADVANTAGE = np.array([1.5, -0.5, 0.7, -1.7])
WEIGHT = np.array([1.0, 0.3, 2.0, 1.0])
INPUTS: dict[str, Any] = {"behavior_logp_BT": BEHAVIOR, "advantage_B": ADVANTAGE, "mask_BT": MASK, "clip": 0.2}


def clipped_gain(i: int, t: int) -> tuple[float, float]:
    """A token's min(r A, clip(r) A), and its derivative by log pi."""
    ratio, a = np.exp(LOGP[i, t] - BEHAVIOR[i, t]), ADVANTAGE[i]
    bounded = min(max(ratio, 0.8), 1.2)
    return min(ratio * a, bounded * a), (ratio * a if ratio * a <= bounded * a else 0.0)


def value_and_slope(loss: Any, **options: Any) -> tuple[float, np.ndarray, np.ndarray]:
    with jax.enable_x64(True):
        run = jax.jit(jax.value_and_grad(lambda logp: loss(logp_BT=logp, **INPUTS, **options), has_aux=True))
        (value, share), slope = run(jnp.asarray(LOGP))
        return float(value), np.asarray(slope), np.asarray(share)


def expected(*, per_token: list[float], weight: np.ndarray, beta: float = 0.0) -> tuple[float, np.ndarray, np.ndarray]:
    """The loss, its slope and the clipped share; `per_token` is what each token of a sequence counts."""
    value, slope, share = 0.0, np.zeros((4, 6)), np.zeros(4)
    for i in range(4):
        for t in range(2, 2 + LENGTHS[i]):
            gain, by_logp = clipped_gain(i, t)
            away = REFERENCE[i, t] - LOGP[i, t]
            gain, by_logp = gain - beta * (np.exp(away) - away - 1), by_logp - beta * (1 - np.exp(away))
            value -= weight[i] * per_token[i] * gain
            slope[i, t] = -weight[i] * per_token[i] * by_logp
            share[i] += (clipped_gain(i, t)[1] == 0) / LENGTHS[i]
    return value, slope, share


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_ppo_is_a_mean_over_tokens(weight: np.ndarray | None) -> None:
    """Guards the ratio per token, the clip, one mean over all tokens of the batch, and staleness weights."""
    value, slope, share = value_and_slope(ppo_loss, num_tokens=20, weight_B=weight)
    want = expected(per_token=[1 / 20] * 4, weight=np.ones(4) if weight is None else weight)
    np.testing.assert_allclose(value, want[0], rtol=1e-12)
    np.testing.assert_allclose(slope, want[1], rtol=1e-12)
    np.testing.assert_allclose(share, want[2], rtol=1e-12)
    assert 0 < share.mean() < 1


@pytest.mark.parametrize(("weight", "beta"), [(None, 0.0), (WEIGHT, 0.3)])
def test_grpo_is_a_mean_over_responses_of_their_means(weight: np.ndarray | None, beta: float) -> None:
    """Guards the published normalisation and k3 towards the reference, inside the loss."""
    value, slope, share = value_and_slope(grpo_loss, num_sequences=5, weight_B=weight, beta=beta, ref_logp_BT=REFERENCE)
    want = expected(per_token=[1 / (5 * n) for n in LENGTHS], weight=np.ones(4) if weight is None else weight, beta=beta)
    np.testing.assert_allclose(value, want[0], rtol=1e-12)
    np.testing.assert_allclose(slope, want[1], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(share, want[2], rtol=1e-12)


def test_grpo_needs_its_reference() -> None:
    """Guards against a distance to the reference that is silently left out."""
    with pytest.raises(ValueError, match=r"beta 0\.3 prices the distance to a reference"):
        value_and_slope(grpo_loss, num_sequences=5, beta=0.3)


@pytest.mark.parametrize("d", [200.0, -200.0])
def test_finite_far_from_theta_k(d: float) -> None:
    """Guards the ratio in float32: no NaN through the branch that min() does not take, and a way back from far away."""
    far = {**INPUTS, "behavior_logp_BT": np.asarray(LOGP - d, np.float32)}
    for loss, count in ((ppo_loss, "num_tokens"), (grpo_loss, "num_sequences")):

        def value(logp: jax.Array, sign: float, loss: Any = loss, count: str = count) -> jax.Array:
            return loss(logp_BT=logp, **{**far, "advantage_B": jnp.full(4, sign, jnp.float32), count: 4})[0]

        slope_of = jax.jit(jax.grad(value))
        for sign in (1.0, -1.0):
            slope = slope_of(jnp.asarray(LOGP, jnp.float32), sign)
            assert np.isfinite(slope).all()
            assert np.any(slope) == (d > 0 and sign < 0)  # else the clip, or a ratio of zero, leaves nothing


def test_group_standardized_by_hand() -> None:
    """Guards the sample's standard deviation, invalid responses, and a group without spread or comparison."""
    reward = np.array([[1.0, 3.0, 5.0, 100.0], [2.0, 2.0, 2.0, 2.0], [7.0, 0.0, 0.0, 0.0]])
    valid = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]], bool)
    expected = [[-2 / (2 + 1e-4), 0.0, 2 / (2 + 1e-4), 0.0], [0.0] * 4, [0.0] * 4]
    np.testing.assert_allclose(group_standardized(reward, valid), expected, rtol=1e-12)
