"""The Transformer against a NumPy float64 one written from section 2's words, and what packing and adapters rely on."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import afm_rl.model as model_module
from afm_rl.compute import Compute
from afm_rl.config import PRESETS, ModelConfig
from afm_rl.lora import PROJECTIONS, attach
from afm_rl.model import Transformer, dropout, forward, logits, rms_norm, rope, rotation, swiglu
from afm_rl.parameters import Params, ParamSpec, init_params, param_specs

CONFIG = ModelConfig(19, 16, 24, 2, 4, 2, 6, rope_base=100.0, max_positions=64)
#: Where the number of layers does not matter, one compiles faster.
SHALLOW = CONFIG.replace(num_layers=1)
TOKENS = np.random.default_rng(0).integers(0, 19, size=(2, 9)).astype(np.int32)


def random_params(config: ModelConfig) -> Params:
    """Parameters at their declared scale, with norms that are not ones, so that a forgotten gain shows."""
    rng = np.random.default_rng(0)

    def draw(spec: ParamSpec) -> np.ndarray:
        values = rng.uniform(0.5, 1.5, spec.shape) if spec.std is None else spec.std * rng.normal(size=spec.shape)
        return values.astype(np.float32)

    return jax.tree.map(draw, param_specs(config), is_leaf=lambda x: isinstance(x, ParamSpec))


@partial(jax.jit, static_argnames=("config", "compute", "dropout_rate"))
def run(params: Params, tokens_BT: jax.Array, *, config: ModelConfig = CONFIG, **options: Any) -> jax.Array:
    """Logits, one compiled program per kind of call."""
    return logits(params, forward(params, tokens_BT, config=config, **options), config)


@pytest.fixture(scope="module")
def params() -> Params:
    return random_params(CONFIG)


def np_norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain


def np_rope(x: np.ndarray, position: int, base: float) -> np.ndarray:
    """Each half-split pair (i, i + H/2) as a complex number, turned by position * base^(-2i/H)."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * position * base ** (-2.0 * np.arange(half) / (2 * half)))
    return np.concatenate([turned.real, turned.imag], axis=-1)


