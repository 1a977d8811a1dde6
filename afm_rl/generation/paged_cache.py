"""The paged key-value cache as arrays: pages of a few positions, and who owns which through a block table.

Keys lie transposed, so that both products of attention run along contiguous memory. Page 0 is nobody's: what padding
writes goes there, if anywhere.

Shapes: L layers, K kv heads, H head dim, R rows (sequences), B blocks (pages of a row), N tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from afm_rl.config import ModelConfig

#: What a program is given: a NumPy or a JAX array.
Array = Any


class PagedCache(NamedTuple):
    """Keys [L, pages, K, H, page] and values [L, pages, K, page, H]."""

    k: jax.Array
    v: jax.Array

    @property
    def page_size(self) -> int:
        """Positions of a page."""
        return int(self.k.shape[-1])


class FlatTokens(NamedTuple):
    """N tokens of any rows, in any order but increasing positions within a row: what one forward pass works on.

    Token n is `token[n]` at `position[n]` of row `row[n]`, whose page of position p is `blocks[row, p // page_size]`.
    A padding token has position -1.
    """

    token_N: Array  # int32
    position_N: Array  # int32
    row_N: Array  # int32
    blocks_RB: Array  # int32


def empty_cache(config: ModelConfig, *, pages: int, page_size: int, dtype: Any) -> PagedCache:
    """A cache of zeros with `pages` pages, page 0 included."""
    L, K, H = config.num_layers, config.num_kv_heads, config.head_dim
    return PagedCache(jnp.zeros((L, pages, K, H, page_size), dtype), jnp.zeros((L, pages, K, page_size, H), dtype))


def page_bytes(config: ModelConfig, *, page_size: int, dtype: Any) -> int:
    """Bytes of one page over all layers, keys and values."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * page_size * jnp.dtype(dtype).itemsize
