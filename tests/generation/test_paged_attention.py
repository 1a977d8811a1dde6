"""Attention over the paged cache: every implementation against float64 in NumPy, and what must not change a token's bits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afm_rl.errors import UserError
from afm_rl.generation.paged_attention import paged_attention
from afm_rl.generation.paged_cache import FlatTokens, PagedCache

IMPLEMENTATIONS = ("xla", "cpu_kernel")
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
    spans: list[tuple[int, int]], *, heads: tuple[int, int] = (4, 2), head_dim: int = 16, page: int = 16, seed: int = 0
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


def written_pools(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The pools after all tokens of the call."""
    k_pool, v_pool = np.array(case.k_pool), np.array(case.v_pool)
    page = k_pool.shape[-1]
    for n in np.flatnonzero(case.position >= 0):
        page_id, place = case.blocks[case.row[n], case.position[n] // page], case.position[n] % page
        k_pool[LAYER, page_id, :, :, place] = case.k[n]
        v_pool[LAYER, page_id, :, place] = case.v[n]
    return k_pool, v_pool


def reference(case: Case) -> np.ndarray:
    """Token by token in float64, after writing all of them."""
    k_pool, v_pool = (pool[LAYER].astype(np.float64) for pool in written_pools(case))
    page, heads_per_kv = k_pool.shape[-1], case.q.shape[1] // case.k.shape[1]
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


def check_against_reference(implementation: str, heads: tuple[int, int], head_dim: int, page: int) -> None:
    """Prefill, decode and a chunk in the middle, of lengths around a page's border and beyond a block of the kernel."""
    spans = [(0, 1), (0, 2 * page), (page - 1, page), (page, page + 1), (3, page + 5), (120, 141), (299, 300)]
    case = make_case(spans, heads=heads, head_dim=head_dim, page=page)
    mixed, cache = run(case, implementation)
    np.testing.assert_allclose(mixed, reference(case), atol=2e-6, rtol=2e-6)
    assert_cache(cache, case)


def assert_cache(cache: PagedCache, case: Case) -> None:
    """The tokens of the call were written where they belong, bit by bit, and nothing else was touched."""
    for pool, written in zip(cache, written_pools(case), strict=True):
        np.testing.assert_array_equal(np.asarray(pool).view(np.int32), written.view(np.int32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("head_dim", "page"), [(16, 16), (64, 16), (80, 48)])
def test_it_is_attention_over_the_past(implementation: str, head_dim: int, page: int) -> None:
    check_against_reference(implementation, (4, 2), head_dim, page)


@pytest.mark.slow  # every ratio of heads and every width of vectors is a program of its own, compiled in 10 s
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("heads", "head_dim", "page"),
    [((4, 2), 8, 16), ((2, 2), 16, 8), ((8, 1), 24, 8), ((6, 2), 128, 16), ((5, 5), 40, 24), ((15, 3), 64, 16)],
)
def test_other_shapes(implementation: str, heads: tuple[int, int], head_dim: int, page: int) -> None:
    check_against_reference(implementation, heads, head_dim, page)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_writes_nothing_and_gives_zeros(implementation: str) -> None:
    case = make_case([(0, 6), (5, 6), (17, 30)])
    case.position[[1, 6, 9, 10, 19]] = -1
    case.row[[1, 19]] = 0
    mixed, cache = run(case, implementation)
    assert not mixed[case.position < 0].any()
    assert_cache(cache, case)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_share_the_pages_of_a_prompt(implementation: str) -> None:
    case = make_case([(32, 33), (32, 40), (35, 36)])
    case.blocks[1:, :2] = case.blocks[0, :2]
    mixed, _ = run(case, implementation)
    np.testing.assert_allclose(mixed, reference(case), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_tokens_over_a_float32_cache(implementation: str) -> None:
    case = make_case([(20, 21), (0, 19)])
    rounded = case._replace(**{x: np.asarray(jnp.bfloat16(getattr(case, x)), np.float32) for x in ("q", "k", "v")})
    mixed, cache = run(case, implementation, jnp.bfloat16)
    assert_cache(cache, rounded)
    expected = reference(rounded)
    np.testing.assert_allclose(mixed, expected, rtol=2**-8, atol=1e-6)  # the last rounding, to 8 bits


def test_both_implementations_give_the_same() -> None:
    case = make_case([(0, 40), (100, 150), (7, 8)], head_dim=64)
    (by_xla, xla_cache), (by_kernel, kernel_cache) = (run(case, implementation) for implementation in IMPLEMENTATIONS)
    np.testing.assert_allclose(by_kernel, by_xla, atol=2e-6)
    for a, b in zip(xla_cache, kernel_cache, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_bits_of_a_token_depend_on_its_row_alone() -> None:
    """A prompt of 150 at once, in chunks beside other rows in another order and other pages, and token by token."""
    prompt = make_case([(0, 150)], head_dim=64)
    at_once, _ = run(prompt, "cpu_kernel")

    others = make_case([(0, 31), (90, 160), (3, 4)], head_dim=64, seed=1)
    chunks = []
    cache = PagedCache(*(jnp.zeros((2, 64, *x.shape[2:])) for x in prompt.cache()))
    blocks = 1 + np.random.default_rng(2).permutation(40).reshape(4, 10)
    for start, end in ((0, 37), (37, 38), (38, 121), (121, 150)):
        order = np.r_[np.full(end - start, 3), others.row]
        q, k, v = (np.r_[getattr(prompt, x)[start:end], getattr(others, x)] for x in ("q", "k", "v"))
        position = np.r_[np.arange(start, end), others.position]
        case = Case(q, k, v, cache.k, cache.v, position, order, blocks)
        mixed, cache = run(case, "cpu_kernel")
        chunks.append(mixed[: end - start])
    np.testing.assert_array_equal(np.concatenate(chunks), at_once)

    cache = PagedCache(*(jnp.zeros_like(x) for x in prompt.cache()))
    for position in range(150):
        token = slice(position, position + 1)
        case = Case(*(x[token] for x in prompt[:3]), cache.k, cache.v, np.array([position]), np.array([0]), prompt.blocks)
        mixed, cache = run(case, "cpu_kernel")
        np.testing.assert_array_equal(mixed[0], at_once[position])


def test_many_rows_on_many_threads_give_the_bits_of_one() -> None:
    """64 rows are work for every thread of the pool; four programs at once compete for them."""
    case = make_case([(length, length + 1) for length in range(200, 264)], head_dim=64)
    alone = []
    for row in (0, 17, 63):
        one = Case(
            *(x[[row]] for x in case[:3]), case.k_pool, case.v_pool, case.position[[row]], np.array([row]), case.blocks
        )
        alone.append(run(one, "cpu_kernel")[0][0])
    with ThreadPoolExecutor(4) as pool:
        for mixed, _ in pool.map(lambda _: run(case, "cpu_kernel"), range(24)):
            np.testing.assert_array_equal(mixed[[0, 17, 63]], alone)


def test_no_token_reads_before_all_are_written() -> None:
    """A prompt again and again over the same pages, its values with the other sign: a stale one would not cancel."""
    case = make_case([(0, 64)], head_dim=64)
    q, k, v = (jnp.asarray(x) for x in case[:3])

    def again(i: jax.Array, state: tuple[jax.Array, PagedCache]) -> tuple[jax.Array, PagedCache]:
        worst, cache = state
        sign = 1.0 - 2.0 * (i % 2)
        mixed, cache = paged_attention(q, k, sign * v, cache, LAYER, case.tokens(), implementation="cpu_kernel")
        return jnp.maximum(worst, jnp.abs(sign * mixed - expected).max()), cache

    expected = jnp.asarray(run(case, "cpu_kernel")[0])
    worst, _ = jax.jit(lambda cache: jax.lax.fori_loop(0, 2000, again, (jnp.float32(0), cache)))(case.cache())
    assert worst == 0


def test_auto_is_the_kernel_where_it_can_run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    case = make_case([(8, 9)])
    args = [*(jnp.asarray(x) for x in case[:3]), case.cache(), LAYER, case.tokens()]

    def program(implementation: str) -> str:
        return jax.jit(partial(paged_attention, implementation=implementation), static_argnums=4).lower(*args).as_text()

    assert "afm_rl_paged_attention" in program("auto")
    args[3] = PagedCache(*(x.astype(jnp.bfloat16) for x in args[3]))
    assert "afm_rl_paged_attention" not in program("auto")
    assert caplog.text.count("the cache is bfloat16") == 1
    program("auto")
    assert caplog.text.count("the cache is bfloat16") == 1
    with pytest.raises(UserError, match="the cache is bfloat16"):
        program("cpu_kernel")
    with pytest.raises(UserError, match="no implementation 'gpu'"):
        program("gpu")
    args[3] = case.cache()
    monkeypatch.setattr("afm_rl.generation.paged_attention.unusable_reason", lambda: "numba is not installed")
    assert "afm_rl_paged_attention" not in program("auto")
    assert "numba is not installed" in caplog.text


def test_what_does_not_fit_together_is_refused() -> None:
    case = make_case([(8, 9)])
    q, k, v = (jnp.asarray(x) for x in case[:3])
    with pytest.raises(ValueError, match="layer 2 of a cache of 2"):
        paged_attention(q, k, v, case.cache(), 2, case.tokens())
    with pytest.raises(ValueError, match="v has the shape"):
        paged_attention(q, k, v[:, :1], case.cache(), 0, case.tokens())
    with pytest.raises(ValueError, match="3 query heads"):
        paged_attention(q[:, :3], k, v, case.cache(), 0, case.tokens())


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
