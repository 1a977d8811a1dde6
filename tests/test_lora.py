"""Adapters and quantised leaves in the model: products against float64 NumPy, stacked, sliced and scanned alike."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afm_rl.config import ModelConfig
from afm_rl.dense import dense
from afm_rl.lora import PROJECTIONS, LoraWeight, attach, init_lora, merge, projection_shapes
from afm_rl.model import forward, logits
from afm_rl.parameters import ParamSpec, param_specs
from afm_rl.quantized import Int8Embedding, PalettizedWeight, dequantize_params

CONFIG = ModelConfig(32, 16, 24, 2, 4, 2, 8)
TOKENS = np.arange(12).reshape(1, 12) % 32


def random_params(config: ModelConfig = CONFIG, seed: int = 0) -> dict[str, Any]:
    """Parameters of a model, drawn by NumPy (which compiles nothing)."""
    rng = np.random.default_rng(seed)

    def draw(spec: ParamSpec) -> jax.Array:
        return jnp.ones(spec.shape) if spec.std is None else jnp.asarray(spec.std * rng.normal(size=spec.shape), "float32")

    return jax.tree.map(draw, param_specs(config), is_leaf=lambda leaf: isinstance(leaf, ParamSpec))


def random_lora(rank: int, seed: int = 1) -> dict[str, Any]:
    """An adapter whose b is not zero."""
    rng = np.random.default_rng(seed)
    layers = {}
    for name, (out, fan_in) in projection_shapes(CONFIG).items():
        a, b = rng.normal(size=(2, rank, fan_in)) / 4, rng.normal(size=(2, out, rank)) / 10
        layers[name] = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
    return {"layers": layers}


def random_palettized(shape: tuple[int, ...], *, axis: int, group_size: int, seed: int = 0) -> PalettizedWeight:
    rng = np.random.default_rng(seed)
    groups = -(-shape[-2:][axis] // group_size)
    lut = np.sort(rng.normal(size=(*shape[:-2], groups, 16)) / 4, axis=-1).astype(np.float16)
    indices = rng.integers(0, 16, shape).astype(np.uint8)
    return PalettizedWeight(jnp.asarray(lut), jnp.asarray(indices), axis, group_size)


def loop_dequantize(leaf: PalettizedWeight) -> np.ndarray:
    """The definition, weight by weight."""
    lut, indices = np.asarray(leaf.lut, np.float64), np.asarray(leaf.indices)
    weight = np.empty(indices.shape)
    for layer, o, i in np.ndindex(*indices.shape):
        group = (o if leaf.axis == 0 else i) // leaf.group_size
        weight[layer, o, i] = lut[layer, group, indices[layer, o, i]]
    return weight


@jax.jit
def run(params: Any) -> jax.Array:
    hidden = forward(params, TOKENS, config=CONFIG)
    return logits(params, hidden, CONFIG)


@pytest.mark.parametrize("axis", [0, 1])
def test_dequantize_is_the_definition_stacked_and_per_layer(axis: int) -> None:
    """Guards the grouping along either axis, a short last group, and the slice of one layer."""
    leaf = random_palettized((3, 10, 14), axis=axis, group_size=4)
    expected = loop_dequantize(leaf)
    np.testing.assert_array_equal(leaf.dequantize(), expected)
    np.testing.assert_array_equal(jax.tree.map(lambda w: w[1], leaf).dequantize(), expected[1])
    _, scanned = jax.lax.scan(lambda carry, layer: (carry, layer.dequantize()), 0, leaf)
    np.testing.assert_array_equal(scanned, expected)
    assert leaf.shape == (3, 10, 14)


def test_int8_embedding_dequantizes_by_row() -> None:
    """Guards the channel: one scale per vocabulary entry, not per column."""
    leaf = Int8Embedding(jnp.array([[127, -1], [10, 0]], jnp.int8), jnp.array([0.5, 2.0], jnp.float32))
    np.testing.assert_array_equal(leaf.dequantize(), [[63.5, -0.5], [20.0, 0.0]])


def test_lora_product_against_float64() -> None:
    """Guards the scale alpha / rank and the order b @ a, over plain and palettized bases."""
    rng = np.random.default_rng(0)
    x, a, b = rng.normal(size=(5, 14)), rng.normal(size=(1, 3, 14)), rng.normal(size=(1, 10, 3))
    base = random_palettized((1, 10, 14), axis=0, group_size=4)
    for leaf in (base, base.dequantize()):
        stacked = LoraWeight(leaf, jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), scale=8 / 3)
        layer = jax.tree.map(lambda w: w[0], stacked)
        expected = x @ (loop_dequantize(base)[0] + 8 / 3 * b[0] @ a[0]).T
        np.testing.assert_allclose(dense(jnp.asarray(x, jnp.float32), layer), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_fresh_adapter_changes_nothing_and_learns() -> None:
    """Guards b = 0, a with std 1/sqrt(in) and different in every projection, and the gradient that reaches b."""
    layers = attach(random_params(), lora := init_lora(CONFIG, 16, jax.random.key(1)), alpha=8, rank=16)["layers"]
    for name, (_, fan_in) in projection_shapes(CONFIG).items():
        assert abs(float(jnp.std(lora["layers"][name]["a"])) * fan_in**0.5 - 1) < 0.15
    assert float(jnp.abs(lora["layers"]["gate"]["a"] - lora["layers"]["up"]["a"]).max()) > 0.1
    assert set(layers) - {"attn_norm", "q_norm", "k_norm", "mlp_norm"} == set(PROJECTIONS)
    leaf, x = jax.tree.map(lambda w: w[0], layers["down"]), jnp.ones((1, CONFIG.ffn_dim))
    np.testing.assert_array_equal(dense(x, leaf), dense(x, leaf.base))
    gradient = jax.grad(lambda leaf: dense(x, leaf).sum())(leaf)
    assert float(jnp.abs(gradient.b).min()) > 0
    assert float(jnp.abs(gradient.a).max()) == 0


@pytest.mark.parametrize("quantized", [False, True])
def test_attached_merged_and_jitted_agree(quantized: bool) -> None:
    """Guards the attached forward pass (scan included) against one over folded weights, with all seven adapted."""
    params = random_params()
    if quantized:
        for i, (name, shape) in enumerate(projection_shapes(CONFIG).items()):
            params["layers"][name] = random_palettized((2, *shape), axis=0, group_size=16, seed=i)
        values = np.random.default_rng(5).integers(-127, 128, (32, 16)).astype(np.int8)
        params["embed"]["weight"] = Int8Embedding(jnp.asarray(values), jnp.full(32, 0.003))
    lora = random_lora(4)
    attached = attach(params, lora, alpha=8, rank=4)
    plain = dequantize_params(merge(attached))
    assert set(plain["layers"]) == set(params["layers"])
    assert jax.tree.map(jnp.shape, plain) == jax.tree.map(lambda s: s.shape, param_specs(CONFIG))
    np.testing.assert_allclose(run(attached), run(plain), rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(run(plain) - run(dequantize_params(params))).max()) > 0.01


def test_partial_adapter_attaches() -> None:
    """Guards adapters from elsewhere that cover only some projections, the scale, and that the base is not copied."""
    params = random_params()
    lora = random_lora(4)
    attached = attach(params, {"layers": {"v": lora["layers"]["v"]}}, alpha=8, rank=4)
    assert isinstance(attached["layers"]["v"], LoraWeight)
    assert attached["layers"]["v"].base is params["layers"]["v"]
    assert attached["layers"]["v"].scale == 2.0
    assert attached["layers"]["q"] is params["layers"]["q"]
    assert not isinstance(params["layers"]["v"], LoraWeight)


def test_misfits_are_refused() -> None:
    """Guards the three ways an adapter can be another model's."""
    params = random_params()
    lora = random_lora(4)
    with pytest.raises(ValueError, match="adapter of rank 8 does not fit projection"):
        attach(params, lora, alpha=8, rank=8)
    with pytest.raises(ValueError, match="does not fit projection"):
        attach(random_params(CONFIG.replace(ffn_dim=8)), lora, alpha=8, rank=4)
    with pytest.raises(ValueError, match="'embed'; the projections are: q, k"):
        attach(params, {"layers": {"embed": lora["layers"]["q"]}}, alpha=8, rank=4)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        init_lora(CONFIG, 0, jax.random.key(0))
