"""The device mesh (section 3.3): axes data, fsdp, seq and tensor, and how arrays lie on them.

Batches are cut over data and fsdp, sequences over seq, heads and hidden units over tensor; parameters and optimizer state
over fsdp and tensor. Only data parallelism crosses slices: `make_mesh` reads off the devices which slice each belongs to.
Programs are written for one device; `constrain` says where an array lies when a mesh is set (`jax.set_mesh`), and is the
identity when none is. An axis that does not divide an array's dimension is left out: right on any shape, and the
dimension is then computed by every device along that axis.

Shapes in names (`tokens_BT`): B batch, T time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from afm_rl.errors import UserError

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "seq", "tensor")
#: The mesh axes that the rows of a batch are cut over.
BATCH = ("data", "fsdp")
#: Where one dimension of an array lies: nowhere in particular, on one mesh axis, or on several.
Axis = str | tuple[str, ...] | None


@dataclass(frozen=True)
class MeshShape:
    """Devices along each axis."""

    data: int = 1
    fsdp: int = 1
    seq: int = 1
    tensor: int = 1

    @property
    def size(self) -> int:
        """Devices of the mesh."""
        return math.prod(astuple(self))

    def __str__(self) -> str:
        return " x ".join(f"{name} {size}" for name, size in zip(AXES, astuple(self), strict=True))


ONE_DEVICE = MeshShape()


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (default: all of them, every process's). Raises UserError where they do not fit the shape."""
    devices = jax.devices() if devices is None else devices
    return Mesh(arrange(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(shape: MeshShape, devices: Sequence[Any]) -> np.ndarray:
    """Devices as [data, fsdp, seq, tensor]: the slices one after another along data, each one's own network inside it."""
    if len(devices) != shape.size:
        raise UserError(
            f"the mesh {shape} needs {shape.size} devices and there are {len(devices)}; change the learner's mesh"
        )
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    if shape.data % len(slices) or len({len(members) for members in slices.values()}) > 1:
        sizes = ", ".join(str(len(members)) for _, members in sorted(slices.items()))
        raise UserError(
            f"only data parallelism crosses slices: the mesh {shape} cannot be cut along data into {len(slices)} equal ones "
            f"(devices in each slice: {sizes}); make the learner's mesh.data a multiple of the number of slices"
        )
    within = (shape.data // len(slices), shape.fsdp, shape.seq, shape.tensor)
    parts = [mesh_utils.create_device_mesh(within, members) for _, members in sorted(slices.items())]
    return np.concatenate(parts, axis=0)


def current_mesh() -> Any:
    """The mesh that is set, also inside a trace, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def fitting_spec(shape: Sequence[int], axes: Sequence[Axis], sizes: Mapping[str, int]) -> PartitionSpec:
    """`axes` without those that do not divide their dimension (nor those of size 1, which change nothing)."""
    return PartitionSpec(*(_fitting(dim, axis, sizes) for dim, axis in zip(shape, axes, strict=True)))


def _fitting(dim: int, axis: Axis, sizes: Mapping[str, int]) -> Axis:
    names = tuple(name for name in ((axis,) if isinstance(axis, str) else axis or ()) if sizes[name] > 1)
    if not names or dim % math.prod(sizes[name] for name in names):
        return None
    return names[0] if len(names) == 1 else names


def constrain(x: jax.Array, *axes: Axis) -> jax.Array:
    """`x` laid out with its dimensions on these axes, under the mesh that is set; the identity where none is."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, fitting_spec(x.shape, axes, mesh.shape))


def batch_axes(name: str, value: np.ndarray) -> tuple[Axis, ...]:
    """Axes of one entry of a batch, by the shape letters of its name: rows over data and fsdp, time over seq."""
    if value.ndim == 0:
        return ()
    rest: tuple[Axis, ...] = (None,) * (value.ndim - 1)
    return (BATCH, "seq") if name.endswith("_BT") and value.ndim == 2 else (BATCH, *rest)


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh | None) -> dict[str, Any]:
    """A batch on the mesh's devices; every process holds all of it and gives its own devices their part.

    Without a mesh it stays as it is: jit takes NumPy arrays.
    """
    if mesh is None:
        return dict(batch)
    return {name: put(np.asarray(value), batch_axes(name, np.asarray(value)), mesh) for name, value in batch.items()}


def put(value: np.ndarray, axes: Sequence[Axis], mesh: Mesh) -> jax.Array:
    """A host array that every process has, as one array over the mesh."""
    sharding = NamedSharding(mesh, fitting_spec(value.shape, axes, mesh.shape))
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def to_host(tree: Any) -> Any:
    """Arrays of the tree as NumPy arrays, one at a time; every process of a group has to take part, and gets them all."""

    def gather(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.asarray(leaf)

    return jax.tree.map(gather, tree)
