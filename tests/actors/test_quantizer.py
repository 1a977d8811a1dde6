"""The quantizer actor: the function's own result, in order, and an error that names the operation."""

from __future__ import annotations

import numpy as np
import pytest

from actors.quantizer import PalettizeRequest, Quantizer
from quant.palettize import palettize


def test_matrices_come_back_in_order() -> None:
    """Guards the hand-over: bits, group size and importance reach `palettize`."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(2, 8, 6)).astype(np.float32)
    importance = rng.uniform(size=(8, 6))
    done = Quantizer(group_size=4).palettize(
        [PalettizeRequest("layers/0/q", weights[0], 2, importance), PalettizeRequest("layers/0/k", weights[1], 3)]
    )
    expected = (
        palettize(weights[0], bits=2, group_size=4, importance=importance),
        palettize(weights[1], bits=3, group_size=4),
    )
    for found, wanted in zip(done, expected, strict=True):
        np.testing.assert_array_equal(found.indices, wanted.indices)
        np.testing.assert_array_equal(found.lut, wanted.lut)
        assert (found.bits, found.group_size) == (wanted.bits, 4)


def test_the_operation_is_named() -> None:
    """Guards diagnosis among hundreds of matrices."""
    broken = PalettizeRequest("layers/7/down", np.full((2, 2), np.nan, np.float32), 2)
    with pytest.raises(ValueError, match="operation layers/7/down: "):
        Quantizer().palettize([broken])
