"""Cross-entropy against torch's loss, its gradient against the closed form, and the z-loss by hand."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from afm_rl.objectives import supervised
from afm_rl.objectives.sequence import score_targets

FIXTURES = Path(__file__).parents[1] / "fixtures"


@partial(jax.jit, static_argnames="z_loss")
def cross_entropy(
    logits: jax.Array, tokens: jax.Array, mask: jax.Array, z_loss: float = 0.0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The objective from logits."""
    return supervised.cross_entropy(score_targets(logits, tokens), mask, z_loss=z_loss)


def test_cross_entropy_matches_torch() -> None:
    """Guards the token mean (not a mean of sequence means: the rows have different lengths)."""
    z = np.load(FIXTURES / "qwen3_tiny_forward.npz")
    mask = np.pad(z["token_valid"], ((0, 0), (1, 0))).astype(np.float64)
    assert len(set(mask.sum(-1))) == 2
    with jax.enable_x64(True):
        loss, metrics = cross_entropy(jnp.asarray(z["logits_f64"]), z["input_ids"], mask)
    np.testing.assert_allclose(loss, z["loss_f64"], rtol=1e-10)
    assert int(metrics["tokens"]) == mask.sum()


def test_gradient_is_the_closed_form() -> None:
    """Guards mask / N * [softmax - onehot + 2 z log Z softmax], at the position BEFORE the target."""
    rng = np.random.default_rng(0)
    logits, tokens = 2.0 * rng.normal(size=(2, 5, 7)), rng.integers(0, 7, (2, 5))
    mask = np.array([[0, 0, 1, 1, 0], [0, 1, 1, 1, 1.0]])
    with jax.enable_x64(True):
        got = jax.grad(lambda x: cross_entropy(x, tokens, mask, z_loss=0.3)[0])(jnp.asarray(logits))
    log_z = np.log(np.exp(logits).sum(-1, keepdims=True))
    softmax, weight = np.exp(logits - log_z), np.pad(mask[:, 1:], ((0, 0), (0, 1)))[..., None] / mask.sum()
    onehot = np.eye(7)[np.pad(tokens[:, 1:], ((0, 0), (0, 1)))]
    np.testing.assert_allclose(got, weight * (softmax * (1 + 0.6 * log_z) - onehot), rtol=1e-10, atol=1e-14)


def test_z_loss_and_metrics_by_hand() -> None:
    """Guards the z-loss (uniform logits a over V tokens: log Z = a + log V) and that nll leaves it out."""
    logits, tokens = jnp.full((1, 3, 4), 2.0), jnp.array([[0, 1, 2]])
    loss, metrics = cross_entropy(logits, tokens, jnp.array([[0.0, 1, 1]]), z_loss=0.5)
    log_z = 2.0 + np.log(4.0)
    np.testing.assert_allclose(metrics["nll"], np.log(4.0), rtol=1e-6)
    np.testing.assert_allclose(metrics["log_z"], log_z, rtol=1e-6)
    np.testing.assert_allclose(loss, np.log(4.0) + 0.5 * log_z**2, rtol=1e-6)
    sharp = jnp.zeros((1, 3, 4)).at[0, 0, 1].set(5.0).at[0, 1, 3].set(5.0)
    np.testing.assert_allclose(cross_entropy(sharp, tokens, jnp.array([[0.0, 1, 1]]))[1]["accuracy"], 0.5)
