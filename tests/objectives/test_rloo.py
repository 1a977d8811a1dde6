"""RLOO against what TRL's RLOOTrainer computed: clipped losses, and the gradient of a whole model."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from afm_rl.huggingface import load_params
from afm_rl.objectives.mdloo import leave_one_out
from afm_rl.objectives.rloo import rloo_loss
from afm_rl.objectives.sequence import sequence_logp
from afm_rl.policy_losses import response_logps

FIXTURES = Path(__file__).parents[1] / "fixtures"


def test_clipped_losses_match_trl() -> None:
    """Guards the ratio (of sequences), the clip and its side for either sign of the advantage, sequence by sequence."""
    z = np.load(FIXTURES / "rloo.npz")
    ratio, advantage = z["log_ratio_f64"], z["advantages_f64"].reshape(-1)

    def loss(log_ratio: jax.Array, advantage: jax.Array) -> tuple[jax.Array, jax.Array]:
        parts = jnp.stack([jnp.zeros(()), 0.25 * log_ratio, 0.75 * log_ratio])[None]  # a response of two tokens
        mask, zeros = jnp.array([[0.0, 1, 1]]), jnp.zeros((1, 3))
        value, clipped = rloo_loss(
            logp_BT=parts, behavior_logp_BT=zeros, advantage_B=advantage[None], mask_BT=mask, clip=0.2, num_sequences=1
        )
        return value, clipped[0]

    with jax.enable_x64(True):
        values, clipped = jax.jit(jax.vmap(loss))(ratio, advantage)
        slopes = jax.jit(jax.vmap(jax.grad(lambda r, a: loss(r, a)[0])))(ratio, advantage)
    np.testing.assert_allclose(values, z["clipped_loss_per_seq_f64"], rtol=1e-12, atol=1e-14)
    beyond = ((ratio > np.log(1.2)) & (advantage > 0)) | ((ratio < np.log(0.8)) & (advantage < 0))
    assert 0 < beyond.sum() < beyond.size
    np.testing.assert_array_equal(clipped, beyond)
    np.testing.assert_allclose(slopes, np.where(beyond, 0, -advantage * np.exp(ratio)), rtol=1e-12)


@pytest.mark.slow
def test_gradient_norm_matches_trl() -> None:
    """Guards sums over tokens and the mean over sequences end to end: TRL's gradient norm, 43.102, at theta_k."""
    config, params = load_params(FIXTURES / "qwen3_tiny")
    params = jax.tree.map(jnp.asarray, params)
    z, name = np.load(FIXTURES / "rloo.npz"), "norm0_beta0.0"
    tokens = np.concatenate([z[f"prompt_ids/{name}"], z[f"completion_ids/{name}"]], axis=1).astype(np.int32)
    completion = z[f"completion_mask/{name}"].astype(np.float32)
    batch = {"tokens_BT": tokens, "mask_BT": completion, "first_B": np.full(len(tokens), 5, np.int32)}
    advantage = leave_one_out(z["rewards"]).reshape(-1)

    def loss(params: object) -> tuple[jax.Array, jax.Array]:
        logp = response_logps(params, batch, config=config)  # type: ignore[arg-type]
        old = jax.lax.stop_gradient(logp)
        value, _ = rloo_loss(
            logp_BT=logp, behavior_logp_BT=old, advantage_B=advantage, mask_BT=completion, clip=0.2, num_sequences=64
        )
        return value, old

    grads, behavior = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(sequence_logp(behavior, completion), z[f"old_logps/{name}"], atol=2e-4)
    np.testing.assert_allclose(optax.global_norm(grads), z[f"grad_norm/{name}"], rtol=1e-4)
