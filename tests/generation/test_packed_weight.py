"""Packed weights and their compiled product: against float64 in NumPy, and a row's bits whatever is multiplied with it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numba
import numpy as np
import pytest
from llvmlite import binding

from afm_rl.errors import UserError
from afm_rl.generation.cpu_accumulate import accumulate_bfloat16
from afm_rl.generation.cpu_vector import load_rows, shape_of, store_rows
from afm_rl.generation.packed_weight import PackedWeight, cannot_pack, pack, packed_product

pytestmark = pytest.mark.skipif(
    cannot_pack(jax.ShapeDtypeStruct((32, 2), jnp.float32)) is not None, reason="needs a CPU with AVX-512"
)


def make(rows: int, outputs: int, inputs: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(rows + outputs + inputs)
    x, weight = (jnp.asarray(rng.normal(size=(n, inputs)), dtype) for n in (rows, outputs))
    return x, weight


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("outputs", [1, 32, 70])
def test_packing_loses_nothing(dtype: Any, outputs: int) -> None:
    _, weight = make(1, outputs, 6, dtype)
    packed = pack(weight)
    assert packed.shape == weight.shape
    assert packed.dtype == dtype
    np.testing.assert_array_equal(packed.unpack(), weight)
    ids = jnp.asarray([[0, outputs - 1], [outputs // 2, 0]])
    np.testing.assert_array_equal(packed.rows(ids), weight[ids])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 70, 600), (2, 32, 2), (3, 33, 34), (7, 64, 1030), (70, 70, 600)]
)
def test_it_is_the_product(rows: int, outputs: int, inputs: int, dtype: Any) -> None:
    """Of rows that fill registers and not, of items that share rows, of outputs that fill a block and not."""
    x, weight = make(rows, outputs, inputs, dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    packed = pack(weight)
    made = packed_product(x, packed, out_dtype=jnp.float32)
    assert made.shape == expected.shape
    np.testing.assert_allclose(made, expected, atol=2e-7 * inputs, rtol=1e-6)
    np.testing.assert_array_equal(packed_product(x, packed, out_dtype=jnp.bfloat16), made.astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_bits_of_a_row_depend_on_it_alone(dtype: Any) -> None:
    x, weight = make(150, 96, 600, dtype)
    packed = pack(weight)
    together = packed_product(x, packed)
    for start, end in ((0, 1), (149, 150), (3, 5), (60, 73), (9, 140)):
        np.testing.assert_array_equal(packed_product(x[start:end], packed), together[start:end])


def test_leading_axes_and_types() -> None:
    """x keeps its axes and gives its type to the result; it is rounded to the weight's type before."""
    x, weight = make(6, 40, 16, jnp.float32)
    packed = pack(weight.astype(jnp.bfloat16))
    made = packed_product(x.reshape(2, 3, 16), packed)
    assert made.dtype == jnp.float32
    rounded = np.asarray(x.astype(jnp.bfloat16), np.float64) @ np.asarray(packed.unpack(), np.float64).T
    np.testing.assert_allclose(made.reshape(6, 40), rounded, atol=1e-5)
    assert packed_product(x.astype(jnp.bfloat16), packed).dtype == jnp.bfloat16


def test_weights_that_cannot_be_packed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"int8\[4, 4\]"):
        pack(jnp.zeros((4, 4), jnp.int8))
    with pytest.raises(UserError, match="7 inputs are not pairs"):
        pack(jnp.zeros((4, 7), jnp.bfloat16))
    with pytest.raises(ValueError, match="x has 5 inputs, the weight 6"):
        packed_product(jnp.zeros((2, 5)), pack(jnp.zeros((4, 6))))
    monkeypatch.setattr("afm_rl.generation.packed_weight.has_vectors_of_512_bits", lambda: False)
    with pytest.raises(UserError, match="no AVX-512"):
        pack(jnp.zeros((5, 6)))


def test_a_packed_weight_is_a_pytree() -> None:
    """Programs take it as an argument, and one of the same shape does not compile them again."""
    _, weight = make(1, 40, 6, jnp.float32)
    traces = []

    @jax.jit
    def program(packed: PackedWeight) -> jax.Array:
        traces.append(packed.shape)
        return packed.unpack()

    program(pack(weight))
    np.testing.assert_array_equal(program(pack(weight + 1)), weight + 1)
    assert traces == [(40, 6)]


@pytest.mark.parametrize("features", ["all", "none"])
def test_pairs_of_bfloat16_with_and_without_the_instruction(features: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if features == "none":
        monkeypatch.setattr(binding, "get_host_cpu_features", dict)

    @numba.njit
    def add_products(sums: int, vectors: int, scalars: int) -> None:
        shape = shape_of(16, 3)
        store_rows(accumulate_bfloat16(load_rows(shape, sums, 64), vectors, scalars, 4, shape), sums, 64)

    rng = np.random.default_rng(0)
    vectors, scalars = (np.asarray(jnp.asarray(rng.normal(size=(n, 2)), jnp.bfloat16)) for n in (16, 3))
    start = rng.normal(size=(3, 16)).astype(np.float32)
    sums = start.copy()
    add_products(*(x.ctypes.data for x in (sums, vectors, scalars)))
    expected = start + scalars.astype(np.float64) @ vectors.astype(np.float64).T
    np.testing.assert_allclose(sums, expected, atol=1e-6)
