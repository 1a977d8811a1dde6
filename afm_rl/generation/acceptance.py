"""Speculative decoding: which guessed tokens a target model keeps, so that its output distribution does not change.

One pass of the target gives its logits after the last token and after each of K guesses. Guesses of no known distribution
(n-grams of the prompt, or a draft model that inverts its own distribution at the target's uniform) are kept while they
equal what the target draws itself: the tokens are those of plain decoding, one by one. Guesses drawn from a known
distribution q are kept with probability min(1, p / q), and the first one refused is replaced by a draw from (p - q)+
(Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318): the distribution is that of plain decoding,
the tokens are others, and more guesses are kept. p and q are taken after temperature, penalties and cuts.

Shapes: R rows, V vocabulary, K guesses, J = K + 1 positions, N = 20 alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from afm_rl.generation.paged_cache import Array
from afm_rl.generation.processors import adjusted, cut
from afm_rl.generation.sampling import draw_full, draw_plain, scaled, select, uniforms
from afm_rl.generation.sampling_rows import FullRows

#: Streams of one token (`uniforms`): its guess, whether that is kept, and what replaces it. Each draws once.
GUESS, KEEP, REPLACE = 1, 2, 3


class Guesses(NamedTuple):
    """Tokens guessed to follow: the first `count_R` of each row, at most K."""

    token_RK: Array  # int32
    count_R: Array  # int32


class Stream(NamedTuple):
    """Where each row is in its random stream: token `index` of response `response` under `seed` comes next."""

    seed_R: Array  # uint32
    response_R: Array
    index_R: Array


class Kept(NamedTuple):
    """The next `count_R` + 1 tokens of each row: the guesses kept, and one of the target's own; then nothing of meaning."""

    count_R: jax.Array  # int32, guesses kept
    token_RJ: jax.Array  # int32


class Drawn(NamedTuple):
    """As `Kept`, with log-probabilities and alternatives as `draw_plain` and `draw_full` report them."""

    kept: Kept
    logp_RJ: jax.Array
    ids_RJN: jax.Array | None
    logps_RJN: jax.Array | None


def keep_equal_plain(logits_RJV: jax.Array, guesses: Guesses, stream: Stream, temperature_R: jax.Array) -> Drawn:
    """Guesses that equal the target's own draws at a temperature; logits after the last token and after each guess."""
    R, J, V = logits_RJV.shape
    u = _each(stream, J)
    token, logp = draw_plain(logits_RJV.reshape(-1, V), jnp.repeat(temperature_R, J), u)
    return Drawn(_while_equal(token.reshape(R, J), guesses), logp.reshape(R, J), None, None)


def keep_equal_full(logits_RJV: jax.Array, guesses: Guesses, stream: Stream, rows: FullRows, seen_RV: jax.Array) -> Drawn:
    """As `keep_equal_plain`, under all that `rows` ask for. `seen_RV`: tokens held before the first guess."""
    R, J, V = logits_RJV.shape
    flat = _flat(rows, guesses, stream, seen_RV, J)
    token, logp, ids, logps = draw_full(logits_RJV.reshape(-1, V), flat.rows, _each(stream, J), flat.seen_NV, flat.index_N)
    return Drawn(
        _while_equal(token.reshape(R, J), guesses), logp.reshape(R, J), ids.reshape(R, J, -1), logps.reshape(R, J, -1)
    )


def keep_sampled(p_RJV: jax.Array, q_RKV: jax.Array, guesses: Guesses, stream: Stream) -> Kept:
    """Rejection sampling: guess k was drawn from `q_RKV[:, k]` with a uniform of the GUESS stream; p is the target's."""
    R, J, _ = p_RJV.shape
    K = J - 1
    k_K, row_R = jnp.arange(K), jnp.arange(R)
    real_RK = k_K < guesses.count_R[:, None]
    taken = guesses.token_RK[:, :, None]
    p_RK = jnp.take_along_axis(p_RJV[:, :K], taken, axis=2)[..., 0]
    q_RK = jnp.take_along_axis(q_RKV, taken, axis=2)[..., 0]
    u_RK = _each(stream, K, salt=KEEP).reshape(R, K)
    count_R = _leading(real_RK & (u_RK * q_RK < p_RK))
    # After the last guess nothing was guessed: q is 0 there, and the replacement is a draw from p.
    q_RJV = jnp.pad(jnp.where(real_RK[..., None], q_RKV, 0.0), ((0, 0), (0, 1), (0, 0)))
    p_RV = p_RJV[row_R, count_R]
    left_RV = jnp.maximum(p_RV - q_RJV[row_R, count_R], 0.0)
    left_RV = jnp.where(left_RV.sum(-1, keepdims=True) > 0, left_RV, p_RV)  # p = q but for rounding
    replacement_R = draw(left_RV, uniforms(stream.seed_R, stream.response_R, stream.index_R + count_R, salt=REPLACE))
    guessed_RJ = jnp.pad(guesses.token_RK, ((0, 0), (0, 1)))
    return Kept(count_R, jnp.where(jnp.arange(J) == count_R[:, None], replacement_R[:, None], guessed_RJ))


