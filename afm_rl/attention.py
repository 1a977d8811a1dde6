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
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    implementation: str = "auto",  # noqa: ARG001
) -> jax.Array:
    """softmax(q k / sqrt(H)) v over the past of the same segment -> [B, T, N, H]."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKMH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKMTS = jnp.einsum("btkmh,bskh->bkmts", q_BTKMH, k_BSKH).astype(jnp.float32) * H**-0.5
    visible_TS = jnp.tril(jnp.ones((T, T), bool))
    visible = visible_TS if segments_BT is None else visible_TS & (segments_BT[:, :, None] == segments_BT[:, None, :])
    visible = visible if segments_BT is None else visible[:, None, None]
    weights = jax.nn.softmax(jnp.where(visible, scores_BKMTS, MASKED), axis=-1).astype(q_BTNH.dtype)
    return jnp.einsum("bkmts,bskh->btkmh", weights, v_BSKH).reshape(B, T, N, H)


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
