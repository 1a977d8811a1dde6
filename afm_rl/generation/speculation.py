"""Speculative decoding in the engine: guesses for every row, one pass of the target over all of them, what it keeps.

Guesses come from earlier occurrences of a sequence's last n-gram, or from a draft model that decodes ahead. The draft has a
cache of its own over the same pages: what is filled, copied or given up for the target is so for the draft. Both ways leave
the output distribution as it is (`acceptance.py`); with n-grams, even every token.

Shapes: R rows, K guesses, J = K + 1 positions, V vocab, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from afm_rl.generation.acceptance import (
    GUESS,
    Guesses,
    Stream,
    distribution_full,
    distribution_plain,
    draw,
    keep_equal_full,
    keep_equal_plain,
    keep_sampled,
    propose_ngram,
    target_full,
)
from afm_rl.generation.engine_weights import EngineWeights
from afm_rl.generation.options import Speculation
from afm_rl.generation.paged_cache import FlatTokens, PagedCache
from afm_rl.generation.programs import Decoded, RowInputs, Static, bucket, flat_forward, score, traced
from afm_rl.generation.runner import Runner, row_inputs
from afm_rl.generation.sampling import scores, uniforms
from afm_rl.generation.sampling_rows import FullRows
from afm_rl.generation.sequences import Response
from afm_rl.model import logits


class Verified(NamedTuple):
    """The rows' next tokens, and how many tokens were guessed for all rows and kept."""

    decoded: Decoded
    guessed: int
    kept: int


class Speculator:
    """Guesses and verifies for the rows of `target`; `draft` where a model guesses."""

    def __init__(self, options: Speculation, target: Runner, draft: Runner | None) -> None:
        self._options, self._target, self._draft = options, target, draft

    def step(self, rows: Sequence[Response], *, steps: int) -> Verified | None:
        """One to `steps` tokens of every row, for which it has pages; None where nothing was guessed."""
        size = bucket(self._target.plan.decode, len(rows))
        known = self._ngrams(rows, size=size, steps=steps) if self._draft is None else None
        if known is not None and not known.count_R.any():
            return None
        inputs = row_inputs(rows, size=size, blocks=self._target.blocks)
        inputs = inputs._replace(left_R=np.minimum(inputs.left_R, steps))
        full, seen_RV = self._target.full_rows(rows, size)
        guesses, q_RKV = self._guess(inputs, full, seen_RV) if known is None else (known, None)
        tokens = _flat(inputs, jax.tree.map(np.asarray, guesses))
        target = self._target
        logits_NV, target.cache = score(target.loaded, target.cache, tokens, inputs.adapter_R, target.static)
        decoded, kept_R = verify(logits_NV, guesses, q_RKV, inputs, full, seen_RV, static=target.static)
        guessed, kept = int(np.asarray(guesses.count_R).sum()), int(np.asarray(kept_R).sum())
        return Verified(Decoded(*(np.asarray(x) for x in decoded)), guessed, kept)

    def _guess(self, inputs: RowInputs, full: FullRows | None, seen_RV: np.ndarray | None) -> tuple[Guesses, jax.Array]:
        """The draft's guesses, and the distributions that they were drawn from."""
        draft = self._draft
        assert draft is not None
        count = self._options.tokens
        guesses, q_RKV, draft.cache = guess(
            draft.loaded, draft.cache, inputs, full, seen_RV, static=draft.static, count=count
        )
        return guesses, q_RKV

    def _ngrams(self, rows: Sequence[Response], *, size: int, steps: int) -> Guesses:
        token_RK, count_R = np.zeros((size, self._options.tokens), np.int32), np.zeros(size, np.int32)
        for r, row in enumerate(rows):
            known = np.concatenate([row.request.prompt_T, np.asarray(row.tokens, np.int32)])
            wanted = min(self._options.tokens, row.left - 1, steps - 1)
            found = propose_ngram(known, k=wanted, max_ngram=self._options.max_ngram)
            token_RK[r, : len(found)], count_R[r] = found, len(found)
        return Guesses(token_RK, count_R)


def _flat(inputs: RowInputs, guesses: Guesses) -> FlatTokens:
    """Every row's last token and its guesses, J tokens a row."""
    R, J = inputs.token_R.shape[0], guesses.token_RK.shape[1] + 1
    ahead_J = np.arange(J)
    token_RJ = np.concatenate([inputs.token_R[:, None], guesses.token_RK], axis=1)
    real_RJ = (ahead_J <= guesses.count_R[:, None]) & (inputs.position_R >= 0)[:, None]
    position_RJ = np.where(real_RJ, inputs.position_R[:, None] + ahead_J, -1)
    row_N = np.repeat(np.arange(R, dtype=np.int32), J)
    return FlatTokens(token_RJ.reshape(-1), position_RJ.reshape(-1).astype(np.int32), row_N, inputs.blocks_RB)


