"""Who owns which page of the key-value cache: allocation, sharing by reference, and the cache of known prefixes.

A full page of a prefix is known by a digest of everything that its keys and values depend on: the policy and version (and
adapter) that made them, and all tokens up to its end. A page that nobody uses any more stays known until its memory is
needed, the least recently used first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

#: Page 0 is the padding's.
RESERVED_PAGES = 1


class PagePool:
    """Counts references to the pages 1..`pages` - 1. Nothing here touches the arrays."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.pages, self.page_size = pages - RESERVED_PAGES, page_size
        self._free = list(range(pages - 1, 0, -1))
        self._references = [0] * pages
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # known and unused, least recently used first

    @property
    def available(self) -> int:
        """Pages that can be allocated, known ones that nobody uses included."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages that somebody refers to."""
        return self.pages - self.available

    def allocate(self, count: int) -> list[int]:
        """`count` pages of one reference each. The caller has looked at `available`."""
        while len(self._free) < count:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
            self._free.append(page)
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """One more reference to each."""
        for page in pages:
            if self._references[page] == 0:
                del self._idle[page]
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One reference less to each; the end of a prefix is given up before its beginning."""
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def known(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest known prefix, not yet referred to: `share` them before anything is allocated."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def idle(self, pages: Sequence[int]) -> int:
        """How many of these count as `available`."""
        return sum(page in self._idle for page in pages)

    def remember(self, page: int, key: bytes) -> None:
        """A full page is now known by this key, unless another one is already."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def _forget(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]


def prefix_keys(tokens_T: np.ndarray, page_size: int, *, root: str) -> list[bytes]:
    """A key for every full page of these tokens; `root` names what else the keys and values depend on."""
    key = hashlib.blake2b(root.encode(), digest_size=16).digest()
    keys = []
    data = np.ascontiguousarray(tokens_T, np.int32)
    for start in range(0, len(data) - page_size + 1, page_size):
        key = hashlib.blake2b(key + data[start : start + page_size].tobytes(), digest_size=16).digest()
        keys.append(key)
    return keys
