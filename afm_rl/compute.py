"""How a model's passes are computed, as plain data: chosen in a topology, carried to every forward and backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from afm_rl.attention import Implementation

#: Recompute in the backward pass: nothing, the whole layer, all but the products, or all but the named branch outputs.
Remat = Literal["none", "full", "dots", "names"]


@dataclass(frozen=True)
class Compute:
    """Arithmetic of the forward and backward passes; master weights and optimizer state are float32 whatever it says.

    `dtype` is that of the products (3.3: bfloat16). `attention` is an implementation of `afm_rl/attention.py`. At most
    `logits_per_pass` logits are in memory at a time: longer batches score their tokens in passes.
    """

    dtype: str = "float32"
    remat: Remat = "none"
    attention: Implementation = "auto"
    logits_per_pass: int = 2**26


#: One device, float32, nothing recomputed: what every pass does unless it is told otherwise.
DEFAULT_COMPUTE = Compute()
