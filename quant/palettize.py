"""Palettization of one matrix (paper 5.2.1, F): k-means tables shared by every 16 rows or columns; the int8 embedding.

`palettize` replaces each weight by an index into its group's table of 2**bits values; the tables are nearly optimal
(see `quant/kmeans.py`) for sum importance * error^2. The paper does not say how tables are stored: ours are float16,
rounded before the final assignment, and counted in `bits_per_weight`. An embedding's channel is its row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quant.kmeans import kmeans_1d

#: The share of the mean importance that every weight has at least, so that no value is left without a say.
_IMPORTANCE_FLOOR = 1e-6


@dataclass(frozen=True)
class Palettized:
    """A matrix as lookup tables: W[o, i] = lut[g, indices[o, i]], g = (o if axis == 0 else i) // group_size.

    lut [groups, 2**bits], ascending; indices [out, in] uint8; the last group may be smaller.
    """

    lut: np.ndarray
    indices: np.ndarray
    bits: int
    axis: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.indices.shape[0], self.indices.shape[1]

    @property
    def storage_bits(self) -> int:
        """Bits of indices and tables together."""
        return self.indices.size * self.bits + self.lut.size * self.lut.dtype.itemsize * 8

    @property
    def bits_per_weight(self) -> float:
        """Storage per weight, tables included."""
        return self.storage_bits / self.indices.size

    def dequantize(self) -> np.ndarray:
        """The weights [out, in] in float32."""
        group = np.arange(self.shape[self.axis]) // self.group_size
        group = group[:, None] if self.axis == 0 else group[None, :]
        return self.lut.astype(np.float32)[group, self.indices]


def storage_bits(shape: tuple[int, int], *, bits: int, group_size: int = 16, axis: int = 0, lut_bits: int = 16) -> int:
    """Bits that a matrix [out, in] will take when palettized, tables included."""
    return shape[0] * shape[1] * bits + -(-shape[axis] // group_size) * 2**bits * lut_bits


def palettize(
    weight: np.ndarray,
    *,
    bits: int,
    group_size: int = 16,
    axis: int = 0,
    importance: np.ndarray | None = None,
    lut_dtype: str = "float16",
) -> Palettized:
    """Palettize `weight` [out, in] so that every `group_size` slices along `axis` share a table of 2**bits values.

    `importance` [out, in], not negative (a diagonal Fisher), weighs each squared error; None is 1 everywhere. A float16
    table resolves 3e-8 at best: take float32 for a matrix whose every weight is that small. Raises ValueError for
    weights that are not finite or overflow `lut_dtype`, and for options out of range.
    """
    weight = np.asarray(weight)
    weight = weight.astype(np.float64 if weight.dtype == np.float64 else np.float32, copy=False)
    _check(weight, bits=bits, group_size=group_size, axis=axis, importance=importance)
    rows = _by_group(weight, axis)
    weights = None if importance is None else _by_group(importance.astype(np.float64), axis)
    lut = _tables(rows, weights, clusters=2**bits, group_size=group_size)
    with np.errstate(over="ignore"):
        rounded = lut.astype(lut_dtype)
    if not np.isfinite(rounded).all():
        largest = np.abs(weight).max()
        raise ValueError(f"weights up to {largest:.3g} overflow a {lut_dtype} table: pass lut_dtype='float32'")
    indices = _nearest(rows, rounded.astype(np.float64), group_size)
    return Palettized(rounded, np.ascontiguousarray(_by_group(indices, axis)), bits, axis, group_size)


def _check(weight: np.ndarray, *, bits: int, group_size: int, axis: int, importance: np.ndarray | None) -> None:
    if weight.ndim != 2 or weight.size == 0:
        raise ValueError(f"a weight to palettize is a matrix [out, in], got shape {weight.shape}")
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    if group_size < 1 or axis not in (0, 1):
        raise ValueError(f"group_size must be at least 1 and axis 0 or 1, got {group_size} and {axis}")
    require_finite(weight)
    if importance is None:
        return
    if importance.shape != weight.shape:
        raise ValueError(f"importance {importance.shape} must have the weight's shape {weight.shape}")
    if not (np.isfinite(importance).all() and (importance >= 0).all()):
        raise ValueError("importance must be finite and not negative")


def require_finite(weight: np.ndarray) -> None:
    """Raises ValueError, with the first position, if any weight is NaN or infinite."""
    bad = ~np.isfinite(weight)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"{int(bad.sum())} weights are NaN or infinite, the first at {where}: the model is damaged")


def _by_group(matrix: np.ndarray, axis: int) -> np.ndarray:
    """The matrix with the grouped axis first; its own inverse."""
    return matrix if axis == 0 else matrix.T


def _tables(rows: np.ndarray, weights: np.ndarray | None, *, clusters: int, group_size: int) -> np.ndarray:
    """Centres [groups, clusters] of rows [out, in] taken `group_size` at a time; a short last group on its own."""
    whole = len(rows) // group_size * group_size
    tables = []
    for first, last in ((0, whole), (whole, len(rows))):
        if first < last:
            groups = -(-(last - first) // group_size)
            values = rows[first:last].reshape(groups, -1)
            tables.append(kmeans_1d(values, clusters, _group_weights(weights, first, last, groups)))
    return np.concatenate(tables)


def _group_weights(weights: np.ndarray | None, first: int, last: int, groups: int) -> np.ndarray | None:
    """Importances in units of their group's mean, floored; a group without any importance counts evenly."""
    if weights is None:
        return None
    w = weights[first:last].reshape(groups, -1)
    mean = w.mean(axis=1, keepdims=True)
    return np.where(mean > 0, w / np.where(mean > 0, mean, 1.0), 1.0) + _IMPORTANCE_FLOOR


def _nearest(rows: np.ndarray, lut: np.ndarray, group_size: int) -> np.ndarray:
    """Index [out, in] uint8 of the nearest entry of each weight's ascending table."""
    middles = (lut[:, 1:] + lut[:, :-1]) / 2
    indices = np.empty(rows.shape, np.uint8)
    for g, middle in enumerate(middles):
        group = slice(g * group_size, (g + 1) * group_size)
        indices[group] = np.searchsorted(middle, rows[group])
    return indices


@dataclass(frozen=True)
class QuantizedEmbedding:
    """An embedding in 8 bits: row v is values[v] * scale[v]. values [V, D] int8, scale [V] float32."""

    values: np.ndarray
    scale: np.ndarray

    def dequantize(self) -> np.ndarray:
        """The table [V, D] in float32."""
        return self.values.astype(np.float32) * self.scale[:, None]


def quantize_embedding(weight: np.ndarray) -> QuantizedEmbedding:
    """Symmetric int8 per channel (row) of `weight` [V, D]: scale = max |row| / 127; a row of zeros stays zero.

    Raises ValueError for values that are not finite.
    """
    weight = np.asarray(weight).astype(np.float32, copy=False)
    require_finite(weight)
    scale = (np.abs(weight).max(axis=1) / 127.0).astype(np.float32)
    divisor = np.where(scale > 0, scale, 1.0)[:, None]
    return QuantizedEmbedding(np.clip(np.rint(weight / divisor), -127, 127).astype(np.int8), scale)
