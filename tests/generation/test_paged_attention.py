"""Attention over the paged cache: every implementation against float64 in NumPy, and what must not change a token's bits."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afm_rl.generation.paged_attention import paged_attention
from afm_rl.generation.paged_cache import FlatTokens, PagedCache

IMPLEMENTATIONS = ("xla",)
LAYER = 1


class Case(NamedTuple):
    """One call's arguments, as NumPy arrays."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    k_pool: np.ndarray
    v_pool: np.ndarray
    position: np.ndarray
    row: np.ndarray
    blocks: np.ndarray

    def tokens(self) -> FlatTokens:
        return FlatTokens(*(jnp.asarray(x, jnp.int32) for x in (0 * self.row, self.position, self.row, self.blocks)))

    def cache(self) -> PagedCache:
        return PagedCache(jnp.asarray(self.k_pool), jnp.asarray(self.v_pool))


def make_case(
    spans: list[tuple[int, int]], *, heads: tuple[int, int] = (4, 2), head_dim: int = 16, page: int = 8, seed: int = 0
) -> Case:
    """Rows of which row r brings the tokens of positions spans[r]; earlier positions are in the pool, the rest is NaN."""
    rng = np.random.default_rng(seed)
    Q, K = heads
    B = max(end for _, end in spans) // page + 2
    blocks = 1 + rng.permutation(len(spans) * B).reshape(len(spans), B)
    k_pool = np.full((2, len(spans) * B + 1, K, head_dim, page), np.nan, np.float32)
    v_pool = k_pool.swapaxes(-1, -2).copy()
    for row, (start, _) in enumerate(spans):
        for position in range(start):
            page_id, place = blocks[row, position // page], position % page
            k_pool[LAYER, page_id, :, :, place] = rng.normal(size=(K, head_dim))
            v_pool[LAYER, page_id, :, place] = rng.normal(size=(K, head_dim))
    position = np.concatenate([np.arange(*span) for span in spans])
    row = np.repeat(np.arange(len(spans)), [end - start for start, end in spans])
    q, k, v = (rng.normal(size=(len(row), heads, head_dim)).astype(np.float32) for heads in (Q, K, K))
    return Case(q, k, v, k_pool, v_pool, position, row, blocks)


def run(case: Case, implementation: str, dtype: Any = jnp.float32) -> tuple[np.ndarray, PagedCache]:
    q, k, v = (jnp.asarray(x, dtype) for x in (case.q, case.k, case.v))
    call = jax.jit(paged_attention, static_argnums=4, static_argnames="implementation")
    mixed, cache = call(q, k, v, case.cache(), LAYER, case.tokens(), implementation=implementation)
    assert mixed.dtype == dtype
    return np.asarray(mixed.astype(jnp.float32)), cache


def reference(case: Case) -> np.ndarray:
    """Token by token in float64, after writing all of them."""
    k_pool, v_pool = case.k_pool[LAYER].astype(np.float64), case.v_pool[LAYER].astype(np.float64)
    page, heads_per_kv = k_pool.shape[-1], case.q.shape[1] // case.k.shape[1]
    for n in np.flatnonzero(case.position >= 0):
        page_id = case.blocks[case.row[n], case.position[n] // page]
        k_pool[page_id, :, :, case.position[n] % page] = case.k[n]
        v_pool[page_id, :, case.position[n] % page] = case.v[n]
    out = np.zeros(case.q.shape)
    for n in np.flatnonzero(case.position >= 0):
        past = np.arange(case.position[n] + 1)
        pages = case.blocks[case.row[n], past // page]
        for head in range(case.q.shape[1]):
            keys = k_pool[pages, head // heads_per_kv, :, past % page]
            values = v_pool[pages, head // heads_per_kv, past % page]
            scores = keys @ case.q[n, head].astype(np.float64) / np.sqrt(case.q.shape[2])
            weights = np.exp(scores - scores.max())
            out[n, head] = weights @ values / weights.sum()
    return out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("heads", "head_dim", "page"),
    [((4, 2), 16, 8), ((2, 2), 8, 16), ((8, 1), 24, 8), ((6, 2), 64, 16), ((5, 5), 40, 24)],
)
def test_it_is_attention_over_the_past(implementation: str, heads: tuple[int, int], head_dim: int, page: int) -> None:
    """Prefill, decode and a chunk in the middle, of lengths around a page's border."""
    spans = [(0, 1), (0, 2 * page), (page - 1, page), (page, page + 1), (3, page + 5), (5 * page - 1, 5 * page + 2)]
    case = make_case(spans, heads=heads, head_dim=head_dim, page=page)
    mixed, _ = run(case, implementation)
    np.testing.assert_allclose(mixed, reference(case), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_donated_cache_is_updated_in_place(implementation: str) -> None:
    """Two layers in turn on one pool: no program holds a second one."""
    case = make_case([(8, 9), (4, 8)])
    cache = PagedCache(*(jnp.zeros((2, 400, *x.shape[2:])) for x in (case.k_pool, case.v_pool)))
    q, k, v = (jnp.asarray(x) for x in (case.q, case.k, case.v))

    def layers(q: jax.Array, cache: PagedCache, tokens: FlatTokens) -> tuple[jax.Array, PagedCache]:
        for layer in range(2):
            q, cache = paged_attention(q, q[:, :2] + k, q[:, 2:] + v, cache, layer, tokens, implementation=implementation)
        return q, cache

    program = jax.jit(layers, donate_argnums=1).lower(q, cache, case.tokens()).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.k.nbytes + cache.v.nbytes
    assert memory.temp_size_in_bytes < cache.k.nbytes
    before = cache.k.unsafe_buffer_pointer()
    _, cache = program(q, cache, case.tokens())
    assert cache.k.unsafe_buffer_pointer() == before
