"""Token log-probabilities against torch's float64 ones, their alignment, and what a mask lets through."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afm_rl.objectives.sequence import response_mask, score_targets, sequence_logp, token_logps, token_mean

FIXTURES = Path(__file__).parents[1] / "fixtures"
score = jax.jit(score_targets, static_argnames="temperature")


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_token_logps_match_torch() -> None:
    """Guards alignment and precision: entry t is log p(token t | tokens < t), as torch computed it in float64."""
    z = np.load(FIXTURES / "qwen3_tiny_forward.npz")
    valid = z["token_valid"].astype(bool)
    with jax.enable_x64(True):
        logps = np.asarray(jax.jit(token_logps)(jnp.asarray(z["logits_f64"]), z["input_ids"]))
    assert logps.dtype == np.float64
    np.testing.assert_array_equal(logps[:, 0], 0.0)
    np.testing.assert_allclose(logps[:, 1:][valid], z["token_logps_f64"][valid], rtol=1e-12)
    mask = np.pad(z["token_valid"], ((0, 0), (1, 0)))
    np.testing.assert_allclose(-token_mean(logps, mask), z["loss_f64"], rtol=1e-6)


def test_temperature_divides_the_logits() -> None:
    """Guards the sampling temperature: log softmax of logits / T, in float32 from bfloat16 logits."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 5)).astype(np.float32)
    tokens = np.array([[1, 2, 3], [4, 0, 1]])
    expected = log_softmax(logits / 0.7)
    got = np.asarray(score(jnp.asarray(logits), tokens, temperature=0.7).logp_BT)
    for b, t in np.ndindex(2, 2):
        np.testing.assert_allclose(got[b, t + 1], expected[b, t, tokens[b, t + 1]], rtol=1e-5)
    assert score(jnp.asarray(logits, jnp.bfloat16), tokens).logp_BT.dtype == jnp.float32
    with pytest.raises(ValueError, match="temperature"):
        token_logps(jnp.asarray(logits), tokens, temperature=0.0)
    with pytest.raises(ValueError, match="tokens_BT must have shape"):
        token_logps(jnp.asarray(logits), tokens[:, :2])


def test_is_top1_agrees_with_an_argmax() -> None:
    """Guards the accuracy that is computed without an argmax."""
    rng = np.random.default_rng(1)
    logits, tokens = rng.normal(size=(3, 6, 4)), rng.integers(0, 4, (3, 6))
    got = np.asarray(score(jnp.asarray(logits), tokens).is_top1_BT)
    np.testing.assert_array_equal(got[:, 1:], logits.argmax(-1)[:, :-1] == tokens[:, 1:])
    assert not got[:, 0].any()


def test_masked_entries_change_nothing_even_if_not_finite() -> None:
    """Guards sums and their gradients against what padding holds: NaN times zero would be NaN."""
    logp = jnp.array([[0.0, -1.0, -2.0, jnp.nan], [0.0, -0.5, -jnp.inf, jnp.nan]])
    mask = jnp.array([[0.0, 1, 1, 0], [0, 1, 0, 0]])
    np.testing.assert_allclose(sequence_logp(logp, mask), [-3.0, -0.5])
    np.testing.assert_allclose(token_mean(logp, mask), -3.5 / 3)
    np.testing.assert_array_equal(jax.grad(lambda x: sequence_logp(x, mask).sum())(logp), mask)
    assert float(token_mean(logp, jnp.zeros_like(mask))) == 0.0
    with pytest.raises(ValueError, match="mask_BT"):
        sequence_logp(logp, mask[:1])


def test_response_mask_covers_the_response_only() -> None:
    """Guards against training on the prompt or on padding; token 0 is never a target, an empty response has none."""
    got = response_mask(prompt_length_B=jnp.array([2, 0, 3]), total_length_B=jnp.array([4, 2, 3]), num_tokens=5)
    np.testing.assert_array_equal(got, [[0, 0, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
