"""Soft-Top-K (3.2.1, pruning): a differentiable mask whose entries sum to k.

    l = argmax  s.l + eps * H(l)   subject to  sum(l) = k, 0 <= l <= 1     =>     l = min(1, c * exp(s / eps))

The usual solver alternates 20 times between scaling and clipping and can miss k by 10 % when scores are spread. This one is
exact: after one sort, the number m of entries at 1 is the smallest for which the rest, scaled to sum to k - m, stays below 1.

Shapes: F entries on the last axis; leading axes (layers) are independent.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def soft_top_k(scores: jax.Array, *, k: int, eps: float | jax.Array) -> jax.Array:
    """Mask like `scores` [..., F] with values in [0, 1] that sum to k on the last axis.

    eps > 0 is the temperature: towards 0 the mask becomes the hard top k. Differentiable in `scores`: the gradient is that of
    the exact solution (entries at 1 have none). Raises ValueError unless 1 <= k <= F.
    """
    F = scores.shape[-1]
    if not 1 <= k <= F:
        raise ValueError(f"soft_top_k: k must be between 1 and the number of entries, {F}; got {k}")
    if k == F:
        return jnp.ones_like(scores)
    logits = scores / eps
    saturated = jax.lax.stop_gradient(logits) > jax.lax.stop_gradient(_threshold(logits, k))
    count = saturated.sum(-1, keepdims=True)
    rest = jax.nn.logsumexp(jnp.where(saturated, -jnp.inf, logits), axis=-1, keepdims=True)
    log_c = jnp.log((k - count).astype(logits.dtype)) - rest
    # Selected before exp: a saturated entry must neither overflow nor send a gradient of its own.
    soft = jnp.exp(jnp.where(saturated, 0.0, jnp.minimum(log_c + logits, 0.0)))
    return jnp.where(saturated, 1.0, soft)


def _threshold(logits: jax.Array, k: int) -> jax.Array:
    """The largest logit that is not at 1 [..., 1]: entries above it are saturated."""
    F = logits.shape[-1]
    ordered = -jnp.sort(-logits, axis=-1)
    # rest[m]: log sum exp of all but the m largest.
    rest = jax.lax.cumlogsumexp(ordered, axis=ordered.ndim - 1, reverse=True)
    m = jnp.arange(F)
    log_c = jnp.log(jnp.maximum(k - m, 0).astype(logits.dtype)) - rest
    fits = (m < k) & (log_c + ordered <= 1e-7)
    # m = k - 1 leaves a sum of 1 over the rest, which always fits; argmax finds the first that does.
    first = jnp.argmax(fits.at[..., k - 1].set(True), axis=-1)
    return jnp.take_along_axis(ordered, first[..., None], axis=-1)
