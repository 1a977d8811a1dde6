"""Quantised leaves of the parameter tree (paper 5.2.1 and F): palettized projections and the 8-bit embedding.

A palettized projection stores one small index per weight and one lookup table per group of `group_size` rows (or
columns); the embedding stores int8 with one scale per row. Both are pytrees. A palettized stack has the layer axis
first in every array: it works under `jax.lax.scan`, and `jax.tree.map(lambda w: w[l], layers)` gives a layer's leaf.
They are made by `quant/`; here is only what the model and the server need to use them.

Shapes: L layers, E table entries (a power of two; a layer of fewer bits uses the first 2**bits), V vocab, D model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


@partial(jax.tree_util.register_dataclass, data_fields=["lut", "indices"], meta_fields=["axis", "group_size"])
@dataclass(frozen=True)
class PalettizedWeight:
    """A projection as lookup tables: W[o, i] = lut[g, indices[o, i]], g = (o if axis == 0 else i) // group_size.

    lut [(L,) groups, E] float16; indices [(L,) out, in] uint8; the last group may be smaller. `axis` counts the axes of
    the matrix [out, in], whether or not a layer axis precedes them.
    """

    lut: jax.Array
    indices: jax.Array
    axis: int = 0
    group_size: int = 16

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight it stands for: [(L,) out, in]."""
        return tuple(self.indices.shape)

    def dequantize(self) -> jax.Array:
        """The weight [(L,) out, in] in float32: exactly the tables' values."""
        *lead, groups, entries = self.lut.shape
        rows, columns = self.indices.shape[-2:]
        group = jnp.arange(rows if self.axis == 0 else columns, dtype=jnp.int32) // self.group_size
        offset = group[:, None] if self.axis == 0 else group[None, :]
        flat = (offset * entries + self.indices.astype(jnp.int32)).reshape(*lead, rows * columns)
        table = self.lut.astype(jnp.float32).reshape(*lead, groups * entries)
        # The indices are in range by construction (the package checks them on load): no bounds arithmetic per weight.
        weight = jnp.take_along_axis(table, flat, axis=-1, mode="promise_in_bounds")
        return weight.reshape(*lead, rows, columns)


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[])
@dataclass(frozen=True)
class Int8Embedding:
    """An embedding table in 8 bits: row v is values[v] * scale[v]. values [V, D] int8, scale [V] float32."""

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def dequantize(self) -> jax.Array:
        """The table [V, D] in float32."""
        return self.values.astype(jnp.float32) * self.scale[..., None]


def is_quantized(leaf: Any) -> bool:
    """Whether `leaf` is one of this module's leaves (the `is_leaf` of tree maps that must not look inside them)."""
    return isinstance(leaf, PalettizedWeight | Int8Embedding)


def dequantize_params(params: Any) -> Any:
    """The same tree with every quantised leaf as its float32 array, others untouched."""
    return jax.tree.map(lambda leaf: leaf.dequantize() if is_quantized(leaf) else leaf, params, is_leaf=is_quantized)
