"""From what the scheduler decided to arrays, through the compiled programs, and back to tokens.

The runner owns what is on the device: the paged cache and the weights. It knows two ways to take a step. The fast one fills
stems with one program and decodes rows with another, in sizes that fit. The deterministic one sends everything through one
program of one size, so that a token's bits depend on the tokens before it alone.

Shapes: N tokens, R rows, B blocks of a row, S steps, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from afm_rl.config import ModelConfig
from afm_rl.generation import sampling_rows
from afm_rl.generation.engine_weights import EngineWeights
from afm_rl.generation.options import EngineOptions
from afm_rl.generation.paged_cache import FlatTokens, PagedCache, empty_cache, page_bytes
from afm_rl.generation.pages import RESERVED_PAGES
from afm_rl.generation.programs import (
    COPIES,
    Decoded,
    RowInputs,
    Static,
    bucket,
    copy_pages,
    decode,
    draw,
    prefill,
    prompt_scores,
    score,
    shape_plan,
)
from afm_rl.generation.sampling_rows import MAX_STOP_IDS, FullRows
from afm_rl.generation.scheduler import Piece
from afm_rl.generation.sequences import Response

#: Stems filled by one call.
MAX_PIECES = 64


class Runner:
    """Device state of one model. It has as many pages as the options' bytes hold and could ever be in use.

    A draft's runner has as many as its target's: `pages` says so.
    """

    def __init__(self, config: ModelConfig, options: EngineOptions, *, max_context: int, pages: int | None = None) -> None:
        self.options, self.plan = options, shape_plan(options)
        self.static = Static(config, options.compute_dtype)
        self.blocks = -(-max_context // options.page_size)
        cache_dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.dtype(options.compute_dtype)
        bytes_ = page_bytes(config, page_size=options.page_size, dtype=cache_dtype)
        most = options.max_batch * (self.blocks + 1)  # more could never be in use
        self.pages = pages or RESERVED_PAGES + min(options.kv_cache_bytes // bytes_, most)
        self.page_bytes = bytes_
        self._empty = partial(empty_cache, config, pages=self.pages, page_size=options.page_size, dtype=cache_dtype)
        self.cache: PagedCache | None = None  # until the first step
        self.weights: EngineWeights | None = None

    @property
    def compiled_programs(self) -> int:
        """Programs compiled so far; at most `plan.programs`."""
        return self.static.compiled

    def rest(self) -> None:
        """Give the cache's memory back."""
        self.cache = None

    def wake(self) -> None:
        """Have a cache again, an empty one, after a rest."""
        if self.cache is None:
            self.cache = self._empty()

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages (source, target)."""
        for start in range(0, len(copies), COPIES):
            pairs = np.zeros((2, COPIES), np.int32)
            some = copies[start : start + COPIES]
            pairs[:, : len(some)] = np.asarray(some, np.int32).T
            self.cache = copy_pages(self.cache, pairs[0], pairs[1], static=self.static)

    def fill(self, pieces: Sequence[Piece], *, scores: bool = True) -> None:
        """Fill pieces of stems, with the prompt's log-probabilities where they are asked for (and `scores` are)."""
        for wanted in (False, True):
            some = [p for p in pieces if (scores and p.stem.scored) is wanted]
            for start in range(0, len(some), MAX_PIECES):
                self._fill(some[start : start + MAX_PIECES], scored=wanted)

    def decode(self, rows: Sequence[Response], *, steps: int, leave_at: int) -> Decoded:
        """Up to `steps` tokens of every row, in the order of `rows`; ends early once `leave_at` rows have ended."""
        size = bucket(self.plan.decode, len(rows))
        inputs = row_inputs(rows, size=size, blocks=self.blocks)
        full, seen_RV = self.full_rows(rows, size)
        decoded, self.cache = decode(
            self.loaded,
            self.cache,
            inputs,
            full,
            seen_RV,
            np.int32(steps),
            np.int32(leave_at),
            static=self.static,
            steps=self.options.decode_steps,
        )
        return Decoded(*(np.asarray(x) for x in decoded))

    def step_together(self, pieces: Sequence[Piece], rows: Sequence[Response]) -> Decoded | None:
        """Fill pieces and decode one token of every row in one pass of the one size there is."""
        [size] = self.plan.prefill
        tokens, adapter_R = self._flat(pieces, rows, size=size, table=size)
        logits_NV, self.cache = score(self.loaded, self.cache, tokens, adapter_R, self.static)
        self._keep_scores(pieces, logits_NV, first=len(rows))
        if not rows:
            return None
        inputs = row_inputs(rows, size=size, blocks=self.blocks)
        decoded = Decoded(*(np.asarray(x) for x in draw(logits_NV, inputs, None, None, static=self.static)))
        full, seen_RV = self.full_rows(rows, size)
        if full is None:
            return decoded
        # A plain row must not depend on there being others: each kind is drawn by its own program.
        drawn = Decoded(*(np.asarray(x) for x in draw(logits_NV, inputs, full, seen_RV, static=self.static)))
        plain_R = np.array([row.request.options.plain for row in rows] + [True] * (size - len(rows)))
        return drawn._replace(
            token_RS=np.where(plain_R[:, None], decoded.token_RS, drawn.token_RS),
            logp_RS=np.where(plain_R[:, None], decoded.logp_RS, drawn.logp_RS),
            stopped_R=np.where(plain_R, decoded.stopped_R, drawn.stopped_R),
        )

    @property
    def loaded(self) -> EngineWeights:
        """The weights, which are there when anything is computed."""
        assert self.weights is not None
        return self.weights

    def _fill(self, pieces: Sequence[Piece], *, scored: bool) -> None:
        """One call for up to MAX_PIECES pieces."""
        size = bucket(self.plan.prefill, sum(p.stop - p.start for p in pieces))
        tokens, adapter_R = self._flat(pieces, [], size=size, table=MAX_PIECES)
        if not scored:
            self.cache = prefill(self.loaded, self.cache, tokens, adapter_R, self.static)
            return
        logits_NV, self.cache = score(self.loaded, self.cache, tokens, adapter_R, self.static)
        self._keep_scores(pieces, logits_NV, first=0)

    def _flat(
        self, pieces: Sequence[Piece], rows: Sequence[Response], *, size: int, table: int
    ) -> tuple[FlatTokens, np.ndarray]:
        """The next token of every row, then every piece, as `size` flat tokens of a block table of `table` rows."""
        token_N, position_N, row_N = (np.zeros(size, np.int32) for _ in range(3))
        position_N[:] = -1
        blocks_RB, adapter_R = np.zeros((table, self.blocks), np.int32), np.full(table, -1, np.int32)
        for r, row in enumerate(rows):
            token_N[r], position_N[r], row_N[r] = row.last_token, row.position, r
            blocks_RB[r, : len(row.pages)] = row.pages
            adapter_R[r] = row.job.adapter
        for r, (piece, span) in enumerate(_spans(pieces, first=len(rows)), start=len(rows)):
            token_N[span] = piece.stem.tokens_T[piece.start : piece.stop]
            position_N[span] = np.arange(piece.start, piece.stop)
            row_N[span] = r
            blocks_RB[r, : len(piece.stem.pages)] = piece.stem.pages
            adapter_R[r] = piece.stem.job.adapter
        return FlatTokens(token_N, position_N, row_N, blocks_RB), adapter_R

    def _keep_scores(self, pieces: Sequence[Piece], logits_NV: jax.Array, *, first: int) -> None:
        """The log-probabilities of the prompts that asked for them, from the logits after each of their positions."""
        if not any(piece.stem.scored for piece in pieces):
            return
        next_N = np.zeros(logits_NV.shape[0], np.int32)
        for piece, span in _spans(pieces, first=first):
            next_N[span] = piece.stem.tokens_T[piece.start + 1 : piece.stop + 1]
        top = np.int32(max(p.stem.job.request.options.prompt_logprobs or 0 for p in pieces))
        logp_N, ids_NK, best_NK = (np.asarray(x) for x in prompt_scores(logits_NV, next_N, top, static=self.static))
        for piece, span in _spans(pieces, first=first):
            if piece.stem.scored:
                kept, at = piece.stem.job.prompt_scores, slice(piece.start + 1, piece.stop + 1)
                assert kept is not None
                wanted = kept.top_ids_TN.shape[1]
                kept.logp_T[at] = logp_N[span]
                kept.top_ids_TN[at], kept.top_logps_TN[at] = ids_NK[span, :wanted], best_NK[span, :wanted]

    def full_rows(self, rows: Sequence[Response], size: int) -> tuple[FullRows | None, np.ndarray | None]:
        """What rows need that ask for more than a temperature; nothing if none does."""
        options = [row.request.options for row in rows]
        if all(o.plain for o in options):
            return None, None
        seen_RV = np.zeros((size, self.static.config.vocab_size), bool)
        for r, row in enumerate(rows):
            if row.request.options.repetition_penalty != 1.0:
                seen_RV[r, row.request.prompt_T] = True
                seen_RV[r, row.tokens] = True
        temperatures = [row.request.temperature for row in rows]
        return sampling_rows.full_rows(options, temperatures, [row.job.stop_ids for row in rows], size=size), seen_RV


