"""What a request may change of the model's distribution, in the order of `SamplingOptions`: biases, penalties and cuts.

The definitions are those of vLLM and transformers. Cuts find their threshold by bisection over the bits of float32, which
order non-negative numbers: 31 masked sums instead of a sort (a fiftieth of its time on CPU). Tokens that tie with the last
one kept stay in. A stage that no row asks for is skipped; to the rows that do not ask for it, it changes no bit.

Shapes: R rows, V vocabulary, K biased tokens, E tokens that end a response.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from afm_rl.generation.sampling_rows import FullRows

#: Bits of float32 infinity, above those of every other number that is not negative.
_INFINITY_BITS = 0x7F800000
#: Tokens summed at once; the partial sums keep the error small.
_PART = 128


def adjusted(logits_RV: jax.Array, rows: FullRows, *, seen_RV: jax.Array, index_R: jax.Array) -> jax.Array:
    """Logits with biases, a repetition penalty of `seen_RV` tokens and no end before `min_tokens`; no temperature yet."""
    row_R1 = jnp.arange(logits_RV.shape[0])[:, None]
    early_R = index_R < rows.min_tokens_R

    def biased(x_RV: jax.Array) -> jax.Array:
        return x_RV.at[row_R1, rows.bias_ids_RK].add(rows.bias_RK, mode="drop")

    def penalised(x_RV: jax.Array) -> jax.Array:
        penalty_R1 = rows.penalty_R[:, None]
        repeated_RV = jnp.where(x_RV > 0, x_RV / penalty_R1, x_RV * penalty_R1)
        return jnp.where(seen_RV & (penalty_R1 != 1), repeated_RV, x_RV)

    def endless(x_RV: jax.Array) -> jax.Array:
        ends_RE = jnp.where(early_R[:, None], -jnp.inf, jnp.inf)
        return x_RV.at[row_R1, rows.stop_RE].min(ends_RE, mode="drop")

    x_RV = _where_any(rows.bias_RK != 0, biased, logits_RV.astype(jnp.float32))
    x_RV = _where_any(rows.penalty_R != 1, penalised, x_RV)
    return _where_any(early_R, endless, x_RV)


def cut(z_RV: jax.Array, rows: FullRows) -> jax.Array:
    """Top-k, then top-p of what is left, then min-p: -inf where cut. z: log-probabilities but for a constant, the best 0."""

    def top_k(z_RV: jax.Array) -> jax.Array:
        wanted_R = jnp.where(rows.top_k_R > 0, rows.top_k_R, z_RV.shape[-1]).astype(jnp.float32)
        return _down_to(z_RV, jnp.ones_like(z_RV), wanted_R, rows.top_k_R > 0)

    def top_p(z_RV: jax.Array) -> jax.Array:
        mass_RV = jnp.exp(z_RV)
        return _down_to(z_RV, mass_RV, rows.top_p_R * _sum(mass_RV), rows.top_p_R < 1)

    def min_p(z_RV: jax.Array) -> jax.Array:
        return jnp.where(jnp.exp(z_RV) >= rows.min_p_R[:, None], z_RV, -jnp.inf)

    z_RV = _where_any(rows.top_k_R > 0, top_k, z_RV)
    z_RV = _where_any(rows.top_p_R < 1, top_p, z_RV)
    return _where_any(rows.min_p_R > 0, min_p, z_RV)


def _where_any(asked: jax.Array, stage: Callable[[jax.Array], jax.Array], x_RV: jax.Array) -> jax.Array:
    return jax.lax.cond(asked.any(), stage, lambda x_RV: x_RV, x_RV)


def _down_to(z_RV: jax.Array, weight_RV: jax.Array, wanted_R: jax.Array, asked_R: jax.Array) -> jax.Array:
    """The best tokens whose weights together reach `wanted_R`, no fewer and, ties apart, no more; -inf elsewhere."""

    def enough(bits_R: jax.Array) -> jax.Array:
        return _sum(jnp.where(z_RV >= _depth(bits_R), weight_RV, 0.0)) >= wanted_R

    def halve(_: jax.Array, borders: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_R, high_R = borders
        middle_R = low_R + (high_R - low_R) // 2
        enough_R = enough(middle_R)
        return jnp.where(enough_R, low_R, middle_R + 1), jnp.where(enough_R, middle_R, high_R)

    zeros_R = jnp.zeros(z_RV.shape[0], jnp.int32)
    _, bits_R = jax.lax.fori_loop(0, 31, halve, (zeros_R, zeros_R + _INFINITY_BITS))
    return jnp.where((z_RV >= _depth(bits_R)) | ~asked_R[:, None], z_RV, -jnp.inf)


def _depth(bits_R: jax.Array) -> jax.Array:
    """Minus the float of these bits, [R, 1]."""
    return -jax.lax.bitcast_convert_type(bits_R, jnp.float32)[:, None]


def _sum(x_RV: jax.Array) -> jax.Array:
    R, V = x_RV.shape
    if V % _PART:
        x_RV = jnp.pad(x_RV, ((0, 0), (0, -V % _PART)))
    return x_RV.reshape(R, -1, _PART).sum(-1).sum(-1)
