"""From logits to tokens: one uniform a token, the inverse of the cumulative distribution, and the token's log-probability.

Training samples at a temperature and nothing else (4.3.3; 9 of the specification refuses the rest), and that draw is
`draw_plain`. Pure functions on arrays, for use inside a compiled loop; a row's result depends on that row alone. The
distribution is inverted in two levels: masses of blocks of tokens, then the one block that holds the draw, which costs an
eighth of a cumulative sum over the vocabulary on CPU.

Shapes: R rows, V vocabulary, C blocks, W tokens of a block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

#: Tokens of a block: a row is V / 128 masses and then 128 tokens. 64 to 256 measure alike.
BLOCK = 128


def uniforms(seed_R: jax.Array, response_R: jax.Array, index_R: jax.Array, *, salt: int = 0) -> jax.Array:
    """One uniform in [0, 1) for token `index` of response `response` under `seed` (uint32), float32 [R].

    A positive `salt` gives another, independent stream of the same token: what speculation decides with.
    """

    def draw(seed: jax.Array, response: jax.Array, index: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), response), index)
        return jax.random.uniform(jax.random.fold_in(key, salt) if salt else key)

    return jax.vmap(draw)(seed_R.astype(jnp.uint32), response_R.astype(jnp.uint32), index_R)


def draw_plain(logits_RV: jax.Array, temperature_R: jax.Array, u_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The token that `u_R` selects of softmax(logits / temperature), the best one at temperature 0, and its log-probability.

    The log-probability is log_softmax(logits / temperature) of the token, at temperature 1 where greedy. Returns int32 [R]
    and float32 [R].
    """
    z_RV = scaled(logits_RV, temperature_R)
    token_R, mass_R = select(z_RV, u_R, greedy_R=temperature_R <= 0)
    return token_R, _take(z_RV, token_R) - jnp.log(mass_R)


def scaled(logits_RV: jax.Array, temperature_R: jax.Array) -> jax.Array:
    """(logits - their maximum) / temperature (1 where it is 0): log-probabilities but for a constant, float32 [R, V]."""
    logits_RV = logits_RV.astype(jnp.float32)
    best_R1 = _blocks(logits_RV).max(-1).max(-1, keepdims=True)
    return (logits_RV - best_R1) / jnp.where(temperature_R > 0, temperature_R, 1.0)[:, None]


def select(z_RV: jax.Array, u_R: jax.Array, *, greedy_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The token at fraction `u_R` of the mass exp(z), or the first of z = 0 where greedy; and the row's mass.

    `z_RV` is at most 0 and reaches it. A token without mass (exp(z) = 0) is never drawn. Returns int32 [R], float32 [R].
    """
    z_RCW = _blocks(z_RV)
    # A product with ones rather than a sum: XLA on CPU runs it on all cores at twice the speed.
    ones_W = jnp.ones(z_RCW.shape[-1], jnp.float32)
    mass_RC = jnp.einsum("rcw,w->rc", jnp.exp(z_RCW), ones_W, precision=jax.lax.Precision.HIGHEST)
    cumulative_RC = jnp.cumsum(mass_RC, axis=-1)
    target_R = u_R * cumulative_RC[:, -1]
    block_R = jnp.where(greedy_R, _first(z_RCW.max(-1) == 0), _crossing(cumulative_RC, mass_RC, target_R))
    before_R = _take(cumulative_RC - mass_RC, block_R)
    z_RW = jnp.take_along_axis(z_RCW, block_R[:, None, None], axis=1)[:, 0]
    mass_RW = jnp.exp(z_RW)
    inside_R = _crossing(jnp.cumsum(mass_RW, axis=-1), mass_RW, target_R - before_R)
    token_R = block_R * z_RCW.shape[-1] + jnp.where(greedy_R, _first(z_RW == 0), inside_R)
    return jnp.minimum(token_R, z_RV.shape[-1] - 1).astype(jnp.int32), cumulative_RC[:, -1]


def _blocks(x_RV: jax.Array) -> jax.Array:
    """[R, V] -> [R, C, W], the last block filled up with -inf."""
    R, V = x_RV.shape
    width = min(BLOCK, V)
    if V % width:
        x_RV = jnp.pad(x_RV, ((0, 0), (0, -V % width)), constant_values=-jnp.inf)
    return x_RV.reshape(R, -1, width)


def _crossing(cumulative_RN: jax.Array, mass_RN: jax.Array, target_R: jax.Array) -> jax.Array:
    """The first place with mass whose cumulative sum exceeds the target; the last with mass where rounding left none."""
    some_RN = mass_RN > 0
    last_R = jnp.max(jnp.where(some_RN, jnp.arange(mass_RN.shape[-1]), 0), axis=-1)
    return jnp.minimum(_first((cumulative_RN > target_R[:, None]) & some_RN), last_R)


def _first(holds_RN: jax.Array) -> jax.Array:
    """The first place that holds, the last where none does. (XLA's argmax is ten times slower on CPU.)"""
    last = holds_RN.shape[-1] - 1
    return jnp.min(jnp.where(holds_RN, jnp.arange(last + 1), last), axis=-1)


def _take(x_RN: jax.Array, index_R: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_RN, index_R[:, None], axis=-1)[:, 0]
