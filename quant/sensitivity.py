"""How much each operation suffers from few bits (5.2.1: "it is unlikely that all layers have the equal importance").

The loss rises by about 1/2 sum_i H_ii (w_i - q_i)^2 when w becomes q; the mean squared gradient (the empirical Fisher
diagonal) stands for H_ii. The paper names no measure: this one is ours. The same diagonal is the importance that
palettization's k-means weighs each weight with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from quant.operations import operations
from quant.palettize import Palettized


def fisher_diagonal(gradients: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Mean of g^2 over gradient trees (one a batch) -> operation -> [out, in] float32.

    Raises ValueError when there is no gradient, or one that is not finite.
    """
    total: dict[str, np.ndarray] = {}
    count = 0
    for gradient in gradients:
        count += 1
        for name, g in operations(gradient).items():
            square = np.square(g.astype(np.float64))
            if not np.isfinite(square).all():
                raise ValueError(f"gradient {count} of {name} is not finite: sensitivity cannot be measured")
            total[name] = total[name] + square if name in total else square
    if not count:
        raise ValueError("no gradient to measure sensitivity with: give at least one batch")
    return {name: (square / count).astype(np.float32) for name, square in total.items()}


def sensitivity(weight: np.ndarray, palettized: Palettized, fisher: np.ndarray) -> float:
    """1/2 sum fisher * (weight - quantised)^2: the expected rise of the loss, in nats, when it is palettized."""
    error = weight.astype(np.float64) - palettized.dequantize()
    return 0.5 * float(np.sum(fisher.astype(np.float64) * np.square(error)))


def error_table(
    weights: Mapping[str, np.ndarray],
    candidates: Mapping[str, Mapping[int, Palettized]],
    fisher: Mapping[str, np.ndarray],
) -> dict[str, dict[int, float]]:
    """operation -> bits -> sensitivity: what `allocate` chooses from."""
    return {
        name: {bits: sensitivity(weights[name], palettized, fisher[name]) for bits, palettized in by_bits.items()}
        for name, by_bits in candidates.items()
    }
