"""The one product of every projection of the model; it dispatches on what the weight is: plain, LoRA, palettized."""

from __future__ import annotations

from typing import Any, Literal

import jax

from afm_rl.lora import LoraWeight
from afm_rl.quantized import PalettizedWeight
from afm_rl.sharding import Axis, constrain

#: How a weight [out, in] lies while it is multiplied: one of its dimensions over tensor, gathered over everything else.
_COMPUTE_AXES: dict[str | None, tuple[Axis, Axis]] = {"out": ("tensor", None), "in": (None, "tensor"), None: (None, None)}


def dense(x: jax.Array, weight: Any, *, split: Literal["out", "in"] | None = None) -> jax.Array:
    """x[..., in] -> [..., out]: dispatches on the leaf (plain, LoRA, palettized); the weight is cast to the type of x here.

    `split` is the dimension of the weight that tensor parallelism cuts (3.3); the cast comes before the gather over fsdp.
    """
    if isinstance(weight, LoraWeight):
        low_rank = dense(dense(x, weight.a), weight.b)
        return dense(x, weight.base, split=split) + (weight.scale * low_rank).astype(x.dtype)
    if isinstance(weight, PalettizedWeight):
        weight = weight.dequantize()
    weight = constrain(weight.astype(x.dtype), *_COMPUTE_AXES[split])
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))
