"""The engine's compiled programs, all over flat tokens of the paged cache, and the bounded plan of their shapes.

The forward pass is `afm_rl/model.py`'s own `block`, so that the sampler computes what the learner computes; only attention
goes through pages. Layers are unrolled and weights split per layer beforehand: a program slices nothing.

Shapes: N tokens, R rows, S steps of a decoding loop, B blocks of a row, V vocab, D model.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from afm_rl.config import ModelConfig
from afm_rl.generation.engine_weights import EngineWeights, embed, with_adapters
from afm_rl.generation.options import EngineOptions
from afm_rl.generation.paged_attention import Implementation, paged_attention
from afm_rl.generation.paged_cache import Array, FlatTokens, PagedCache
from afm_rl.generation.sampling import draw_full, draw_plain, scores, uniforms
from afm_rl.generation.sampling_rows import MAX_TOP, FullRows
from afm_rl.model import block, logits, rms_norm, rotation

#: Pages copied by one call.
COPIES = 64
#: The smallest batch: fewer rows are slower than these, padded.
SMALLEST = 8


@dataclass(frozen=True)
class Static:
    """What a program is specialised on, beside its shapes."""

    config: ModelConfig
    dtype: str
    attention: Implementation = "auto"

    @property
    def compiled(self) -> int:
        """Programs that this process has compiled for it."""
        traced = list(_TRACED.items())  # other threads may compile meanwhile
        return sum(count for (of, _), count in traced if of == self)


#: How often each program was traced, which is when it is compiled.
_TRACED: Counter[tuple[Static, str]] = Counter()


def traced(static: Static, program: str) -> None:
    """Called by a program while it is traced."""
    _TRACED[static, program] += 1


class RowInputs(NamedTuple):
    """What the decoding of R rows must know; a padding row has position -1."""

    token_R: Array  # int32, the token that is decoded first
    position_R: Array  # int32, where it lies
    blocks_RB: Array  # int32
    adapter_R: Array  # int32, -1: none
    seed_R: Array  # uint32
    response_R: Array  # int32
    index_R: Array  # int32, how many tokens the response has
    left_R: Array  # int32, how many it may get
    temperature_R: Array  # float32
    stop_RE: Array  # int32, tokens that end it, padded with -1


class Decoded(NamedTuple):
    """`steps` tokens of every row; a row has its own count of them in `count_R`, and `stopped_R` where a token ended it."""

    token_RS: Array
    logp_RS: Array
    count_R: Array
    stopped_R: Array
    top_ids_RSN: Array  # N = 0 without alternatives
    top_logps_RSN: Array


class _Loop(NamedTuple):
    step: jax.Array
    token_R: jax.Array
    done_R: jax.Array
    out: Decoded
    seen_RV: jax.Array | None
    cache: PagedCache


def flat_forward(
    weights: EngineWeights, cache: PagedCache, tokens: FlatTokens, adapter_R: jax.Array, static: Static
) -> tuple[jax.Array, PagedCache]:
    """One pass over N flat tokens -> (hidden_ND after the final norm, the cache with their keys and values)."""
    config = static.config
    layers = with_adapters(weights, adapter_R[tokens.row_N])
    angles = rotation(jnp.maximum(tokens.position_N, 0), config)
    x = embed(weights.base, tokens.token_N).astype(static.dtype)
    for index, layer in enumerate(layers):
        attend = partial(_attend, cache=cache, layer=index, tokens=tokens, static=static)
        x, cache = block(x, layer, config=config, angles=angles, attend=attend)
    return rms_norm(x, weights.base["final_norm"], config.norm_eps), cache


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, *, cache: PagedCache, layer: int, tokens: FlatTokens, static: Static
) -> tuple[jax.Array, PagedCache]:
    return paged_attention(q, k, v, cache, layer, tokens, implementation=static.attention)


@partial(jax.jit, static_argnames=("static",), donate_argnames=("cache",))
def prefill(
    weights: EngineWeights, cache: PagedCache, tokens: FlatTokens, adapter_R: jax.Array, static: Static
) -> PagedCache:
    """Fill the pages of N tokens."""
    traced(static, "prefill")
    return flat_forward(weights, cache, tokens, adapter_R, static)[1]


@partial(jax.jit, static_argnames=("static",), donate_argnames=("cache",))
def score(
    weights: EngineWeights, cache: PagedCache, tokens: FlatTokens, adapter_R: jax.Array, static: Static
) -> tuple[jax.Array, PagedCache]:
    """As `prefill`, and what the model says after every one of the tokens: float32 logits_NV."""
    traced(static, "score")
    hidden_ND, cache = flat_forward(weights, cache, tokens, adapter_R, static)
    return logits(weights.base, hidden_ND, static.config), cache


@partial(jax.jit, static_argnames=("static", "steps"), donate_argnames=("cache",))
def decode(
    weights: EngineWeights,
    cache: PagedCache,
    rows: RowInputs,
    full: FullRows | None,
    seen_RV: jax.Array | None,
    until: jax.Array,
    leave_at: jax.Array,
    *,
    static: Static,
    steps: int,
) -> tuple[Decoded, PagedCache]:
    """Decode until every row has `until` tokens or is done, or `leave_at` rows have become so.

    `full` and `seen_RV` (tokens that the prompt or the response holds) where a row asks for more than a temperature.
    """
    traced(static, "decode")
    R = rows.token_R.shape[0]
    top = MAX_TOP if full is not None else 0
    born_done_R = rows.position_R < 0
    row_R = jnp.arange(R, dtype=jnp.int32)

    def body(s: _Loop) -> _Loop:
        position_R = jnp.where(s.done_R, -1, rows.position_R + s.step)
        tokens = FlatTokens(s.token_R, position_R, row_R, rows.blocks_RB)
        hidden_RD, cache = flat_forward(weights, s.cache, tokens, rows.adapter_R, static)
        logits_RV = logits(weights.base, hidden_RD, static.config)
        token_R, logp_R, ids_RN, logps_RN = _draw(logits_RV, rows, full, s.seen_RV, s.step)
        stopped_R = (token_R[:, None] == rows.stop_RE).any(-1) & ~s.done_R
        done_R = s.done_R | stopped_R | (s.step + 1 >= rows.left_R)
        out = Decoded(
            jax.lax.dynamic_update_index_in_dim(s.out.token_RS, token_R, s.step, axis=1),
            jax.lax.dynamic_update_index_in_dim(s.out.logp_RS, logp_R, s.step, axis=1),
            s.out.count_R + ~s.done_R,
            s.out.stopped_R | stopped_R,
            jax.lax.dynamic_update_index_in_dim(s.out.top_ids_RSN, ids_RN, s.step, axis=1),
            jax.lax.dynamic_update_index_in_dim(s.out.top_logps_RSN, logps_RN, s.step, axis=1),
        )
        seen_RV = None if s.seen_RV is None else s.seen_RV.at[row_R, token_R].set(True)
        return _Loop(s.step + 1, token_R, done_R, out, seen_RV, cache)

    def going_on(s: _Loop) -> jax.Array:
        return (s.step < until) & ~s.done_R.all() & ((s.done_R & ~born_done_R).sum() < leave_at)

    out = Decoded(
        jnp.zeros((R, steps), jnp.int32),
        jnp.zeros((R, steps), jnp.float32),
        jnp.zeros((R,), jnp.int32),
        jnp.zeros((R,), bool),
        jnp.zeros((R, steps, top), jnp.int32),
        jnp.zeros((R, steps, top), jnp.float32),
    )
    end = jax.lax.while_loop(going_on, body, _Loop(jnp.int32(0), rows.token_R, born_done_R, out, seen_RV, cache))
    return end.out, end.cache


@partial(jax.jit, static_argnames=("static",))
def draw(
    logits_RV: jax.Array, rows: RowInputs, full: FullRows | None, seen_RV: jax.Array | None, *, static: Static
) -> Decoded:
    """One token of every row from its logits: the sampling half of one decoding step, as a program of its own."""
    traced(static, "draw")
    token_R, logp_R, ids_RN, logps_RN = _draw(logits_RV, rows, full, seen_RV, jnp.int32(0))
    stopped_R = (token_R[:, None] == rows.stop_RE).any(-1)
    count_R = (rows.position_R >= 0).astype(jnp.int32)
    return Decoded(token_R[:, None], logp_R[:, None], count_R, stopped_R, ids_RN[:, None], logps_RN[:, None])


@partial(jax.jit, static_argnames=("static",))
def prompt_scores(
    logits_NV: jax.Array, next_N: jax.Array, top: jax.Array, *, static: Static
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability of the token after each position, at temperature 1, and the `top` best: [N], [N, n], [N, n]."""
    traced(static, "prompt_scores")
    N = logits_NV.shape[0]
    return scores(logits_NV, jnp.ones(N), next_N, top_R=jnp.full(N, top))


