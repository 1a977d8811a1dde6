"""From logits to tokens: one uniform a token, the inverse of the cumulative distribution, and the token's log-probability.

Training samples at a temperature and nothing else (4.3.3; 9 of the specification refuses the rest), and that draw is
`draw_plain`. Pure functions on arrays, for use inside a compiled loop; a row's result depends on that row alone. The
distribution is inverted in two levels: masses of blocks of tokens, then the one block that holds the draw, which costs an
eighth of a cumulative sum over the vocabulary on CPU.

`draw_full` is for requests that ask for more; the log-probabilities that it reports are of the same distribution.

Shapes: R rows, V vocabulary, C blocks, W tokens of a block, N = 20 alternatives.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from afm_rl.generation.processors import adjusted, cut
from afm_rl.generation.sampling_rows import MAX_TOP, FullRows, check_options, full_rows

__all__ = ["MAX_TOP", "FullRows", "check_options", "draw_full", "draw_plain", "full_rows", "scores", "uniforms"]

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


def draw_full(
    logits_RV: jax.Array, rows: FullRows, u_R: jax.Array, seen_RV: jax.Array, index_R: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """As `draw_plain`, after all that `SamplingOptions` may change; for rows that change nothing, the same bits.

    `seen_RV` (bool): the prompt or the response holds the token; `index_R`: which token of its response is drawn, from 0.
    Returns token_R and logp_R, and of the most probable tokens, best first, ids_RN (int32) and logps_RN (float32), as many
    as a row asks for, then -1 and -inf. All log-probabilities are log_softmax(logits / temperature), whatever was cut.
    """
    z_RV = cut(scaled(adjusted(logits_RV, rows, seen_RV=seen_RV, index_R=index_R), rows.temperature_R), rows)
    token_R, _ = select(z_RV, u_R, greedy_R=rows.temperature_R <= 0)
    return token_R, *scores(logits_RV, rows.temperature_R, token_R, top_R=rows.top_R)


def scores(
    logits_RV: jax.Array, temperature_R: jax.Array, token_R: jax.Array, *, top_R: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """log_softmax(logits / temperature) of the given tokens, and of the `top_R` best ones, as `draw_full` returns them."""
    z_RV = scaled(logits_RV, temperature_R)
    log_mass_R = jnp.log(_masses(_blocks(z_RV)).cumsum(-1)[:, -1])
    ids_RN, best_RN = _best(z_RV, top_R)
    return _take(z_RV, token_R) - log_mass_R, ids_RN, best_RN - log_mass_R[:, None]


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
    mass_RC = _masses(z_RCW)
    cumulative_RC = jnp.cumsum(mass_RC, axis=-1)
    target_R = u_R * cumulative_RC[:, -1]
    block_R = jnp.where(greedy_R, _first(z_RCW.max(-1) == 0), _crossing(cumulative_RC, mass_RC, target_R))
    before_R = _take(cumulative_RC - mass_RC, block_R)
    z_RW = jnp.take_along_axis(z_RCW, block_R[:, None, None], axis=1)[:, 0]
    mass_RW = jnp.exp(z_RW)
    inside_R = _crossing(jnp.cumsum(mass_RW, axis=-1), mass_RW, target_R - before_R)
    token_R = block_R * z_RCW.shape[-1] + jnp.where(greedy_R, _first(z_RW == 0), inside_R)
    return jnp.minimum(token_R, z_RV.shape[-1] - 1).astype(jnp.int32), cumulative_RC[:, -1]


def _best(z_RV: jax.Array, top_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The `top_R` largest of each row, best first, equal ones by index: ids_RN, values_RN. (XLA's top_k sorts on CPU.)

    Each turn takes one from the block with the largest left; what was taken is above the last one taken, or ties before it.
    """
    z_RCW = _blocks(z_RV)
    R, C, W = z_RCW.shape
    column_N = jnp.arange(MAX_TOP)

    def turn(n: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        largest_RC, last_R1, last_id_R1, ids_RN, values_RN = state
        value_R1 = largest_RC.max(-1, keepdims=True)
        block_R = _first(largest_RC == value_R1)
        z_RW = jnp.take_along_axis(z_RCW, block_R[:, None, None], axis=1)[:, 0]
        id_RW = block_R[:, None] * W + jnp.arange(W)
        left_RW = (z_RW < last_R1) | ((z_RW == last_R1) & (id_RW > last_id_R1))
        id_R1 = block_R[:, None] * W + _first(left_RW & (z_RW == value_R1))[:, None]
        left_RW &= (z_RW < value_R1) | (id_RW > id_R1)
        next_R1 = jnp.where(left_RW, z_RW, -jnp.inf).max(-1, keepdims=True)
        largest_RC = jnp.where(jnp.arange(C) == block_R[:, None], next_R1, largest_RC)
        wanted_RN = (column_N == n) & (n < top_R[:, None]) & (value_R1 > -jnp.inf)
        return largest_RC, value_R1, id_R1, jnp.where(wanted_RN, id_R1, ids_RN), jnp.where(wanted_RN, value_R1, values_RN)

    start = (
        z_RCW.max(-1),
        jnp.full((R, 1), jnp.inf),
        jnp.full((R, 1), -1),
        jnp.full((R, MAX_TOP), -1),
        jnp.full((R, MAX_TOP), -jnp.inf),
    )
    *_, ids_RN, values_RN = jax.lax.fori_loop(0, jnp.minimum(top_R.max(), MAX_TOP), turn, start)
    return ids_RN, values_RN


def _masses(z_RCW: jax.Array) -> jax.Array:
    # A product with ones rather than a sum: XLA on CPU runs it faster.
    ones_W = jnp.ones(z_RCW.shape[-1], jnp.float32)
    return jnp.einsum("rcw,w->rc", jnp.exp(z_RCW), ones_W, precision=jax.lax.Precision.HIGHEST)


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
