"""Attention behind one seam: causal grouped-query attention over whole sequences, and one decoding step over a cache.

Paper section 2 (grouped-query attention, 8 KV heads in the published models). The products run in the inputs' type,
the softmax in float32. Every implementation of `causal_attention` must honour `segments_BT`: packed documents do not see
each other.

Shapes: B batch, T query time, S key time, K kv heads, M query heads per kv head, H head dim, P prompts, G responses.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

#: Added to a masked score; finite, so that a fully masked (padding) row gives a uniform row and never NaN.
MASKED = -1e30


def causal_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, segments_BT: jax.Array | None = None
) -> jax.Array:
    """softmax(q k / sqrt(H)) v over the past of the same segment -> [B, T, N, H]."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BKMTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    visible = jnp.tril(jnp.ones((T, T), bool))
    if segments_BT is not None:
        visible = (visible & (segments_BT[:, :, None] == segments_BT[:, None, :]))[:, None, None]
    out_BKMTH = _mix(q_BKMTH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), visible)
    return out_BKMTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


@jax.custom_vjp
def _mix(q_BKMTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, visible: jax.Array) -> jax.Array:
    """Attention with the batch axes first. Every product takes operands of the inputs' type and accumulates in float32.

    The gradient is written out because the one JAX derives multiplies float32 cotangents, for which no matrix unit has
    a kernel, and keeps the float32 scores beside the weights.
    """
    return _mix_forward(q_BKMTH, k_BKSH, v_BKSH, visible)[0]


def _mix_forward(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    scores = jnp.where(visible, _einsum("bkmth,bksh->bkmts", q, k) * q.shape[-1] ** -0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = _einsum("bkmts,bksh->bkmth", weights, v).astype(q.dtype)
    return out, (q, k, v, weights, out)


def _mix_backward(kept: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, weights, out = kept
    v_gradient = _einsum("bkmts,bkmth->bksh", weights, g)
    weights_gradient = _einsum("bkmth,bksh->bkmts", g, v)
    mean_gradient = (g.astype(weights_gradient.dtype) * out).sum(-1, keepdims=True)  # of each row, under its weights
    scores_gradient = (weights * (weights_gradient - mean_gradient) * q.shape[-1] ** -0.5).astype(q.dtype)
    q_gradient = _einsum("bkmts,bksh->bkmth", scores_gradient, k)
    k_gradient = _einsum("bkmts,bkmth->bksh", scores_gradient, q)
    return q_gradient.astype(q.dtype), k_gradient.astype(k.dtype), v_gradient.astype(v.dtype), None


_mix.defvjp(_mix_forward, _mix_backward)


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def decode_attention(
    q_PGNH: jax.Array,
    prompt_k_PSKH: jax.Array,
    prompt_v_PSKH: jax.Array,
    response_k_PGTKH: jax.Array,
    response_v_PGTKH: jax.Array,
    *,
    prompt_visible_PS: jax.Array,
    step: jax.Array,
) -> jax.Array:
    """One new token of G responses per prompt: the prompt's keys and values are stored once for all G -> [P, G, N, H]."""
    P, G, N, H = q_PGNH.shape
    K = prompt_k_PSKH.shape[2]
    q_PGKMH = q_PGNH.reshape(P, G, K, N // K, H)
    prompt_scores = jnp.einsum("pgkmh,pskh->pgkms", q_PGKMH, prompt_k_PSKH).astype(jnp.float32)
    response_scores = jnp.einsum("pgkmh,pgtkh->pgkmt", q_PGKMH, response_k_PGTKH).astype(jnp.float32)
    response_visible_T = jnp.arange(response_k_PGTKH.shape[2]) <= step
    scores = H**-0.5 * jnp.concatenate(
        [
            jnp.where(prompt_visible_PS[:, None, None, None], prompt_scores, MASKED),
            jnp.where(response_visible_T, response_scores, MASKED),
        ],
        axis=-1,
    )
    weights = jax.nn.softmax(scores, axis=-1).astype(q_PGNH.dtype)
    weights_S, weights_T = jnp.split(weights, [prompt_k_PSKH.shape[1]], axis=-1)
    out = jnp.einsum("pgkms,pskh->pgkmh", weights_S, prompt_v_PSKH)
    out = out + jnp.einsum("pgkmt,pgtkh->pgkmh", weights_T, response_v_PGTKH)
    return out.reshape(P, G, N, H)
