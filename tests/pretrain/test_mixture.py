"""The data mixture: exact proportions, and batches that are a pure function of the step."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from afm_rl.packing import Batch, Example, PackedRows, pack
from pretrain.mixture import mixture_batches, pack_corpus
from pretrain.token_corpus import TokenCorpus

WEIGHTS = {"web": 0.5, "code": 0.375, "math": 0.125}
#: First token of a domain's rows; row r of a domain holds the tokens base + r.
BASE = {"web": 1000, "code": 2000, "math": 3000}


def domain(base: int, rows: int) -> PackedRows:
    return pack([Example([base + r] * 4) for r in range(rows)], length=4, pad_id=0)


DOMAINS = {name: domain(base, rows) for (name, base), rows in zip(BASE.items(), (40, 7, 5), strict=True)}


def drawn(batches: list[Batch]) -> list[int]:
    return [int(row[0]) for batch in batches for row in batch["tokens_BT"]]


def run(steps: range, *, batch: int = 4, seed: int = 0) -> list[Batch]:
    batches = mixture_batches(DOMAINS, WEIGHTS, batch=batch, seed=seed)
    return [batches(step) for step in steps]


@pytest.mark.parametrize("steps", [8, 20, 100])
def test_proportions_are_exact(steps: int) -> None:
    """Guards 3.2's mixture: not on average but in every prefix, to within one row a domain."""
    counts = Counter(token // 1000 * 1000 for token in drawn(run(range(steps))))
    for name, weight in WEIGHTS.items():
        assert abs(counts[BASE[name]] - 4 * steps * weight) <= 1


def test_batches_are_a_function_of_the_step() -> None:
    """Guards resume: a new iterator asked for step 30 only, or backwards, gives the same rows."""
    whole = run(range(33))
    for step in (32, 30, 0):
        (alone,) = run(range(step, step + 1))
        for name, array in alone.items():
            np.testing.assert_array_equal(array, whole[step][name])
    assert set(whole[0]) == {"tokens_BT", "segments_BT", "positions_BT", "mask_BT"}
    assert whole[0]["tokens_BT"].shape == (4, 4)


def test_the_batch_size_only_cuts_the_stream() -> None:
    """Guards against rows lost or repeated between batches."""
    assert drawn(run(range(12), batch=4)) == drawn(run(range(6), batch=8))


def test_every_epoch_of_a_domain_visits_every_row_once() -> None:
    """Guards coverage: small domains repeat, in a new order each time, large ones do not."""
    tokens = drawn(run(range(60)))
    code = [token for token in tokens if 2000 <= token < 3000]
    epochs = [code[i : i + 7] for i in range(0, 84, 7)]
    assert all(sorted(epoch) == list(range(2000, 2007)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 6
    web = [token for token in tokens if token < 2000]
    assert len(set(web[:40])) == 40


def test_seeds_give_other_orders() -> None:
    """Guards that the seed reaches every domain."""
    assert drawn(run(range(5), seed=1)) != drawn(run(range(5), seed=2))


def test_a_domain_without_weight_is_not_needed() -> None:
    """Guards stages that drop a domain: weight zero, or not named."""
    batches = mixture_batches(DOMAINS, {"math": 1.0, "web": 0.0, "poetry": 0.0}, batch=3, seed=0)
    assert {token // 1000 for token in drawn([batches(0)])} == {3}


@pytest.mark.parametrize("domains", [{}, {"poetry": domain(0, 0)}])
def test_a_weighted_domain_without_text_is_an_error(domains: dict[str, PackedRows]) -> None:
    """Guards a silent renormalisation: the message names the domain and what there is."""
    with pytest.raises(ValueError, match=r"'poetry' a weight of 0\.5, .*domains with text: web, code, math"):
        mixture_batches(DOMAINS | domains, {"web": 0.5, "poetry": 0.5}, batch=1, seed=0)


def test_a_corpus_is_packed_whole() -> None:
    """Guards the step from documents to rows: long documents are cut, short ones share a row."""
    corpus = TokenCorpus(np.arange(1, 12, dtype=np.uint16), np.array([0, 2, 4, 11]))
    rows = pack_corpus(corpus, length=4, pad_id=0)
    np.testing.assert_array_equal(rows.tokens, [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 0]])
    np.testing.assert_array_equal(rows.segments, [[1, 1, 2, 2], [1, 1, 1, 1], [1, 1, 1, 0]])
