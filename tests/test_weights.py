"""Flat weights: an exact round trip of every dtype, and a digest that no changed bit gets past."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from afm_rl.types import Weights
from afm_rl.weights import DigestMismatchError, digest, flatten, leaves, unflatten


def tree() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "layers": {
            "q": rng.normal(size=(2, 3, 4)).astype(np.float32),
            "norm": rng.normal(size=(2, 4)).astype(np.float32),
        },
        "embed": {"weight": rng.normal(size=(5, 4)).astype(ml_dtypes.bfloat16)},
        "indices": rng.integers(0, 255, size=(3, 3)).astype(np.uint8),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.float32(0.1).reshape(()),
    }


def test_the_round_trip_is_exact() -> None:
    """Guards shapes, dtypes and bytes of every leaf, bfloat16 among them, and one buffer per dtype."""
    weights = flatten(tree(), policy="sft", version=3)
    assert (weights.policy, weights.version) == ("sft", 3)
    assert {name: buffer.dtype.name for name, buffer in weights.buffers.items()} == {
        "float32": "float32",
        "bfloat16": "uint16",
        "uint8": "uint8",
    }
    found, expected = dict(leaves(unflatten(weights))), dict(leaves(tree()))
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert (found[path].dtype, found[path].shape) == (array.dtype, array.shape)
        assert found[path].tobytes() == array.tobytes()


def test_jax_arrays_travel_like_numpy_ones() -> None:
    """Guards publishing from a learner: the digest is of the values, whoever holds them."""
    on_device = jax.tree.map(jnp.asarray, tree())
    assert on_device["embed"]["weight"].dtype == jnp.bfloat16
    assert digest(on_device) == digest(tree())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_one_flipped_bit_is_found(dtype: str) -> None:
    """Guards delivery: the lowest bit of the last byte is enough, and the error names policy and version."""
    weights = flatten(tree(), policy="sft", version=3)
    damaged = {name: buffer.copy() for name, buffer in weights.buffers.items()}
    damaged[dtype].view(np.uint8)[-1] ^= 1
    with pytest.raises(DigestMismatchError, match="'sft' version 3"):
        unflatten(dataclasses.replace(weights, buffers=damaged))


def test_the_layout_is_part_of_the_digest() -> None:
    """Guards against equal bytes under another shape, name or dtype."""
    values = np.arange(6, dtype=np.float32)
    trees: list[dict[str, Any]] = [{"a": values}, {"a": values.reshape(2, 3)}, {"b": values}, {"a": values.view(np.uint32)}]
    assert len({digest(t) for t in trees}) == 4
    weights = flatten({"a": values, "b": values + 1}, policy="p", version=0)
    swapped = tuple((path, dtype, shape, 6 - offset) for path, dtype, shape, offset in weights.layout)
    with pytest.raises(DigestMismatchError):
        unflatten(dataclasses.replace(weights, layout=swapped))


def test_the_order_of_a_dict_does_not_matter() -> None:
    """Guards comparing a learner's tree with one read from a file."""
    turned = dict(reversed(tree().items()))
    assert digest(turned) == digest(tree())


def test_leaves_are_views_of_the_buffers() -> None:
    """Guards memory: unpacking copies nothing, and shared memory stays read-only."""
    weights = flatten({"a": np.ones(4, np.float32)}, policy="p", version=0)
    weights.buffers["float32"].flags.writeable = False
    leaf = unflatten(weights)["a"]
    assert np.shares_memory(leaf, weights.buffers["float32"])
    with pytest.raises(ValueError, match="read-only"):
        leaf[0] = 2.0


def test_a_slash_in_a_name_is_refused() -> None:
    """Guards the paths, where a slash separates levels."""
    with pytest.raises(ValueError, match="'a/b' contains a slash"):
        flatten({"a/b": np.ones(1)}, policy="p", version=0)


def test_weights_survive_pickling() -> None:
    """Guards transport between processes."""
    import pickle

    weights = flatten(tree(), policy="p", version=0)
    again: Weights = pickle.loads(pickle.dumps(weights))
    assert jax.tree.all(jax.tree.map(np.array_equal, unflatten(again), tree()))
