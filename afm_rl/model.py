"""The Transformer of section 2: tied embedding, pre-norm RMSNorm, QK-norm, grouped-query attention, SwiGLU, RoPE, no biases.

The parameters are declared in `afm_rl/parameters.py`. QK-norm comes before RoPE on half-split pairs: the order of Hugging
Face's Qwen3, taken for exact interchange, where axlearn normalises after RoPE on interleaved pairs. Under a mesh
(`afm_rl/sharding.py`) the residual stream lies cut over batch and sequence; XLA derives the rest from the parameters.

Shapes: B batch, T time, D model, F ffn, N query heads, K kv heads, H head dim, V vocab, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from afm_rl.attention import causal_attention
from afm_rl.compute import DEFAULT_COMPUTE, Compute
from afm_rl.config import ModelConfig
from afm_rl.dense import dense
from afm_rl.parameters import Params
from afm_rl.quantized import Int8Embedding
from afm_rl.sharding import BATCH, constrain, current_mesh

#: On CPU, layers are unrolled up to this depth: faster, at the price of compile time.
MAX_UNROLLED_LAYERS = 8
#: What rematerialisation by names keeps of a layer for the backward pass: the outputs of its two branches.
SAVED_NAMES = ("attention", "mlp")


def embedding_table(params: Params, name: str = "embed") -> jax.Array:
    """The [V, D] table of `embed` or `lm_head`, dequantised where it is stored as int8."""
    weight = params[name]["weight"]
    return weight.dequantize() if isinstance(weight, Int8Embedding) else weight


def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * gain over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale * gain).astype(x.dtype)


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up in float32, rounded once to the inputs' type; the gradient keeps nothing but the inputs."""
    wide = jnp.promote_types(gate.dtype, jnp.float32)
    return (jax.nn.silu(gate.astype(wide)) * up.astype(wide)).astype(gate.dtype)


def _swiglu_forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return swiglu(gate, up), (gate, up)


