"""A projection's weight laid out for the compiled CPU product, and that product.

A sampler multiplies the same weights by a few rows, step after step. Laid out once, 32 outputs side by side, they are read
straight through, and no sum crosses lanes. On two AVX-512 cores that is the speed of memory for one row (three times XLA's
product in bfloat16) and 1.5 to 1.9 times XLA's for 64. A row's bits depend on that row alone: not on how many there are, nor
on its place among them, nor on the threads.

Shapes: R rows, I inputs, O outputs, B blocks of 32 outputs, S steps, P inputs of a step (2 bfloat16 or 1 float32).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from afm_rl.errors import UserError
from afm_rl.generation.cpu_header import has_vectors_of_512_bits, unusable_reason

#: Outputs that lie side by side.
BLOCK = 32


@partial(jax.tree_util.register_dataclass, data_fields=["blocks"], meta_fields=["outputs"])
@dataclass(frozen=True)
class PackedWeight:
    """A weight [O, I] as blocks [B, S, 32, P] of its type: block b has outputs 32 b..; the last is filled with zeros."""

    blocks: jax.Array
    outputs: int

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the weight it stands for."""
        return self.outputs, self.blocks.shape[1] * self.blocks.shape[3]

    @property
    def dtype(self) -> Any:
        """The type of the weight and of the x it multiplies."""
        return self.blocks.dtype

    def rows(self, ids: jax.Array) -> jax.Array:
        """Rows of the weight, for an embedding that is also the last projection: ids [...] -> [..., I]."""
        return self.blocks[ids // BLOCK, :, ids % BLOCK].reshape(*ids.shape, self.shape[1])

    def unpack(self) -> jax.Array:
        """The weight [O, I]."""
        return self.rows(jnp.arange(self.outputs))


def cannot_pack(weight: jax.Array | jax.ShapeDtypeStruct) -> str | None:
    """Why a weight cannot be packed for the CPU here; None if it can."""
    if jax.default_backend() != "cpu":
        return f"the backend is {jax.default_backend()}"
    if len(weight.shape) != 2 or weight.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it is {weight.dtype}{list(weight.shape)}, expected float32 or bfloat16 [out, in]"
    if weight.dtype == jnp.bfloat16 and weight.shape[1] % 2:
        return f"{weight.shape[1]} inputs are not pairs"
    return unusable_reason() or (None if has_vectors_of_512_bits() else "the processor has no AVX-512")


@jax.jit
def pack(weight_OI: jax.Array) -> PackedWeight:
    """The weight for `packed_product`, in its own type. UserError where the kernel cannot run (`cannot_pack`)."""
    reason = cannot_pack(weight_OI)
    if reason is not None:
        raise UserError(f"cannot lay a weight out for the CPU: {reason}; multiply it as it is (afm_rl.dense)")
    outputs, inputs = weight_OI.shape
    P = 2 if weight_OI.dtype == jnp.bfloat16 else 1
    padded = jnp.pad(weight_OI, ((0, -outputs % BLOCK), (0, 0)))
    return PackedWeight(padded.reshape(-1, BLOCK, inputs // P, P).swapaxes(1, 2), outputs)


def packed_product(x: jax.Array, weight: PackedWeight, *, out_dtype: Any = None) -> jax.Array:
    """x [..., I] times the weight, transposed -> [..., O] of x's type, or of `out_dtype` (float32 or bfloat16).

    x is taken in the weight's type. Products and sums are float32 (of bfloat16: exact products), in a fixed order.
    """
    from afm_rl.generation.packed_product_cpu import packed_product_cpu  # numba, needed on CPU only

    *lead, inputs = x.shape
    if weight.shape[1] != inputs:
        raise ValueError(f"packed product: x has {inputs} inputs, the weight {weight.shape[1]}")
    x_RI = x.reshape(-1, inputs).astype(weight.dtype)
    out_RO = packed_product_cpu(x_RI, weight.blocks, out_dtype=out_dtype or x.dtype)
    return out_RO[:, : weight.outputs].reshape(*lead, weight.outputs)
