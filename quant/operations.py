"""The operations of a model: its projections, one matrix per layer, by name. Bits are chosen for each of them (5.2.1).

"layers.2.down" is the `down` projection of layer 2, a matrix [out, in]; the order is layer by layer, as they run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from afm_rl.lora import PROJECTIONS


def operation_name(layer: int, projection: str) -> str:
    return f"layers.{layer}.{projection}"


def operation_names(num_layers: int) -> list[str]:
    """Every operation of a model of that depth."""
    return [operation_name(layer, projection) for layer in range(num_layers) for projection in PROJECTIONS]


def operations(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Every projection's matrix [out, in] of a parameter tree, or of a tree like it (gradients, a Fisher diagonal)."""
    stacked = {projection: np.asarray(tree["layers"][projection]) for projection in PROJECTIONS}
    num_layers = len(stacked[PROJECTIONS[0]])
    return {
        operation_name(layer, projection): stacked[projection][layer]
        for layer in range(num_layers)
        for projection in PROJECTIONS
    }
