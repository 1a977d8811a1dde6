"""Soft-Top-K masks (section 3.2.1, after Lei et al. 2023): a differentiable choice of k units out of n, solved exactly.

The mask maximises s . l + eps * H(l) subject to sum l = k and 0 <= l <= 1 (H(l) = -sum l log l), so that
l = min(1, c * exp(s / eps)). The usual 20 fixed-point iterations for c can miss k by 10 % when scores are spread; one
sort finds which entries are saturated, and the others share what is left in closed form.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def soft_topk(scores: jax.Array, k: float | jax.Array, eps: float | jax.Array) -> jax.Array:
    """The mask l of `scores` [..., n] over its last axis: sum l = k, 0 <= l <= 1; eps -> 0 gives the hard top k.

    Differentiable in scores (and k, eps): free entries have dl_i/ds_m = (l_i [i = m] - l_i l_m / sum_free l) / eps,
    saturated ones 0. Raises ValueError for a k outside (0, n].
    """
    n = scores.shape[-1]
    if isinstance(k, int | float) and not 0 < k <= n:
        raise ValueError(f"k must be above 0 and at most the number of scores, {n}; got {k}")
    x = scores / eps
    free = jax.lax.stop_gradient(x <= _largest_free(jax.lax.stop_gradient(x), k))
    shared = k - jnp.sum(~free, axis=-1, keepdims=True)
    mask = jnp.where(free, shared * jax.nn.softmax(x, axis=-1, where=free), 1.0)
    # Rounding may lift an entry an ulp above 1; taking it off must not touch the gradient.
    return mask - jax.lax.stop_gradient(jnp.maximum(mask - 1.0, 0.0))


def _largest_free(x: jax.Array, k: float | jax.Array) -> jax.Array:
    """The largest entry [..., 1] that is not saturated: with j larger ones at 1, c_j = (k - j) / sum_{i >= j} e^{x_i}.

    j is the smallest number for which c_j e^{x_j} <= 1. It is below k, where the right-hand side is at least 1 term.
    """
    n = x.shape[-1]
    ordered = jnp.flip(jnp.sort(x, axis=-1), axis=-1)
    tail = jax.lax.cumlogsumexp(ordered, axis=x.ndim - 1, reverse=True)
    left = k - jnp.arange(n, dtype=x.dtype)
    log_mask = jnp.where(left > 0, jnp.log(jnp.where(left > 0, left, 1.0)), -jnp.inf) - tail + ordered
    saturated = jnp.argmax(log_mask <= 0, axis=-1)
    # Where k - j falls to 1, c_j e^{x_j} <= 1 holds in exact arithmetic; rounding must not carry the search beyond it.
    saturated = jnp.minimum(saturated, jnp.asarray(jnp.ceil(k), saturated.dtype) - 1)
    return jnp.take_along_axis(ordered, saturated[..., None], axis=-1)
