"""From a checkpoint to a loss: model, token log-probabilities and objectives together, against TRL's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from afm_rl.config import ModelConfig
from afm_rl.huggingface import load_params
from afm_rl.model import forward, logits
from afm_rl.objectives.mdloo import leave_one_out, mdloo_loss
from afm_rl.objectives.sequence import sequence_logp, token_logps
from afm_rl.parameters import Params

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def checkpoint() -> tuple[ModelConfig, Params]:
    config, params = load_params(FIXTURES / "qwen3_tiny")
    return config, jax.tree.map(jnp.asarray, params)


def policy_logps(params: Params, tokens: Any, config: ModelConfig) -> jax.Array:
    hidden = forward(params, jnp.asarray(tokens), config=config)
    return token_logps(logits(params, hidden, config), tokens)


def test_reference_log_probabilities_match_trl(checkpoint: tuple[ModelConfig, Params]) -> None:
    """Guards what DPO and IPO are fed: summed log-probabilities of completions, the end of sequence included."""
    config, params = checkpoint
    z = np.load(FIXTURES / "preference_losses.npz")
    logp = jax.jit(policy_logps, static_argnames="config")(params, z["input_ids"], config=config)
    np.testing.assert_allclose(sequence_logp(logp, z["completion_mask"]), z["ref_logps_f64"], rtol=1e-5)


@pytest.mark.slow
def test_mdloo_gradient_norm_matches_trl(checkpoint: tuple[ModelConfig, Params]) -> None:
    """Guards sequence-level ratio, sum over tokens and mean over sequences: TRL's gradient norm, 43.102, at theta_k."""
    config, params = checkpoint
    z, name = np.load(FIXTURES / "rloo.npz"), "norm0_beta0.0"
    assert z[f"prompt_mask/{name}"].all()
    tokens = np.concatenate([z[f"prompt_ids/{name}"], z[f"completion_ids/{name}"]], axis=1).astype(np.int32)
    mask = np.pad(z[f"completion_mask/{name}"], ((0, 0), (5, 0))).astype(np.float32)
    advantage = leave_one_out(z["rewards"]).reshape(-1)

    def loss(params: Params) -> tuple[jax.Array, jax.Array]:
        logp = policy_logps(params, tokens, config)
        behavior = jax.lax.stop_gradient(logp)
        value, _ = mdloo_loss(logp_BT=logp, behavior_logp_BT=behavior, advantage_B=advantage, mask_BT=mask, gamma=1.0)
        return value, behavior

    grads, behavior = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(sequence_logp(behavior, mask), z[f"old_logps/{name}"], atol=2e-4)
    np.testing.assert_allclose(optax.global_norm(grads), z[f"grad_norm/{name}"], rtol=1e-4)