def np_forward(params: Params, tokens_T: np.ndarray, c: ModelConfig) -> np.ndarray:
    """Logits [T, V] of one sequence, one token and one head at a time."""
    w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = w["embed"]["weight"][tokens_T]
    for i in range(c.num_layers):
        layer = {name: leaf[i] for name, leaf in w["layers"].items()}
        h = np_norm(x, layer["attn_norm"], c.norm_eps)
        heads = {n: (h @ layer[n].T).reshape(len(x), -1, c.head_dim) for n in "qkv"}
        for t in range(len(x)):
            for n in "qk":
                normed = np_norm(heads[n][t], layer[f"{n}_norm"], c.norm_eps)
                heads[n][t] = np_rope(normed, t, c.rope_base)
        mixed = np.zeros((len(x), c.num_heads, c.head_dim))
        for t, n in np.ndindex(len(x), c.num_heads):
            kv = n // (c.num_heads // c.num_kv_heads)
            scores = heads["k"][: t + 1, kv] @ heads["q"][t, n] / np.sqrt(c.head_dim)
            mixed[t, n] = np.exp(scores) / np.exp(scores).sum() @ heads["v"][: t + 1, kv]
        x = x + mixed.reshape(len(x), -1) @ layer["o"].T
        h = np_norm(x, layer["mlp_norm"], c.norm_eps)
        gate = h @ layer["gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["up"].T)) @ layer["down"].T
    table = w["embed" if c.tie_embeddings else "lm_head"]["weight"]
    return np_norm(x, w["final_norm"], c.norm_eps) @ table.T


@pytest.mark.parametrize("config", [CONFIG, SHALLOW.replace(tie_embeddings=False)], ids=["tied", "untied"])
def test_logits_match_the_float64_reference(config: ModelConfig) -> None:
    """Guards every piece of the architecture and their order: QK-norm before RoPE, pre-norm, SwiGLU, output table."""
    params = random_params(config)
    expected = [np_forward(params, row, config) for row in TOKENS]
    found = run(params, TOKENS, config=config)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_packed_documents_equal_documents_alone(params: Params) -> None:
    """Guards pre-training on packed rows: segments and given positions; without segments the result differs."""
    short, long = TOKENS[0, :4], TOKENS[1, :6]
    row = np.concatenate([short, long, [0, 0]])[None]
    segments = np.array([[1] * 4 + [2] * 6 + [0] * 2])
    positions = np.array([[*range(4), *range(6), 0, 0]])
    packed = run(params, row, positions_BT=positions, segments_BT=segments)[0]
    np.testing.assert_allclose(packed[:4], np_forward(params, short, CONFIG), atol=1e-4)
    np.testing.assert_allclose(packed[4:10], np_forward(params, long, CONFIG), atol=1e-4)
    stretched = run(params, row, positions_BT=3 * positions, segments_BT=segments)[0]
    assert np.abs(stretched - packed)[1:4].max() > 0.01
    leaky = run(params, row, positions_BT=positions, segments_BT=np.ones_like(segments))[0]
    assert np.abs(leaky - packed)[4:10].max() > 0.01


def test_the_future_changes_nothing(params: Params) -> None:
    """Guards causality through the whole model, bit for bit."""
    changed = TOKENS.copy()
    changed[:, 5:] = (changed[:, 5:] + 1) % CONFIG.vocab_size
    before, after = (np.asarray(run(params, tokens)) for tokens in (TOKENS, changed))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any()


def test_a_scanned_model_equals_an_unrolled_one(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards deep models, whose layers are scanned where small ones are unrolled."""

    def hidden() -> jax.Array:
        return jax.jit(lambda p: forward(p, jnp.asarray(TOKENS), config=CONFIG))(params)

    unrolled = hidden()
    monkeypatch.setattr(model_module, "MAX_UNROLLED_LAYERS", 1)
    np.testing.assert_allclose(hidden(), unrolled, atol=1e-5)


def test_the_module_is_the_function() -> None:
    """Guards the object that users hold: `model(tokens)` is forward and logits."""
    params = random_params(SHALLOW)
    found = nnx.jit(lambda model, tokens: model(tokens))(Transformer(SHALLOW, params), TOKENS)
    np.testing.assert_allclose(found, run(params, TOKENS, config=SHALLOW), atol=1e-6)


def test_rms_norm_by_hand() -> None:
    """Guards the mean of squares (not the sum, not the variance), the gain, and float32 inside bfloat16."""
    x, gain = jnp.array([[3.0, 5.0]]), jnp.array([1.0, 2.0])
    rms = math.sqrt((9 + 25) / 2 + 1e-5)
    np.testing.assert_allclose(rms_norm(x, gain, 1e-5), [[3 / rms, 10 / rms]], rtol=1e-6)
    low = rms_norm(x.astype(jnp.bfloat16), gain, 1e-5)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(low, np.float32), [[3 / rms, 10 / rms]], rtol=4e-3)


def test_rope_is_relative() -> None:
    """Guards RoPE: products depend on distance alone, lengths stay, position 0 is the identity, as in the reference."""
    q, k = np.random.default_rng(1).normal(size=(2, 1, 6)).astype(np.float32)

    def at(x: np.ndarray, position: int) -> np.ndarray:
        return np.asarray(rope(jnp.asarray(x), rotation(jnp.int32(position), CONFIG)))

    np.testing.assert_allclose(at(q, 7), np_rope(q.astype(np.float64), 7, 100.0), atol=1e-5)
    np.testing.assert_array_equal(at(q, 0), q)
    np.testing.assert_allclose(np.linalg.norm(at(q, 31)), np.linalg.norm(q), rtol=1e-6)
    np.testing.assert_allclose((at(q, 9) * at(k, 4)).sum(), (at(q, 25) * at(k, 20)).sum(), atol=1e-5)
    assert abs((at(q, 9) * at(k, 4)).sum() - (at(q, 9) * at(k, 3)).sum()) > 0.01


def test_dropout_keeps_the_mean() -> None:
    """Guards inverted dropout at the rate asked for, and its absence without a key or a rate."""
    x = jnp.ones((200, 200))
    dropped = np.asarray(dropout(x, 0.1, jax.random.key(0)))
    assert set(np.unique(dropped)) == {np.float32(0.0), np.float32(1 / 0.9)}
    np.testing.assert_allclose((dropped == 0).mean(), 0.1, atol=0.005)
    assert dropout(x, 0.1, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


def test_dropout_in_the_model_follows_its_key() -> None:
    """Guards resumable training: one key gives one result, another key another."""
    params = random_params(SHALLOW)
    first, again, other = (
        np.asarray(run(params, TOKENS, config=SHALLOW, dropout_rate=0.1, key=jax.random.key(seed))) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first != np.asarray(run(params, TOKENS, config=SHALLOW))).any()


def test_an_adapter_on_the_model_equals_the_merged_model() -> None:
    """Guards the dispatch of `dense` on LoRA leaves under the scan over layers."""
    params, rng = random_params(SHALLOW), np.random.default_rng(3)
    shapes = {name: params["layers"][name].shape for name in PROJECTIONS}
    lora = {
        name: {
            "a": rng.normal(size=(L, 2, fan_in)).astype(np.float32) / 4,
            "b": rng.normal(size=(L, out, 2)).astype(np.float32) / 4,
        }
        for name, (L, out, fan_in) in shapes.items()
    }
    merged = {name: params["layers"][name] + 2.0 * np.matmul(factors["b"], factors["a"]) for name, factors in lora.items()}
    found = run(attach(params, {"layers": lora}, alpha=4.0, rank=2), TOKENS, config=SHALLOW)
    expected = run({**params, "layers": {**params["layers"], **merged}}, TOKENS, config=SHALLOW)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - run(params, TOKENS, config=SHALLOW)).max() > 0.1


def test_bfloat16_compute_is_close() -> None:
    """Guards mixed precision: logits in float32, within bfloat16's error of the exact ones, but not equal to them."""
    params = random_params(SHALLOW)
    found = run(params, TOKENS, config=SHALLOW, compute=Compute(dtype="bfloat16"))
    assert found.dtype == jnp.float32
    error = np.abs(found - run(params, TOKENS, config=SHALLOW)).max()
    assert 1e-4 < error < 0.15


@pytest.mark.parametrize("name", PRESETS)
def test_declared_parameters_add_up(name: str) -> None:
    """Guards `num_params` (what a plan shows) against the shapes that are made."""
    specs = jax.tree.leaves(param_specs(PRESETS[name]), is_leaf=lambda x: isinstance(x, ParamSpec))
    assert sum(math.prod(spec.shape) for spec in specs) == PRESETS[name].num_params


def test_the_on_device_preset_has_the_papers_size() -> None:
    """Guards Table 1: 2.58B non-embedding and 0.15B embedding parameters (cut, not rounded, to two digits)."""
    config = PRESETS["afm-on-device"]
    embedding = config.vocab_size * config.dim
    assert int(embedding / 1e7) == 15
    assert int((config.num_params - embedding) / 1e7) == 258


def test_initialisation() -> None:
    """Guards the scale of every kind of parameter, norms at one, and that leaves of one shape differ."""
    config = ModelConfig(64, 64, 256, 1, 4, 2, 16)
    start = jax.jit(init_params, static_argnums=0)
    params = start(config, jax.random.key(0))
    layers = params["layers"]
    for leaf, std in ((params["embed"]["weight"], 1 / 8), (layers["q"], 1 / 8), (layers["down"], 1 / 16)):
        np.testing.assert_allclose(np.std(leaf), std, rtol=0.05)
    np.testing.assert_array_equal(layers["attn_norm"], 1.0)
    assert not np.array_equal(layers["gate"], layers["up"])
    assert not np.array_equal(layers["gate"], start(config, jax.random.key(1))["layers"]["gate"])


@pytest.mark.parametrize(
    "remat", [pytest.param("full", marks=pytest.mark.slow), pytest.param("dots", marks=pytest.mark.slow), "names"]
)
def test_rematerialisation_changes_memory_only(remat: str) -> None:
    """Guards the policies: the same gradients, from a program that keeps less between its passes."""
    config = ModelConfig(16, 32, 64, 10, 2, 1, 16)
    params, tokens = random_params(config), jnp.zeros((4, 32), jnp.int32).at[:, ::3].set(5)

    @partial(jax.jit, static_argnames="compute")
    def gradient(params: Params, compute: Compute) -> Params:
        return jax.grad(lambda p: forward(p, tokens, config=config, compute=compute).var())(params)

    def kept_bytes(compute: Compute) -> int:
        return gradient.lower(params, compute).compile().memory_analysis().temp_size_in_bytes

    found, expected = gradient(params, Compute(remat=remat)), gradient(params, Compute())  # type: ignore[arg-type]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), found, expected)
    assert kept_bytes(Compute(remat=remat)) < 0.9 * kept_bytes(Compute())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown rematerialisation policy 'some'; known: none, full, dots, names"):
        gradient(params, Compute(remat="some"))  # type: ignore[arg-type]


def test_swiglu_and_its_gradient() -> None:
    """silu(gate) * up and both derivatives against float64 NumPy; in bfloat16, one rounding of each."""
    rng = np.random.default_rng(3)
    gate, up, g = (np.asarray(jnp.asarray(rng.normal(size=(4, 6)), jnp.bfloat16), np.float64) for _ in range(3))
    sigmoid = 1 / (1 + np.exp(-gate))
    expected = gate * sigmoid * up, g * up * (sigmoid + gate * sigmoid * (1 - sigmoid)), g * gate * sigmoid
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 2.0**-8)):
        out, pull = jax.vjp(swiglu, jnp.asarray(gate, dtype), jnp.asarray(up, dtype))
        for ours, exact in zip((out, *pull(jnp.asarray(g, dtype))), expected, strict=True):
            assert ours.dtype == dtype
            np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=tolerance, atol=1e-6)


def test_rotation_is_computed_once() -> None:
    """XLA on CPU leaves one cosine in the program of all layers, not one for each user of it."""
    params = init_params(CONFIG, jax.random.key(0))
    tokens = jnp.zeros((2, 5), jnp.int32)
    program = jax.jit(lambda params, tokens: forward(params, tokens, config=CONFIG)).lower(params, tokens).compile()
    assert program.as_text().count(" cosine(") == 1
