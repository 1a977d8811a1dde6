"""Attention of one decoding step over a cache whose prompt part is stored once for all the responses to that prompt.

Paper section 2 (grouped-query attention). The products run in the inputs' type, the softmax in float32.

Shapes: S prompt time, T response time, K kv heads, M query heads per kv head, H head dim, P prompts, G responses.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from afm_rl.attention_xla import MASKED


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
