"""The quantizer actor: palettizes the projections it is handed, one matrix at a time (5.2).

Consumes (operation, matrix, bits); produces tables and indices per operation. Several quantizers share a model's matrices;
none needs JAX or the rest of the model, so they are small processes that run beside everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quant.palettize import Palettized, palettize


@dataclass(frozen=True)
class PalettizeRequest:
    """One matrix [out, in] of the model at one precision; `importance` has its shape (a diagonal Fisher) or is None."""

    operation: str
    weight: np.ndarray
    bits: int
    importance: np.ndarray | None = None


class Quantizer:
    """One replica; `group_size` slices along the output axis share a table."""

    def __init__(self, *, group_size: int = 16) -> None:
        self._group_size = group_size

    def palettize(self, requests: Sequence[PalettizeRequest]) -> list[Palettized]:
        """The palettized matrices, in order. Raises ValueError naming the operation that cannot be palettized."""
        done = []
        for request in requests:
            try:
                done.append(
                    palettize(request.weight, bits=request.bits, group_size=self._group_size, importance=request.importance)
                )
            except ValueError as error:
                raise ValueError(f"operation {request.operation}: {error}") from error
        return done
