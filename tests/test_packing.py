"""Packing and padding by hand-made documents: tokens, segments, positions and masks, and batches that need no state."""

from __future__ import annotations

import numpy as np
import pytest

from afm_rl.packing import OPEN_ROWS, Example, cut, epoch_rows, length_buckets, pack, pad


def test_two_documents_share_a_row() -> None:
    """Guards the four arrays of a packed row, the first token of each document being no target."""
    rows = pack([Example([5, 6, 7]), Example([8, 9])], length=8, pad_id=3)
    np.testing.assert_array_equal(rows.tokens, [[5, 6, 7, 8, 9, 3, 3, 3]])
    np.testing.assert_array_equal(rows.segments, [[1, 1, 1, 2, 2, 0, 0, 0]])
    np.testing.assert_array_equal(rows.positions, [[0, 1, 2, 0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(rows.mask, [[0, 1, 1, 0, 1, 0, 0, 0]])


def test_only_the_response_is_a_target() -> None:
    """Guards SFT: the mask starts at the response, in a packed row and in a padded one."""
    examples = [Example([5, 6, 7, 8], first_target=2), Example([9, 9], first_target=1)]
    np.testing.assert_array_equal(pack(examples, length=6, pad_id=0).mask, [[0, 0, 1, 1, 0, 1]])
    np.testing.assert_array_equal(pad(examples, pad_id=0, length=4)["mask_BT"], [[0, 0, 1, 1], [0, 1, 0, 0]])


def test_first_fit_fills_earlier_rows() -> None:
    """Guards the packing rate: a short document goes back to the first row with room."""
    rows = pack([Example([1] * 5), Example([2] * 6), Example([3] * 3)], length=8, pad_id=0)
    np.testing.assert_array_equal(rows.tokens[0], [1] * 5 + [3] * 3)
    assert len(rows) == 2


def test_every_token_is_packed_once() -> None:
    """Guards against loss and repetition on many documents, longer than a row among them, with few rows left open."""
    rng = np.random.default_rng(0)
    documents = [np.arange(n) + 100 * i for i, n in enumerate(rng.integers(2, 40, size=300))]
    rows = pack((Example(d) for d in documents), length=16, pad_id=-1)
    packed = np.sort(rows.tokens[rows.segments > 0])
    expected = np.concatenate([d[: len(d) - 1] if len(d) % 16 == 1 else d for d in documents])
    np.testing.assert_array_equal(packed, np.sort(expected))
    np.testing.assert_array_equal(rows.tokens[rows.segments == 0], -1)
    assert (rows.segments > 0).mean() > 0.9
    assert len(rows) > OPEN_ROWS


def test_long_documents_are_split_or_refused() -> None:
    """Guards pre-training (each piece starts anew, a lone last token teaches nothing) and post-training (an error)."""
    rows = pack([Example(range(9))], length=4, pad_id=0)
    np.testing.assert_array_equal(rows.tokens, [[0, 1, 2, 3], [4, 5, 6, 7]])
    np.testing.assert_array_equal(rows.positions, [[0, 1, 2, 3]] * 2)
    np.testing.assert_array_equal(rows.mask, [[0, 1, 1, 1]] * 2)
    with pytest.raises(ValueError, match="9 tokens does not fit sequences of 4; raise sequence_length"):
        pack([Example(range(9))], length=4, pad_id=0, too_long="refuse")


def test_nothing_to_pack_is_no_row() -> None:
    """Guards empty corpora: documents without a target give an empty, well-shaped set of rows."""
    rows = pack([Example([]), Example([7])], length=4, pad_id=0)
    assert rows.tokens.shape == (0, 4)


def test_taking_rows_keeps_the_four_arrays_together() -> None:
    """Guards the names and the order a loss relies on."""
    rows = pack([Example([1, 2]), Example([3, 4]), Example([5, 6])], length=2, pad_id=0)
    batch = rows.take(np.array([2, 0]))
    np.testing.assert_array_equal(batch["tokens_BT"], [[5, 6], [1, 2]])
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "tokens_BT": "int32",
        "segments_BT": "int32",
        "positions_BT": "int32",
        "mask_BT": "float32",
    }


def test_padding_rounds_up() -> None:
    """Guards the number of compiled shapes, and the refusal of a row that does not fit."""
    batch = pad([Example([1] * 33), Example([2])], pad_id=9, multiple=32)
    assert batch["tokens_BT"].shape == (2, 64)
    np.testing.assert_array_equal(batch["tokens_BT"][1], [2] + [9] * 63)
    np.testing.assert_array_equal(batch["mask_BT"].sum(1), [32, 0])
    with pytest.raises(ValueError, match="33 tokens does not fit rows of 32"):
        pad([Example([1] * 33)], pad_id=0, length=32)


@pytest.mark.parametrize("batch", [3, 7, 16])
def test_epochs_visit_every_row_once(batch: int) -> None:
    """Guards resume without state: steps are independent calls, and each epoch is a new order of all rows."""
    drawn = np.concatenate([epoch_rows(step, batch=batch, rows=7, seed=1) for step in range(21)])
    epochs = drawn[: 3 * 7].reshape(3, 7)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), [list(range(7))] * 3)
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epoch_rows(0, batch=7, rows=7, seed=1), epoch_rows(0, batch=7, rows=7, seed=2))
    with pytest.raises(ValueError, match="no examples"):
        epoch_rows(0, batch=2, rows=0, seed=0)


def test_length_buckets_cover_every_row_once_and_cut_only_padding() -> None:
    """Guards microbatches: no row lost or doubled, widths as narrow as the rows allow, whole-batch scalars untouched."""
    length_B = np.array([5, 40, 17, 16, 33, 3])
    mask_BT = (np.arange(48) < length_B[:, None]).astype(np.float32)
    parts = length_buckets(length_B, rows=4)
    assert [(rows.tolist(), width) for rows, width in parts] == [([5, 0, 3, 2], 32), ([4, 1], 48)]
    batch = {"mask_BT": mask_BT, "advantage_B": length_B.astype(np.float32), "num_sequences": np.asarray(6.0)}
    pieces = [cut(batch, rows, width) for rows, width in parts]
    assert [piece["mask_BT"].shape for piece in pieces] == [(4, 32), (2, 48)]
    assert sum(piece["mask_BT"].sum() for piece in pieces) == mask_BT.sum()
    assert all(np.array_equal(piece["mask_BT"].sum(1), piece["advantage_B"]) for piece in pieces)
    assert {float(piece["num_sequences"]) for piece in pieces} == {6.0}
    assert [(rows.tolist(), width) for rows, width in length_buckets(length_B, rows=6)] == [([0, 1, 2, 3, 4, 5], 48)]
