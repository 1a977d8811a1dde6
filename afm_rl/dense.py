"""The one product of every projection of the model; it dispatches on what the weight is: plain, LoRA, palettized."""

from __future__ import annotations

from typing import Any

import jax

from afm_rl.lora import LoraWeight
from afm_rl.quantized import PalettizedWeight


def dense(x: jax.Array, weight: Any) -> jax.Array:
    """x[..., in] -> [..., out]: the one product of every projection; dispatches on the leaf (plain, LoRA, palettized)."""
    if isinstance(weight, LoraWeight):
        low_rank = dense(dense(x, weight.a), weight.b)
        return dense(x, weight.base) + (weight.scale * low_rank).astype(x.dtype)
    if isinstance(weight, PalettizedWeight):
        weight = weight.dequantize()
    return jax.lax.dot_general(x, weight.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))
