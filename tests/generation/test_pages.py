"""The page pool: references, known prefixes, and what is given up first."""

from __future__ import annotations

import numpy as np

from afm_rl.generation.pages import PagePool, prefix_keys


def test_pages_are_counted_and_the_padding_page_is_never_given() -> None:
    """Guards against a page with two owners, and against page 0."""
    pool = PagePool(9, 4)
    assert (pool.pages, pool.available) == (8, 8)
    first, second = pool.allocate(3), pool.allocate(5)
    assert sorted(first + second) == list(range(1, 9))
    pool.share(first[:1])
    pool.release(first)
    assert pool.available == 2
    pool.release(first[:1])
    assert (pool.available, pool.used) == (3, 5)


def test_a_known_page_stays_known_until_its_memory_is_needed() -> None:
    """Guards the prefix cache: the least recently used page goes first, and of one prefix its end."""
    pool = PagePool(5, 4)
    old, new = pool.allocate(2), pool.allocate(2)
    keys = prefix_keys(np.arange(8), 4, root="p/1"), prefix_keys(np.arange(8) + 1, 4, root="p/1")
    for pages, names in ((old, keys[0]), (new, keys[1])):
        for page, key in zip(pages, names, strict=True):
            pool.remember(page, key)
        pool.release(pages)
    assert pool.available == 4
    assert pool.known(keys[0]) == old
    assert pool.idle(old) == 2
    pool.allocate(1)
    assert pool.known(keys[0]) == old[:1]
    assert pool.known(keys[1]) == new
    pool.share(old[:1])
    pool.allocate(2)
    assert pool.known(keys[0]) == old[:1]
    assert pool.known(keys[1]) == []


def test_keys_depend_on_everything_before_them() -> None:
    """Guards against the pages of another prompt, policy or version: one early token or the root changes every later key."""
    tokens = np.arange(12)
    keys = prefix_keys(tokens, 4, root="p/1")
    assert len(keys) == 3
    assert prefix_keys(tokens[:11], 4, root="p/1") == keys[:2]
    other = tokens.copy()
    other[5] = 0
    changed = prefix_keys(other, 4, root="p/1")
    assert [a == b for a, b in zip(keys, changed, strict=True)] == [True, False, False]
    assert not set(keys) & set(prefix_keys(tokens, 4, root="p/2"))
    assert prefix_keys(tokens.astype(np.int64), 4, root="p/1") == keys
