"""The one product of every projection of the model; it dispatches on what the weight is: plain, LoRA, palettized.

All three products of a projection (forward, input gradient, weight gradient) take both operands in the activations' type
and accumulate in float32. For bfloat16 this is what the CPU's and accelerators' matrix units compute, and XLA uses its
bfloat16 kernels on CPU for no other form: a product typed bfloat16 throughout, or one of a float32 cotangent with bfloat16
operands (what JAX would derive), runs in float32 there. The gradient of a float32 master weight is float32, not a rounded
bfloat16.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from afm_rl.generation.packed_weight import PackedWeight, packed_product
from afm_rl.lora import BankedLora, LoraWeight
from afm_rl.quantized import PalettizedWeight
from afm_rl.sharding import Axis, constrain

Split = Literal["out", "in"] | None

#: How a weight [out, in] lies while it is multiplied: one of its dimensions over tensor, gathered over everything else.
_COMPUTE_AXES: dict[Split, tuple[Axis, Axis]] = {"out": ("tensor", None), "in": (None, "tensor"), None: (None, None)}


def dense(x: jax.Array, weight: Any, *, split: Split = None, out_dtype: Any = None) -> jax.Array:
    """x[..., in] -> [..., out]: dispatches on the leaf (plain, LoRA, palettized); the weight is cast to the type of x here.

    `split` is the dimension of the weight that tensor parallelism cuts (3.3); the cast comes before the gather over fsdp.
    The result has x's type, or `out_dtype` (float32 logits of bfloat16 activations, not rounded in between).
    """
    if isinstance(weight, LoraWeight):
        low_rank = dense(dense(x, weight.a), weight.b)
        out = dense(x, weight.base, split=split, out_dtype=out_dtype)
        return out + (weight.scale * low_rank).astype(out.dtype)
    if isinstance(weight, BankedLora):
        low_rank = dense(x, weight.a, out_dtype=jnp.float32) * weight.share
        out = dense(x, weight.base, split=split, out_dtype=out_dtype)
        return out + dense(low_rank.astype(x.dtype), weight.b).astype(out.dtype)
    if isinstance(weight, PackedWeight):
        return packed_product(x, weight, out_dtype=out_dtype)
    if isinstance(weight, PalettizedWeight):
        weight = weight.dequantize()
    return _product(x, weight, split, jnp.dtype(out_dtype or x.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: jax.Array, weight: jax.Array, split: Split, out_dtype: Any) -> jax.Array:
    """x[..., in] @ weight[out, in]^T, both in x's type."""
    return _dot(x, _operand(weight, x, split), ((x.ndim - 1,), (1,)), out_dtype)


def _operand(weight: jax.Array, x: jax.Array, split: Split) -> jax.Array:
    """The weight in x's type, laid out for the product."""
    return constrain(weight.astype(x.dtype), *_COMPUTE_AXES[split])


def _forward(x: jax.Array, weight: jax.Array, split: Split, out_dtype: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, weight, split, out_dtype), (x, weight)


def _backward(
    split: Split, _: Any, kept: tuple[jax.Array, jax.Array], out_gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = kept
    out_gradient = out_gradient.astype(x.dtype)
    x_gradient = _dot(out_gradient, _operand(weight, x, split), ((x.ndim - 1,), (0,)), x.dtype)
    if x.ndim == 2 and x.shape[0] % _TOKENS_PER_ROW == 0:
        x = x.reshape(-1, _TOKENS_PER_ROW, x.shape[-1])
        out_gradient = out_gradient.reshape(-1, _TOKENS_PER_ROW, out_gradient.shape[-1])
    tokens = tuple(range(x.ndim - 1))
    return x_gradient, _dot(out_gradient, x, (tokens, tokens), weight.dtype)


_product.defvjp(_forward, _backward)

#: Two contracted axes make XLA transpose the cotangent in memory before it multiplies; with one it folds the transpose
#: into the product, for which its CPU library has no kernel (less than half the speed).
_TOKENS_PER_ROW = 128


def _dot(a: jax.Array, b: jax.Array, contract: tuple[tuple[int, ...], tuple[int, ...]], dtype: Any) -> jax.Array:
    accumulator = jnp.promote_types(a.dtype, jnp.float32)
    return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=accumulator).astype(dtype)