def distribution_plain(logits_RV: jax.Array, temperature_R: jax.Array) -> jax.Array:
    """softmax(logits / temperature), all on the best token at temperature 0: what `draw_plain` draws from."""
    return _distribution(scaled(logits_RV, temperature_R), temperature_R)


def distribution_full(logits_RV: jax.Array, rows: FullRows, *, seen_RV: jax.Array, index_R: jax.Array) -> jax.Array:
    """What `draw_full` draws from, [R, V]."""
    x_RV = adjusted(logits_RV, rows, seen_RV=seen_RV, index_R=index_R)
    return _distribution(cut(scaled(x_RV, rows.temperature_R), rows), rows.temperature_R)


def target_full(logits_RJV: jax.Array, guesses: Guesses, stream: Stream, rows: FullRows, seen_RV: jax.Array) -> jax.Array:
    """The target's distribution at each position, given the guesses before it, [R, J, V]."""
    R, J, V = logits_RJV.shape
    flat = _flat(rows, guesses, stream, seen_RV, J)
    return distribution_full(logits_RJV.reshape(-1, V), flat.rows, seen_RV=flat.seen_NV, index_R=flat.index_N).reshape(
        R, J, V
    )


def draw(p_RV: jax.Array, u_R: jax.Array) -> jax.Array:
    """The token at fraction `u_R` of these probabilities (or masses, at most 1), int32 [R]."""
    return select(jnp.log(p_RV), u_R, greedy_R=jnp.zeros(u_R.shape, bool))[0]


def propose_ngram(tokens: Sequence[int] | np.ndarray, *, k: int, max_ngram: int = 3, min_ngram: int = 1) -> list[int]:
    """What followed the latest earlier occurrence of the longest n-gram that `tokens` end with: k tokens, or none.

    An occurrence so late that fewer follow is read on into the guesses themselves, as in a repetition.
    """
    tokens_T = np.asarray(tokens)
    last = len(tokens_T) - 1
    ends = np.flatnonzero(tokens_T[:-1] == tokens_T[-1]) if last > 0 and k > 0 else np.empty(0, int)
    length = 1 if len(ends) else 0
    for n in range(2, max_ngram + 1):
        longer = ends[ends >= n - 1]
        longer = longer[tokens_T[longer - n + 1] == tokens_T[last - n + 1]]
        if not len(longer):
            break
        ends, length = longer, n
    if length < min_ngram or not length:
        return []
    start = int(ends[-1]) + 1
    return tokens_T[start + np.arange(k) % (last + 1 - start)].tolist()


class _Flat(NamedTuple):
    """N = R J rows of their own, one of each position."""

    rows: FullRows
    seen_NV: jax.Array
    index_N: jax.Array


def _flat(rows: FullRows, guesses: Guesses, stream: Stream, seen_RV: jax.Array, J: int) -> _Flat:
    R, V = seen_RV.shape
    row_R1, position_J = jnp.arange(R)[:, None], jnp.arange(J)
    seen_RJV = jnp.broadcast_to(seen_RV[:, None], (R, J, V))
    for k in range(J - 1):
        after_J = position_J[k + 1 :]
        seen_RJV = seen_RJV.at[row_R1, after_J, guesses.token_RK[:, k : k + 1]].set(True)
    index_RJ = stream.index_R[:, None] + position_J
    return _Flat(jax.tree.map(lambda x: jnp.repeat(x, J, axis=0), rows), seen_RJV.reshape(-1, V), index_RJ.reshape(-1))


def _each(stream: Stream, count: int, *, salt: int = 0) -> jax.Array:
    """The uniforms of the next `count` tokens of each row, flat."""
    seed, response = (jnp.repeat(x, count) for x in (stream.seed_R, stream.response_R))
    return uniforms(seed, response, (stream.index_R[:, None] + jnp.arange(count)).reshape(-1), salt=salt)


def _while_equal(token_RJ: jax.Array, guesses: Guesses) -> Kept:
    real_RK = jnp.arange(guesses.token_RK.shape[1]) < guesses.count_R[:, None]
    return Kept(_leading(real_RK & (guesses.token_RK == token_RJ[:, :-1])), token_RJ)


def _leading(holds_RK: jax.Array) -> jax.Array:
    """How many hold before the first that does not."""
    return jnp.cumprod(holds_RK.astype(jnp.int32), axis=1).sum(1)


def _distribution(z_RV: jax.Array, temperature_R: jax.Array) -> jax.Array:
    p_RV = jax.nn.softmax(z_RV, axis=-1)
    best_RV = (
        jnp.arange(z_RV.shape[-1]) == select(z_RV, jnp.zeros_like(temperature_R), greedy_R=temperature_R <= 0)[0][:, None]
    )
    return jnp.where(temperature_R[:, None] > 0, p_RV, best_RV.astype(jnp.float32))