def _spans(pieces: Sequence[Piece], *, first: int) -> Iterator[tuple[Piece, slice]]:
    """Every piece and where its positions lie among the flat tokens, from `first` on."""
    for piece in pieces:
        end = first + piece.stop - piece.start
        yield piece, slice(first, end)
        first = end


def row_inputs(rows: Sequence[Response], *, size: int, blocks: int) -> RowInputs:
    """The rows' next tokens as `size` rows, in NumPy."""
    ints = np.zeros((6, size), np.int32)
    ints[1], ints[2] = -1, -1
    blocks_RB, stop_RE = np.zeros((size, blocks), np.int32), np.full((size, MAX_STOP_IDS), -1, np.int32)
    temperature_R, seed_R = np.ones(size, np.float32), np.zeros(size, np.uint32)
    for r, row in enumerate(rows):
        ints[:, r] = (row.last_token, row.position, row.job.adapter, row.index, len(row.tokens), row.left)
        temperature_R[r], seed_R[r] = row.request.temperature, row.request.seed % 2**32
        blocks_RB[r, : len(row.pages)] = row.pages
        stop_RE[r, : len(row.job.stop_ids)] = row.job.stop_ids
    token_R, position_R, adapter_R, response_R, index_R, left_R = ints
    return RowInputs(token_R, position_R, blocks_RB, adapter_R, seed_R, response_R, index_R, left_R, temperature_R, stop_RE)
