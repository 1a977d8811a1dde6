"""The compiled attention kernel as a JAX function; it is compiled for a model's shape when first used.

Shapes: N tokens, Q query heads, K kv heads, H head dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afm_rl.generation import paged_attention_kernel as kernel
from afm_rl.generation.cpu_compile import compile_function, register, sources_digest, target
from afm_rl.generation.cpu_ffi import describes_itself, run
from afm_rl.generation.cpu_memory import symbol_address
from afm_rl.generation.cpu_vector import count, shape_of, shared
from afm_rl.generation.paged_cache import FlatTokens, PagedCache


def _target(heads_per_kv: int, width: int) -> str:
    """The name under which XLA knows the kernel for so many query heads per kv head and vectors of `width` floats."""

    def build(name: str) -> None:
        task = f"{name}_task_{sources_digest([__file__, kernel.__file__])}"

        def work(context: int) -> int:
            kernel.work(context, shape_of(width, heads_per_kv))
            return 0

        def handler(frame: int) -> int:
            if not describes_itself(frame):
                rows = shape_of(width, heads_per_kv)
                run(frame, kernel.start(frame, count(shared(rows)) // count(rows)), symbol_address(task))
            return 0

        compile_function(work, task)
        register(name, compile_function(handler, task.replace("task", "handler")))

    return target(f"afm_rl_paged_attention_{heads_per_kv}x{width}", build)


def cannot_serve(*, heads_per_kv: int, head_dim: int, page_size: int, dtype: Any) -> str | None:
    """Why the kernel cannot work on a cache; None if it can."""
    if dtype != jnp.float32:
        return f"the cache is {jnp.dtype(dtype).name}, the kernel reads float32"
    if head_dim % 8 or page_size % 8:
        return f"head dim {head_dim} and page size {page_size} have to be multiples of 8"
    if head_dim > kernel.MAX_HEAD_DIM or page_size > kernel.BLOCK or heads_per_kv > kernel.MAX_HEADS_PER_KV:
        return f"head dim {head_dim}, page size {page_size}, {heads_per_kv} query heads per kv head: one is too large"
    return None


def paged_attention_cpu(
    q_NQH: jax.Array, k_NKH: jax.Array, v_NKH: jax.Array, cache: PagedCache, layer: int, tokens: FlatTokens
) -> tuple[jax.Array, PagedCache]:
    """`paged_attention` by the kernel: float32 throughout but for q, whose type the result has."""
    H, page_size = q_NQH.shape[2], cache.page_size
    width = 16 if H % 16 == 0 and page_size % 16 == 0 else 8
    target = _target(q_NQH.shape[1] // k_NKH.shape[1], width)
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (q_NQH, cache.k, cache.v)]
    mixed, k_pool, v_pool = jax.ffi.ffi_call(target, shapes, input_output_aliases={3: 1, 4: 2})(
        q_NQH.astype(jnp.float32),
        k_NKH.astype(jnp.float32),
        v_NKH.astype(jnp.float32),
        cache.k,
        cache.v,
        tokens.position_N.astype(jnp.int32),
        tokens.row_N.astype(jnp.int32),
        tokens.blocks_RB.astype(jnp.int32),
        layer=np.int64(layer),
    )
    return mixed.astype(q_NQH.dtype), PagedCache(k_pool, v_pool)
