"""Attention of flat tokens over the paged cache: the seam, and the implementation in plain jax.numpy.

Paper section 2 (grouped-query attention). A token reads positions 0..its own of its row, those written in the same call
included. The result does not depend on what a page holds beyond that, nor on pages of other rows. On CPU the compiled
kernel of paged_attention_cpu.py does the work where it can; its bits for a token do not even depend on the other tokens.

Shapes: N tokens, Q query heads, K kv heads, M query heads per kv head, H head dim, R rows, B pages of a row, G groups of
tokens, C tokens of a group, A pages read in one turn, S positions of those pages.
"""

from __future__ import annotations

import logging
from functools import cache as remembered
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from afm_rl.attention_xla import MASKED
from afm_rl.errors import UserError
from afm_rl.generation.cpu_header import unusable_reason
from afm_rl.generation.paged_cache import FlatTokens, PagedCache

_log = logging.getLogger(__name__)

Implementation = Literal["auto", "xla", "cpu_kernel"]

#: Tokens whose pages are gathered together.
_GROUP_TOKENS = 64

#: Bytes of keys (and as many of values) gathered together.
_GATHERED_BYTES = 8 << 20


def paged_attention(
    q_NQH: jax.Array,
    k_NKH: jax.Array,
    v_NKH: jax.Array,
    cache: PagedCache,
    layer: int,
    tokens: FlatTokens,
    *,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, PagedCache]:
    """Writes the tokens' keys and values into `layer`, then softmax(q k / sqrt(H)) v -> [N, Q, H] in q's type, the cache.

    Keys and values are rounded to the cache's type before they are read. The softmax is float32. A padding token (position
    -1) writes nothing and gives zeros. A cache that the caller donated is updated in place, provided that what is written
    into the next layer depends on this layer's result, as in a model. `auto` is `cpu_kernel` on CPU where that can run;
    asking for it where it cannot raises UserError.
    """
    _check(q_NQH, k_NKH, v_NKH, cache, layer)
    if _by_kernel(q_NQH.shape[1] // k_NKH.shape[1], cache, implementation):
        from afm_rl.generation.paged_attention_cpu import paged_attention_cpu  # numba, needed on CPU only

        return paged_attention_cpu(q_NQH, k_NKH, v_NKH, cache, layer, tokens)
    cache = write_tokens(k_NKH, v_NKH, cache, layer, tokens)
    return read_tokens(q_NQH, cache, layer, tokens), cache


def _by_kernel(heads_per_kv: int, cache: PagedCache, implementation: Implementation) -> bool:
    if implementation not in get_args(Implementation):
        raise UserError(f"paged attention: no implementation {implementation!r}; choose from {get_args(Implementation)}")
    if implementation == "xla" or (implementation == "auto" and jax.default_backend() != "cpu"):
        return False
    reason = unusable_reason()
    if reason is None:
        from afm_rl.generation.paged_attention_cpu import cannot_serve

        reason = cannot_serve(
            heads_per_kv=heads_per_kv, head_dim=cache.v.shape[-1], page_size=cache.page_size, dtype=cache.k.dtype
        )
    if reason is not None and implementation == "cpu_kernel":
        raise UserError(f"paged attention: the CPU kernel cannot run: {reason}; use auto or xla")
    if reason is not None:
        _say_once(reason)
    return reason is None


@remembered
def _say_once(reason: str) -> None:
    _log.warning("attention of the sampler runs in plain XLA, several times slower than the compiled kernel: %s", reason)


def _check(q_NQH: jax.Array, k_NKH: jax.Array, v_NKH: jax.Array, cache: PagedCache, layer: int) -> None:
    N, Q, H = q_NQH.shape
    L, pages, K, _, page_size = cache.k.shape
    expected = {
        "k": (N, K, H),
        "v": (N, K, H),
        "cache.k": (L, pages, K, H, page_size),
        "cache.v": (L, pages, K, page_size, H),
    }
    for (name, shape), array in zip(expected.items(), (k_NKH, v_NKH, cache.k, cache.v), strict=True):
        if array.shape != shape:
            raise ValueError(f"paged attention: {name} has the shape {array.shape}, expected {shape}")
    if Q % K:
        raise ValueError(f"paged attention: {Q} query heads are not a multiple of {K} kv heads")
    if not 0 <= layer < L:
        raise ValueError(f"paged attention: layer {layer} of a cache of {L} layers")


def write_tokens(k_NKH: jax.Array, v_NKH: jax.Array, cache: PagedCache, layer: int, tokens: FlatTokens) -> PagedCache:
    """The cache with the tokens' keys and values in their places of `layer`."""
    pages, page_size = cache.k.shape[1], cache.page_size
    position_N = jnp.maximum(tokens.position_N, 0)
    page_N = tokens.blocks_RB[tokens.row_N, position_N // page_size]
    page_N = jnp.where(tokens.position_N < 0, pages, page_N)  # beyond the pool: dropped
    place_N = position_N % page_size
    return PagedCache(
        cache.k.at[layer, page_N, :, :, place_N].set(k_NKH.astype(cache.k.dtype), mode="drop"),
        cache.v.at[layer, page_N, :, place_N].set(v_NKH.astype(cache.v.dtype), mode="drop"),
    )


def read_tokens(q_NQH: jax.Array, cache: PagedCache, layer: int, tokens: FlatTokens) -> jax.Array:
    """Attention of tokens whose keys and values are in the cache already -> [N, Q, H]."""
    N, Q, H = q_NQH.shape
    C = min(N, _GROUP_TOKENS)
    G = -(-N // C)
    padding = G * C - N
    q_GCQH = jnp.pad(q_NQH, ((0, padding), (0, 0), (0, 0))).reshape(G, C, Q, H)
    position_GC = jnp.pad(tokens.position_N, (0, padding), constant_values=-1).reshape(G, C)
    row_GC = jnp.pad(tokens.row_N, (0, padding)).reshape(G, C)

    def read(group: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q_CQH, position_C, row_C = group
        return _read_group(q_CQH, cache, layer, position_C, tokens.blocks_RB[row_C])

    return jax.lax.map(read, (q_GCQH, position_GC, row_GC)).reshape(G * C, Q, H)[:N]


def _read_group(q_CQH: jax.Array, cache: PagedCache, layer: int, position_C: jax.Array, blocks_CB: jax.Array) -> jax.Array:
    """Attention of C tokens: as many pages a turn as _GATHERED_BYTES allow, as many turns as the longest context needs."""
    C, Q, H = q_CQH.shape
    K, page_size = cache.k.shape[2], cache.page_size
    A = max(1, min(blocks_CB.shape[1], _GATHERED_BYTES // (C * K * H * page_size * cache.k.dtype.itemsize)))
    S = A * page_size
    blocks_CB = jnp.pad(blocks_CB, ((0, 0), (0, -blocks_CB.shape[1] % A)))
    q_CKMH = q_CQH.astype(cache.k.dtype).reshape(C, K, Q // K, H)

    def turn(i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        top_CKM, total_CKM, mixed_CKMH = state
        pages_CA = jax.lax.dynamic_slice_in_dim(blocks_CB, i * A, A, axis=1)
        k_CKHS = cache.k[layer, pages_CA].transpose(0, 2, 3, 1, 4).reshape(C, K, H, S)
        v_CKSH = cache.v[layer, pages_CA].transpose(0, 2, 1, 3, 4).reshape(C, K, S, H)
        visible_CS = i * S + jnp.arange(S) <= position_C[:, None]
        scores_CKMS = jnp.einsum("ckmh,ckhs->ckms", q_CKMH, k_CKHS, preferred_element_type=jnp.float32) * H**-0.5
        scores_CKMS = jnp.where(visible_CS[:, None, None], scores_CKMS, MASKED)
        new_top_CKM = jnp.maximum(top_CKM, scores_CKMS.max(-1))
        weights_CKMS = jnp.where(visible_CS[:, None, None], jnp.exp(scores_CKMS - new_top_CKM[..., None]), 0.0)
        v_CKSH = jnp.where(visible_CS[:, None, :, None], v_CKSH, 0)  # what lies beyond may be anything, NaN included
        turn_CKMH = jnp.einsum(
            "ckms,cksh->ckmh", weights_CKMS.astype(v_CKSH.dtype), v_CKSH, preferred_element_type=jnp.float32
        )
        kept_CKM = jnp.exp(top_CKM - new_top_CKM)
        return new_top_CKM, kept_CKM * total_CKM + weights_CKMS.sum(-1), kept_CKM[..., None] * mixed_CKMH + turn_CKMH

    zeros_CKM = jnp.zeros(q_CKMH.shape[:3], jnp.float32)
    start = (zeros_CKM + MASKED, zeros_CKM, jnp.zeros(q_CKMH.shape, jnp.float32))
    _, total_CKM, mixed_CKMH = jax.lax.fori_loop(0, position_C.max() // S + 1, turn, start)
    return (mixed_CKMH / jnp.maximum(total_CKM, 1e-30)[..., None]).reshape(C, Q, H).astype(q_CQH.dtype)