@partial(jax.jit, static_argnames=("static",), donate_argnames=("cache",))
def copy_pages(cache: PagedCache, source_C: jax.Array, target_C: jax.Array, *, static: Static) -> PagedCache:
    """Copy pages over all layers; padding copies page 0 onto itself."""
    traced(static, "copy_pages")
    return PagedCache(*(pool.at[:, target_C].set(pool[:, source_C]) for pool in cache))


def _draw(
    logits_RV: jax.Array, rows: RowInputs, full: FullRows | None, seen_RV: jax.Array | None, step: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    uniform_R = uniforms(rows.seed_R, rows.response_R, rows.index_R + step)
    if full is None:
        token_R, logp_R = draw_plain(logits_RV, rows.temperature_R, uniform_R)
        nothing = jnp.zeros((token_R.shape[0], 0))
        return token_R, logp_R, nothing.astype(jnp.int32), nothing
    assert seen_RV is not None
    return draw_full(logits_RV, full, uniform_R, seen_RV, rows.index_R + step)


@dataclass(frozen=True)
class ShapePlan:
    """Every batch size that an engine compiles a program for."""

    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    speculation: str | None = None

    @property
    def programs(self) -> int:
        """At most so many programs: each size of filling with and without logits (and what is read off these, and drawn
        from them plainly or in full), each size of decoding plainly or in full, and the copies. Speculation adds, for each
        size of decoding, a pass over the guesses and what is kept of them, plainly or in full; a draft its own filling,
        copies and guesses."""
        own = 5 * len(self.prefill) + 2 * len(self.decode) + 1
        verifying = 3 * len(self.decode) if self.speculation else 0
        return own + verifying + (len(self.prefill) + 2 * len(self.decode) + 1 if self.speculation == "draft" else 0)


def shape_plan(options: EngineOptions) -> ShapePlan:
    """The sizes of an engine with these options: one in the deterministic mode."""
    if options.deterministic:
        return ShapePlan((_round_up(options.max_batch),), ())
    decode = [SMALLEST]
    while decode[-1] < options.max_batch:
        decode.append(2 * decode[-1])
    prefill = [_round_up(options.prefill_chunk)]
    while prefill[-1] > 64:
        prefill.append(max(prefill[-1] // 4, SMALLEST))
    speculation = options.speculative.kind if options.speculative else None
    return ShapePlan(tuple(sorted(_round_up(n) for n in prefill)), tuple(decode), speculation)


def bucket(sizes: tuple[int, ...], count: int) -> int:
    """The smallest size that holds `count`."""
    return next(size for size in sizes if size >= count)


def _round_up(count: int) -> int:
    return -(-count // SMALLEST) * SMALLEST
