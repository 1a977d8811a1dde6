"""The quantised model that adapters are trained on (paper 5.2.1): palettized projections, int8 embedding, norms as is.

Accuracy-recovery adapters (5.2) are ordinary LoRA adapters over this frozen tree: `afm_rl.lora.attach` pairs them, and
the same objectives train them. Layers of one projection may have different bits: their tables are padded to a common
width, so that one stacked leaf holds them all and the model can scan over it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from afm_rl.lora import PROJECTIONS
from afm_rl.quantized import Int8Embedding, PalettizedWeight
from quant.operations import operation_name, operations
from quant.palettize import Palettized, palettize, quantize_embedding

#: Table entries of a stacked leaf: 4 bits, unless a layer has more.
MIN_ENTRIES = 16


def quantize_params(params: Mapping[str, Any], palettized: Mapping[str, Palettized]) -> dict[str, Any]:
    """`params` with PalettizedWeight projections, stacked over layers, and Int8Embedding tables; arrays are NumPy.

    `palettized` holds one matrix for every operation of the model (see `palettize_operations`). Raises ValueError,
    naming the operation, for one that is missing or has another shape than the weight it replaces.
    """
    layers: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in params["layers"].items()}
    for projection in PROJECTIONS:
        num_layers, *shape = layers[projection].shape
        names = [operation_name(layer, projection) for layer in range(num_layers)]
        for name in names:
            if name not in palettized:
                raise ValueError(f"operation {name} has not been palettized")
            if palettized[name].indices.shape != tuple(shape):
                raise ValueError(f"operation {name} is {tuple(shape)}, its indices {palettized[name].indices.shape}")
        layers[projection] = stack([palettized[name] for name in names])
    quantized = {**params, "layers": layers, "final_norm": np.asarray(params["final_norm"])}
    for table in ("embed", "lm_head"):
        if table in params:
            quantized[table] = {"weight": embedding_leaf(np.asarray(params[table]["weight"]))}
    return quantized


def palettize_operations(
    params: Mapping[str, Any],
    bits: Mapping[str, int],
    *,
    group_size: int = 16,
    axis: int = 0,
    importance: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Palettized]:
    """Every operation of `params` palettized at its bits, one after the other in this process."""
    return {
        name: palettize(
            weight,
            bits=bits[name],
            group_size=group_size,
            axis=axis,
            importance=None if importance is None else importance[name],
        )
        for name, weight in operations(params).items()
    }


def stack(layers: list[Palettized]) -> PalettizedWeight:
    """The layers of one projection as one leaf; narrower tables repeat their last entry, which no index points to.

    Raises ValueError when the layers disagree in axis or group size.
    """
    axis, group_size = layers[0].axis, layers[0].group_size
    if any((layer.axis, layer.group_size) != (axis, group_size) for layer in layers):
        raise ValueError("the layers of a projection must be palettized along one axis and with one group size")
    entries = max(MIN_ENTRIES, *(layer.lut.shape[1] for layer in layers))
    luts = [np.pad(layer.lut, ((0, 0), (0, entries - layer.lut.shape[1])), mode="edge") for layer in layers]
    return PalettizedWeight(
        lut=np.stack(luts),  # type: ignore[arg-type]  # NumPy here, on the device where the model runs
        indices=np.stack([layer.indices for layer in layers]),  # type: ignore[arg-type]
        axis=axis,
        group_size=group_size,
    )


def unstack(leaf: PalettizedWeight, bits: list[int]) -> list[Palettized]:
    """The inverse of `stack`: each layer with its own 2**bits table entries."""
    lut, indices = np.asarray(leaf.lut), np.asarray(leaf.indices)
    return [Palettized(lut[layer][:, : 2**b], indices[layer], b, leaf.axis, leaf.group_size) for layer, b in enumerate(bits)]


def embedding_leaf(weight: np.ndarray) -> Int8Embedding:
    """An embedding table [V, D] in 8 bits per channel."""
    quantized = quantize_embedding(weight)
    return Int8Embedding(quantized.values, quantized.scale)  # type: ignore[arg-type]
