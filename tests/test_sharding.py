"""How devices become a mesh and arrays lie on it: slices, axes that do not divide, names of batch entries."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from afm_rl.config import PRESETS, ModelConfig
from afm_rl.errors import UserError
from afm_rl.lora import init_lora
from afm_rl.parameters import ParamSpec, axes_like_params, param_specs
from afm_rl.sharding import AXES, MeshShape, arrange, batch_axes, constrain, current_mesh, fitting_spec


@dataclass(frozen=True)
class Device:
    """What `arrange` reads of a device."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0


def test_only_data_crosses_slices() -> None:
    """Guards the hybrid mesh: a step along any other axis, or along data within a slice, stays in the slice."""
    devices = [Device(i, slice_index=i % 2) for i in range(16)]
    mesh = arrange(MeshShape(data=4, fsdp=2, tensor=2), devices)
    slices = np.vectorize(lambda d: d.slice_index)(mesh)
    assert slices.shape == (4, 2, 1, 2)
    np.testing.assert_array_equal(slices[:2], 0)
    np.testing.assert_array_equal(slices[2:], 1)
    assert {d.id for d in mesh.ravel()} == set(range(16))


def test_a_mesh_that_would_cross_slices_otherwise_is_refused() -> None:
    """Guards the derivation: fsdp over two slices is a mistake, and the message says what to change."""
    devices = [Device(i, slice_index=i // 4) for i in range(8)]
    with pytest.raises(UserError, match=r"only data parallelism crosses slices.*4, 4.*multiple of the number of slices"):
        arrange(MeshShape(fsdp=8), devices)
    with pytest.raises(UserError, match=r"data 2 x fsdp 1 x seq 1 x tensor 1 needs 2 devices and there are 8"):
        arrange(MeshShape(data=2), devices)


def test_an_axis_that_does_not_divide_is_left_out() -> None:
    """Guards odd shapes: they are computed whole instead of failing."""
    sizes = dict(zip(AXES, (2, 3, 1, 4), strict=True))
    assert fitting_spec((12, 8), (("data", "fsdp"), "tensor"), sizes) == PartitionSpec(("data", "fsdp"), "tensor")
    assert fitting_spec((8, 6), (("data", "fsdp"), "tensor"), sizes) == PartitionSpec(None, None)
    assert fitting_spec((5,), ("seq",), sizes) == PartitionSpec(None)


def test_without_a_mesh_nothing_happens() -> None:
    """Guards the one-device program: no constraint in it."""
    x = jnp.ones((4, 4))
    assert current_mesh() is None
    assert constrain(x, "data", None) is x


def test_batches_are_cut_by_the_letters_of_their_names() -> None:
    """Guards which dimension is time: grades [B, 4] are not, scalars are not cut."""
    assert batch_axes("tokens_BT", np.zeros((4, 8))) == (("data", "fsdp"), "seq")
    assert batch_axes("grades", np.zeros((4, 4))) == (("data", "fsdp"), None)
    assert batch_axes("advantage_B", np.zeros(4)) == (("data", "fsdp"),)
    assert batch_axes("num_sequences", np.float32(4)) == ()


@pytest.mark.parametrize("name", PRESETS)
def test_every_matrix_of_a_preset_is_cut_both_ways(name: str) -> None:
    """Guards the declarations: eight-way tensor and eight-way fsdp parallelism divide every matrix of every preset."""
    sizes = dict(zip(AXES, (1, 8, 1, 8), strict=True))
    for spec in jax.tree.leaves(param_specs(PRESETS[name]), is_leaf=lambda x: isinstance(x, ParamSpec)):
        cut = [axis for axis in fitting_spec(spec.shape, spec.axes, sizes) if axis]
        assert set(cut) == ({"fsdp", "tensor"} if spec.std is not None else set())


def test_what_is_shaped_like_a_parameter_lies_like_it() -> None:
    """Guards moments, trunks and LoRA factors, by the parameter their path ends with; anything else stays whole."""
    adapter = init_lora(ModelConfig(8, 4, 8, 1, 2, 1, 2), 2, jax.random.key(0))
    tree = {
        "mu": {"layers": {"down": np.zeros((1, 4, 8)), "q_norm": np.zeros((1, 2))}},
        "trunk": {"embed": {"weight": np.zeros((8, 4))}},
        "adapter": adapter,
        "heads": {"reward": np.zeros((1, 4))},
    }
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): axes_like_params(path, leaf.ndim)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    assert found["mu/layers/down"] == (None, "fsdp", "tensor")
    assert found["mu/layers/q_norm"] == (None, None)
    assert found["trunk/embed/weight"] == ("tensor", "fsdp")
    assert found["adapter/layers/q/a"] == (None, None, "fsdp")
    assert found["adapter/layers/q/b"] == (None, "tensor", None)
    assert found["adapter/layers/o/a"] == (None, None, "tensor")
    assert found["heads/reward"] == (None, None)