def _swiglu_backward(kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    wide = jnp.promote_types(g.dtype, jnp.float32)
    gate, up, wide_g = (x.astype(wide) for x in (*kept, g))
    sigmoid = jax.nn.sigmoid(gate)
    gate_gradient = wide_g * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    return gate_gradient.astype(g.dtype), (wide_g * gate * sigmoid).astype(g.dtype)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


class Rotation(NamedTuple):
    """Cosine and sine of the rotary embedding's angles, float32 [..., 1, H / 2]: one for all layers, queries and keys."""

    cos: jax.Array
    sin: jax.Array


def rotation(positions: jax.Array, config: ModelConfig) -> Rotation:
    """The rotation of every position. positions [...] int32 -> [..., 1, H / 2]."""
    half = config.head_dim // 2
    frequency = config.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency
    return Rotation(jnp.cos(angle), jnp.sin(angle))


def rope(x: jax.Array, angles: Rotation) -> jax.Array:
    """Rotary embedding on half-split pairs. x [..., heads, H]; `angles` of the axes of x before heads."""
    cos, sin = angles
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def _stored(angles: Rotation, tokens_BT: jax.Array) -> Rotation:
    """The same angles, computed once: XLA on CPU would compute every cosine again for each head of each unrolled layer.

    It fuses whatever is cheap to write down into all its users, but never through a branch it cannot predict: tokens are
    not negative, which only we know. Both branches give the same values.
    """
    if jax.default_backend() != "cpu" or current_mesh() is not None:
        return angles
    return jax.lax.cond(tokens_BT[0, 0] >= 0, lambda a: a, lambda a: Rotation(a.cos + 0.0 * a.sin, a.sin), angles)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; the identity at rate 0 or without a key."""
    if rate == 0.0 or key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def block(
    x: jax.Array,
    layer: Params,
    *,
    config: ModelConfig,
    angles: Rotation,
    attend: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]],
    dropout_rate: float = 0.0,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """One layer. `attend(q, k, v)` gives the mixed values and whatever the caller wants to carry out (a cache)."""
    attn_key, mlp_key = jax.random.split(key) if key is not None else (None, None)
    H, lead = config.head_dim, x.shape[:-1]
    with jax.named_scope("attention"):
        h = rms_norm(x, layer["attn_norm"], config.norm_eps)
        q = dense(h, layer["q"], split="out").reshape(*lead, config.num_heads, H)
        k = dense(h, layer["k"], split="out").reshape(*lead, config.num_kv_heads, H)
        v = dense(h, layer["v"], split="out").reshape(*lead, config.num_kv_heads, H)
        q = rope(rms_norm(q, layer["q_norm"], config.norm_eps), angles)
        k = rope(rms_norm(k, layer["k_norm"], config.norm_eps), angles)
        mixed, carry = attend(q, k, v)
        out = dense(mixed.reshape(*lead, config.num_heads * H), layer["o"], split="in")
        x = x + dropout(checkpoint_name(out, "attention"), dropout_rate, attn_key)
    with jax.named_scope("mlp"):
        h = rms_norm(x, layer["mlp_norm"], config.norm_eps)
        h = swiglu(dense(h, layer["gate"], split="out"), dense(h, layer["up"], split="out"))
        if "ffn_mask" in layer:  # Soft-Top-K masks over the FFN hidden units while they are being learnt (3.2.1, pruning)
            h = h * layer["ffn_mask"].astype(h.dtype)
        out = dense(h, layer["down"], split="in")
        return x + dropout(checkpoint_name(out, "mlp"), dropout_rate, mlp_key), carry


def forward(
    params: Params,
    tokens_BT: jax.Array,
    *,
    config: ModelConfig,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    compute: Compute = DEFAULT_COMPUTE,
    dropout_rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Whole sequences -> hidden_BTD after the final norm."""
    T = tokens_BT.shape[1]
    positions = jnp.broadcast_to(jnp.arange(T), tokens_BT.shape) if positions_BT is None else positions_BT
    angles = _stored(rotation(positions, config), tokens_BT)
    embed_key, layers_key = jax.random.split(key) if key is not None and dropout_rate > 0 else (None, None)
    x = jnp.take(constrain(embedding_table(params), "tensor", None), tokens_BT, axis=0).astype(compute.dtype)
    x = dropout(constrain(x, BATCH, "seq", None), dropout_rate, embed_key)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        return causal_attention(q, k, v, segments_BT=segments_BT, implementation=compute.attention), None

    def body(x: jax.Array, layer_and_key: Any) -> tuple[jax.Array, None]:
        layer, layer_key = layer_and_key
        x, _ = block(x, layer, config=config, angles=angles, attend=attend, dropout_rate=dropout_rate, key=layer_key)
        return constrain(x, BATCH, "seq", None), None

    L = config.num_layers
    keys = jax.random.split(layers_key, L) if layers_key is not None else None
    unrolled = L <= MAX_UNROLLED_LAYERS and jax.default_backend() == "cpu"
    body = rematerialised(body, compute.remat, in_loop=not unrolled)
    x, _ = jax.lax.scan(body, x, (params["layers"], keys), unroll=L if unrolled else 1)
    return rms_norm(x, params["final_norm"], config.norm_eps)


def rematerialised(body: Callable[..., Any], remat: str, *, in_loop: bool) -> Callable[..., Any]:
    """A layer whose intermediates the backward pass computes again: all ("full"), all but products, all but SAVED_NAMES.

    Raises ValueError for another policy.
    """
    policies = {
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "names": jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES),
    }
    if remat == "none":
        return body
    if remat not in policies:
        raise ValueError(f"unknown rematerialisation policy {remat!r}; known: none, {', '.join(policies)}")
    return jax.checkpoint(body, policy=policies[remat], prevent_cse=not in_loop)


def logits(params: Params, hidden: jax.Array, config: ModelConfig) -> jax.Array:
    """hidden [..., D] -> float32 logits [..., V] through the tied (or own) output table."""
    table = embedding_table(params, "embed" if config.tie_embeddings else "lm_head")
    return dense(hidden, table, split="out", out_dtype=jnp.float32)


class Transformer(nnx.Module):
    """The model as one object: configuration, parameters and `model(tokens_BT)` -> float32 logits_BTV."""

    def __init__(self, config: ModelConfig, params: Params) -> None:
        self.config = config
        self.params = nnx.data(params)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        hidden_BTD = forward(self.params, tokens_BT, config=self.config)
        return logits(self.params, hidden_BTD, self.config)