@partial(jax.jit, static_argnames=("static", "count"), donate_argnames=("cache",))
def guess(
    weights: EngineWeights,
    cache: PagedCache,
    rows: RowInputs,
    full: FullRows | None,
    seen_RV: jax.Array | None,
    *,
    static: Static,
    count: int,
) -> tuple[Guesses, jax.Array, PagedCache]:
    """`count` tokens of every row by the draft, and the distributions q_RKV that they were drawn from.

    The last guess is fed too, so that the draft's cache holds every token that the target may keep.
    """
    traced(static, "guess")
    R = rows.token_R.shape[0]
    row_R = jnp.arange(R, dtype=jnp.int32)
    token_R, seen = jnp.asarray(rows.token_R), seen_RV
    guessed, distributions = [], []
    for step in range(count + 1):
        position_R = jnp.where((rows.position_R >= 0) & (step < rows.left_R), rows.position_R + step, -1)
        tokens = FlatTokens(token_R, position_R, row_R, rows.blocks_RB)
        hidden_RD, cache = flat_forward(weights, cache, tokens, rows.adapter_R, static)
        if step == count:
            break
        logits_RV, index_R = logits(weights.base, hidden_RD, static.config), rows.index_R + step
        if full is None or seen is None:
            q_RV = distribution_plain(logits_RV, rows.temperature_R)
        else:
            q_RV = distribution_full(logits_RV, full, seen_RV=seen, index_R=index_R)
        token_R = draw(q_RV, uniforms(rows.seed_R, rows.response_R, index_R, salt=GUESS))
        seen = None if seen is None else seen.at[row_R, token_R].set(True)
        guessed.append(token_R)
        distributions.append(q_RV)
    count_R = jnp.where(rows.position_R >= 0, jnp.minimum(count, rows.left_R - 1), 0)
    return Guesses(jnp.stack(guessed, axis=1), count_R), jnp.stack(distributions, axis=1), cache


@partial(jax.jit, static_argnames=("static",))
def verify(
    logits_NV: jax.Array,
    guesses: Guesses,
    q_RKV: jax.Array | None,
    rows: RowInputs,
    full: FullRows | None,
    seen_RV: jax.Array | None,
    *,
    static: Static,
) -> tuple[Decoded, jax.Array]:
    """The tokens that each row gets, from the target's logits after its last token and each guess; the guesses kept, [R]."""
    traced(static, "verify")
    R, K = guesses.token_RK.shape
    J, V = K + 1, logits_NV.shape[-1]
    logits_RJV = logits_NV.reshape(R, J, V)
    stream = Stream(rows.seed_R, rows.response_R, rows.index_R)
    temperature_N = jnp.repeat(rows.temperature_R, J)
    if q_RKV is None:
        if full is None or seen_RV is None:
            drawn = keep_equal_plain(logits_RJV, guesses, stream, rows.temperature_R)
        else:
            drawn = keep_equal_full(logits_RJV, guesses, stream, full, seen_RV)
        (kept_R, token_RJ), logp_RJ, ids_RJN, logps_RJN = drawn
    else:
        if full is None or seen_RV is None:
            p_RJV = distribution_plain(logits_NV, temperature_N).reshape(R, J, V)
        else:
            p_RJV = target_full(logits_RJV, guesses, stream, full, seen_RV)
        kept_R, token_RJ = keep_sampled(p_RJV, q_RKV, guesses, stream)
        top_N = jnp.zeros(R * J, jnp.int32) if full is None else jnp.repeat(full.top_R, J)
        logp_N, ids_NK, logps_NK = scores(logits_NV, temperature_N, token_RJ.reshape(-1), top_R=top_N)
        logp_RJ, ids_RJN, logps_RJN = logp_N.reshape(R, J), ids_NK.reshape(R, J, -1), logps_NK.reshape(R, J, -1)
    if ids_RJN is None or logps_RJN is None:
        ids_RJN, logps_RJN = jnp.zeros((R, J, 0), jnp.int32), jnp.zeros((R, J, 0))
    count_R, stopped_R = _until_the_end(token_RJ, kept_R + 1, rows)
    decoded = Decoded(token_RJ, logp_RJ, count_R, stopped_R, ids_RJN, logps_RJN)
    return decoded, jnp.minimum(kept_R, count_R)


def _until_the_end(token_RJ: jax.Array, count_R: jax.Array, rows: RowInputs) -> tuple[jax.Array, jax.Array]:
    """How many of its tokens each row takes, the one that ends it included; whether one does."""
    J = token_RJ.shape[1]
    ends_RJ = (token_RJ[:, :, None] == rows.stop_RE[:, None, :]).any(-1)
    first_R = jnp.min(jnp.where(ends_RJ, jnp.arange(J), J), axis=1)
    taken_R = jnp.minimum(jnp.minimum(count_R, rows.left_R), first_R + 1)
    taken_R = jnp.where(rows.position_R >= 0, taken_R, 0)
    return taken_R, first_R < taken_R
