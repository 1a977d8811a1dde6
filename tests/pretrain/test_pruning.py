"""Mask learning and pruning of the FFN hidden dimension: exact where the mask is hard; it finds the useful units."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afm_rl.config import ModelConfig
from afm_rl.model import forward, logits
from afm_rl.parameters import ParamSpec, param_specs
from afm_rl.policy_losses import supervised
from afm_rl.recipe import OptimizerSpec
from afm_rl.training import create_state, make_train_step
from pretrain.pruning import EPS_END, EPS_START, eps_at, init_scores, kept_units, mask_view, masked_params, prune

CONFIG = ModelConfig(16, 16, 24, 2, 2, 1, 8)
TOKENS = np.random.default_rng(0).integers(0, 16, (4, 12)).astype(np.int32)


def random_params(config: ModelConfig) -> dict[str, Any]:
    """Parameters drawn by NumPy (which compiles nothing)."""
    rng = np.random.default_rng(0)

    def draw(spec: ParamSpec) -> jax.Array:
        return jnp.ones(spec.shape) if spec.std is None else jnp.asarray(spec.std * rng.normal(size=spec.shape), "float32")

    return jax.tree.map(draw, param_specs(config), is_leaf=lambda leaf: isinstance(leaf, ParamSpec))


PARAMS = random_params(CONFIG)


@partial(jax.jit, static_argnames="config")
def run(params: Any, config: ModelConfig) -> jax.Array:
    hidden = forward(params, TOKENS, config=config)
    return logits(params, hidden, config)


def test_pruned_model_equals_the_hard_masked_one() -> None:
    """Guards which rows of gate and up and which columns of down are kept: the smaller model computes the same."""
    params = dict(PARAMS)
    scores_LF = jnp.asarray(np.random.default_rng(1).normal(size=(2, 24)), jnp.float32)
    small, config = prune(params, scores_LF, 9), CONFIG.replace(ffn_dim=9)
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(lambda s: s.shape, param_specs(config))
    masked = run(masked_params(params, scores_LF, 9, 1e-4), CONFIG)
    np.testing.assert_allclose(run(small, config), masked, rtol=1e-5, atol=1e-5)
    unmasked = run(masked_params(params, scores_LF, 24, 1.0), CONFIG)
    assert np.abs(masked - unmasked).max() > 0.01


def test_kept_units_stay_in_order_per_layer() -> None:
    """Guards the order of units (by index, not by score), the independence of layers, and ties."""
    scores = np.zeros((2, 24), np.float32)
    scores[0, [20, 3]], scores[1, [7, 23]] = [0.5, 0.9], [1.0, 2.0]
    np.testing.assert_array_equal(kept_units(jnp.asarray(scores), 3), [[0, 3, 20], [0, 7, 23]])
    small = prune(masked_params(PARAMS, jnp.asarray(scores), 3, 0.1), scores, 3)["layers"]
    np.testing.assert_array_equal(small["down"][0], PARAMS["layers"]["down"][0][:, np.array([0, 3, 20])])
    np.testing.assert_array_equal(small["up"][1], PARAMS["layers"]["up"][1][np.array([0, 7, 23])])
    assert "ffn_mask" not in small


def test_eps_falls_geometrically() -> None:
    """Guards both ends, the constant ratio, and a single step."""
    values = [eps_at(step, steps=5) for step in range(5)]
    assert values[0] == EPS_START
    np.testing.assert_allclose(values[-1], EPS_END)
    np.testing.assert_allclose(np.divide(values[1:], values[:-1]), (EPS_END / EPS_START) ** 0.25)
    assert eps_at(0, steps=1) == EPS_START
    np.testing.assert_allclose(eps_at(99, steps=5), EPS_END)


@pytest.mark.slow
def test_mask_learning_finds_the_units_that_work() -> None:
    """Guards the whole path (view, objective, optimizer, eps from the batch): planted dead units lose their places."""
    params = dict(PARAMS)
    dead_LF = np.zeros((2, 24), bool)
    dead_LF[0, ::2], dead_LF[1, 1::2] = True, True
    down = jnp.where(dead_LF[:, None, :], 0.0, 4.0 * params["layers"]["down"])
    params["layers"] = {**params["layers"], "down": down}
    masks_off = masked_params(params, jnp.zeros((2, 24)), 24, 1.0)
    taught = np.asarray(run(masks_off, CONFIG))  # the whole model is to be imitated, with half of its units

    def loss(trained: Any, frozen: Any, batch: Any, key: jax.Array) -> Any:
        del key
        return jnp.square(run(mask_view(k=12)({"model": frozen, **trained}, {}, batch), CONFIG) - taught).mean(), {}

    optimizer = OptimizerSpec("afm", 0.003).build(width=CONFIG.dim)
    state, step = create_state({"scores": init_scores(CONFIG)}, optimizer), make_train_step(loss, optimizer)
    for index in range(100):
        state, _ = step(state, params, {"eps": np.float32(eps_at(index, steps=100))})
    kept = np.asarray(kept_units(state.params["scores"], 12))
    lost = [int(dead_LF[layer, kept[layer]].sum()) for layer in range(2)]
    assert max(lost) == 0, f"dead units kept per layer: {lost}"


@pytest.mark.slow
def test_model_and_scores_are_trained_together() -> None:
    """Guards the trained tree {"model", "scores"}: both move, and the mask's sum stays k throughout."""
    config = CONFIG.replace(num_layers=1)
    optimizer = OptimizerSpec("afm", 0.003).build(width=config.dim)
    start = {"model": random_params(config), "scores": init_scores(config)}
    state = create_state(start, optimizer)
    step = make_train_step(supervised(config, view=mask_view(k=10)), optimizer)
    mask = np.ones(TOKENS.shape, np.float32)
    mask[:, 0] = 0
    losses = []
    for index in range(20):
        batch = {"tokens_BT": TOKENS, "mask_BT": mask, "eps": np.float32(eps_at(index, steps=20))}
        state, metrics = step(state, {}, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert float(jnp.abs(state.params["scores"]).max()) > 0.01
    learned = mask_view(k=10)(state.params, {}, {})["layers"]["ffn_mask"]  # without eps: the last temperature
    np.testing.assert_allclose(learned.sum(-1), 10, rtol=1e-5)


def test_misfits_are_refused() -> None:
    """Guards scores of another model and an impossible k."""
    params = dict(PARAMS)
    with pytest.raises(ValueError, match=r"cannot keep 5 units of \(2, 24\)"):
        prune(params, jnp.zeros((2, 23)), 5)
    with pytest.raises(ValueError, match="cannot keep 25 units"):
        prune(params, jnp.zeros((2, 24)), 25)
