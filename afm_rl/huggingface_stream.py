"""Weights from files straight into device memory, leaf by leaf: no second copy of the model is ever on the host.

A stacked leaf [L, out, in] is L tensors on the disk. On a CPU device the array's own memory is allocated and the files
are read into it. Elsewhere one layer at a time crosses the host and is put into its place by an update that donates the
array. With a sharding, each device gets its region, and only the regions of this process's devices are read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afm_rl.safetensors_file import Region, StoredTensor

#: XLA takes host memory over without a copy where it is aligned like this.
_ALIGNMENT = 64


@dataclass(frozen=True)
class StoredLeaf:
    """A leaf of our tree on the disk: `shape`, and its tensors, one per layer where it is `stacked`."""

    shape: tuple[int, ...]
    tensors: Sequence[StoredTensor]
    stacked: bool

    def read_into(self, target: np.ndarray, region: Region) -> None:
        """Fill `target` with a region of the leaf."""
        if not self.stacked:
            self.tensors[0].read_into(target, region)
            return
        for row, tensor in zip(target, self.tensors[region[0]], strict=True):
            tensor.read_into(row, region[1:])


def load_leaf(leaf: StoredLeaf, dtype: Any, sharding: jax.sharding.Sharding | None = None) -> jax.Array:
    """The leaf as a global array of `dtype` in `sharding`; None: on the default device. Every process must call it."""
    if sharding is None:
        return _fill(leaf, _whole(leaf.shape), dtype, [None])[0]
    regions: dict[tuple[tuple[int, int], ...], list[jax.sharding.Sharding | None]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index or _whole(leaf.shape), leaf.shape, strict=True))
        place = jax.sharding.SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
        regions.setdefault(bounds, []).append(place)
    arrays = [
        array
        for bounds, where in regions.items()
        for array in _fill(leaf, tuple(slice(a, b) for a, b in bounds), dtype, where)
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def _shape(region: Region) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in region)


def _whole(shape: tuple[int, ...]) -> Region:
    return tuple(slice(0, size) for size in shape)


def _fill(leaf: StoredLeaf, region: Region, dtype: Any, where: Sequence[jax.sharding.Sharding | None]) -> list[jax.Array]:
    """One array of the region per place; None is the default device."""
    devices = jnp.zeros(()).devices() if where[0] is None else where[0].device_set
    fill = fill_on_host if all(device.platform == "cpu" for device in devices) else fill_by_layers
    return fill(leaf, region, dtype, where)


def fill_on_host(
    leaf: StoredLeaf, region: Region, dtype: Any, where: Sequence[jax.sharding.Sharding | None]
) -> list[jax.Array]:
    """CPU devices: read into aligned memory, which the arrays take over. A jit that donates them copies them once."""
    host, *others = copies = [_aligned(_shape(region), dtype) for _ in where]
    leaf.read_into(host, region)
    for other in others:
        other[...] = host
    return [jax.device_put(copy, place, may_alias=True) for copy, place in zip(copies, where, strict=True)]


def fill_by_layers(
    leaf: StoredLeaf, region: Region, dtype: Any, where: Sequence[jax.sharding.Sharding | None]
) -> list[jax.Array]:
    """Other devices: one tensor of the file on the host at a time."""
    shape = _shape(region)
    if not leaf.stacked:
        host = np.empty(shape, dtype)
        leaf.read_into(host, region)
        return jax.block_until_ready([jax.device_put(host, place) for place in where])
    filled = [jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=place)() for place in where]
    for i, tensor in enumerate(leaf.tensors[region[0]]):
        host = np.empty(shape[1:], dtype)
        tensor.read_into(host, region[1:])
        rows = [jax.device_put(host, place) for place in where]
        # Waiting keeps the host at one tensor: transfers that are under way hold theirs.
        filled = jax.block_until_ready([_put(array, row, i) for array, row in zip(filled, rows, strict=True)])
    return filled


@partial(jax.jit, donate_argnums=0)
def _put(array: jax.Array, row: jax.Array, index: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(array, row, index, axis=0)


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(size + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + size].view(dtype).reshape(shape)
