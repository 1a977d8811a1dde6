"""The data mixture of a pre-training stage (3.2): packed rows per domain, mixed in exact proportion, shuffled, batched.

Built on grain's random-access datasets: batch number `step` is a pure function of (corpora, weights, seed, step), so the
data iterator's whole state is the step count, and a resume or another worker reads exactly the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import grain
import numpy as np

from afm_rl.packing import Batch, Example, PackedRows, pack
from pretrain.token_corpus import TokenCorpus


class _Rows(grain.sources.RandomAccessDataSource[int]):
    """Row keys (domain index, row) of one domain's packed rows, as grain wants to see them."""

    def __init__(self, domain: int, count: int) -> None:
        self._domain, self._count = domain, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self._domain, index


def pack_corpus(corpus: TokenCorpus, *, length: int, pad_id: int) -> PackedRows:
    """Every document of a corpus, cut to at most `length` and packed."""
    return pack((Example(corpus.document(i)) for i in range(len(corpus))), length=length, pad_id=pad_id)


def mixture_batches(
    domains: Mapping[str, PackedRows], weights: Mapping[str, float], *, batch: int, seed: int
) -> Callable[[int], Batch]:
    """`batches(step)` over the domains whose weight is positive.

    Raises ValueError when a weighted domain is missing or empty, naming it.
    """
    names = [name for name, weight in weights.items() if weight > 0]
    for name in names:
        if name not in domains or not len(domains[name]):
            raise ValueError(
                f"the mixture gives {name!r} a weight of {weights[name]}, but there is no text in that domain; "
                f"domains with text: {', '.join(n for n in domains if len(domains[n])) or 'none'}"
            )
    packed = [domains[name] for name in names]
    sources = [
        grain.MapDataset.source(_Rows(i, len(rows))).seed(seed + i).shuffle().repeat() for i, rows in enumerate(packed)
    ]
    mixed = grain.MapDataset.mix(sources, weights=[weights[name] for name in names])

    def batches(step: int) -> Batch:
        keys = [mixed[step * batch + i] for i in range(batch)]
        rows = [packed[domain].take(np.asarray([row])) for domain, row in keys]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    return batches
