"""The compiled product of packed weights as a JAX function: compiled for a number of rows when first used.

Shapes: R rows, I inputs, O outputs, B blocks of 32 outputs, S steps, P inputs of a step.
"""

from __future__ import annotations

from typing import Any

import jax

from afm_rl.generation import packed_product_kernel as kernel
from afm_rl.generation.cpu_compile import compile_function, register, sources_digest, target
from afm_rl.generation.cpu_ffi import describes_itself, run
from afm_rl.generation.cpu_memory import symbol_address
from afm_rl.generation.cpu_vector import shape_of

#: Rows that share registers: with two vectors of outputs their sums are 16 registers.
_MOST_TOGETHER = 8


def _target(together: int) -> str:
    """The name under which XLA knows the kernel for at least so many rows, a power of two up to _MOST_TOGETHER."""

    def build(name: str) -> None:
        task = f"{name}_task_{sources_digest([__file__, kernel.__file__])}"

        def work(context: int) -> int:
            kernel.work(context, shape_of(16, together))
            return 0

        def handler(frame: int) -> int:
            if not describes_itself(frame):
                run(frame, kernel.start(frame), symbol_address(task))
            return 0

        compile_function(work, task)
        register(name, compile_function(handler, task.replace("task", "handler")))

    return target(f"afm_rl_packed_product_{together}", build)


def packed_product_cpu(x_RI: jax.Array, blocks_BSP: jax.Array, *, out_dtype: Any) -> jax.Array:
    """x [R, I] times blocks [B, S, 32, P] -> [R, 32 B] of `out_dtype` (float32 or bfloat16); x has the blocks' type."""
    together = min(_MOST_TOGETHER, 1 << (x_RI.shape[0].bit_length() - 1))
    out = jax.ShapeDtypeStruct((x_RI.shape[0], 32 * blocks_BSP.shape[0]), out_dtype)
    return jax.ffi.ffi_call(_target(together), out)(x_RI, blocks_BSP)
