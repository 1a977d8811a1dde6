"""The fused kernels behind the attention seam: cuDNN's flash attention on NVIDIA GPUs, splash attention on TPUs.

Both are JAX's own (`jax.nn.dot_product_attention`, `jax.experimental.pallas.ops.tpu.splash_attention`); here are only their
adapters and the conditions under which they run. Neither kernel has been run on its hardware by this project's tests: they
run splash in Pallas' interpreter and compile it for TPU, and check what is handed to cuDNN against JAX's XLA version of it.

Shapes: B batch, T query time, S key time, N query heads, K kv heads, H head dim.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from afm_rl.attention_xla import visible_keys

#: Largest head dim of cuDNN's flash attention on every GPU that has it (Hopper and later: 256).
CUDNN_MAX_HEAD_DIM = 128

#: A GPU of this compute capability (Ampere) or later has cuDNN's flash attention.
CUDNN_MIN_CAPABILITY = 8.0

#: Splash cuts both lengths into blocks; the first of these that divides a length is used.
SPLASH_BLOCKS = (512, 256, 128)


def cudnn_problem(*, dtype: Any, H: int, T: int, S: int, platform: str) -> str | None:
    """Why cuDNN cannot attend from T to S tokens of head dim H on `platform`, or None if it can."""
    if platform != "gpu":
        return f"cuDNN needs an NVIDIA GPU and this is {platform}"
    if jax.default_backend() == "gpu":
        capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
        if not re.fullmatch(r"\d+\.\d+", capability) or float(capability) < CUDNN_MIN_CAPABILITY:
            return f"cuDNN needs an NVIDIA GPU of compute capability {CUDNN_MIN_CAPABILITY}, not {capability or 'unknown'}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16 and float16, not {jnp.dtype(dtype).name}"
    if H % 8 or H > CUDNN_MAX_HEAD_DIM:
        return f"cuDNN takes head dims that are multiples of 8 up to {CUDNN_MAX_HEAD_DIM}, not {H}"
    if T % 2 or S % 2:
        return f"cuDNN takes even lengths under a mask, not {T} queries of {S} keys"
    return None


def splash_problem(*, dtype: Any, H: int, T: int, S: int, platform: str) -> str | None:
    """Why splash cannot attend from T to S tokens of head dim H on `platform`, or None if it can."""
    if platform != "tpu":
        return f"splash needs a TPU and this is {platform}"
    if jax.dtypes.canonicalize_dtype("int64") == "int64":
        return "splash does not compile under jax_enable_x64"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"splash takes bfloat16 and float32, not {jnp.dtype(dtype).name}"
    if H % 128:
        return f"splash takes head dims that are multiples of 128, not {H}"
    if T % SPLASH_BLOCKS[-1] or S % SPLASH_BLOCKS[-1]:
        return f"splash takes lengths that are multiples of {SPLASH_BLOCKS[-1]}, not {T} queries of {S} keys on a device"
    return None


def cudnn_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_segments_BT: jax.Array | None = None,
    k_segments_BS: jax.Array | None = None,
    offset: int | jax.Array = 0,
    backend: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """cuDNN's flash attention -> [B, T, N, H]. The scores are never in memory; a mask, where one is needed, is.

    Whole sequences without segments need none: cuDNN skips the future itself. Segments become an additive mask [B, 1, T, S]
    in the inputs' type (2 B T S bytes, and as much again for its unused gradient); a shard of a sequence, whose offset is
    not known when compiling, has the causal mask in it as well ([1, 1, T, S] without segments).
    """
    whole = isinstance(offset, int) and offset == 0 and q_BTNH.shape[1] == k_BSKH.shape[1]
    mask_BNTS = None
    if not whole or q_segments_BT is not None:
        visible = visible_keys(
            q_BTNH.shape[1], k_BSKH.shape[1], q_segments_BT=q_segments_BT, k_segments_BS=k_segments_BS, offset=offset
        )
        mask_BNTS = visible[None, None] if q_segments_BT is None else visible[:, 0]
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_BNTS, is_causal=whole, implementation=backend)


def splash_kernel(
    T: int, N: int, *, seq_parts: int = 1, mesh: Any = None, interpret: bool = False
) -> tuple[Callable[..., Any], Any]:
    """The causal kernel of N heads for a sequence of T tokens cut into `seq_parts` -> (kernel, its spec for shard_map).

    The kernel is a tree of small arrays that say which blocks each query block reads; shard_map gives every device its own
    part of them, so each skips the future of its own queries. The spec is None without a `mesh`.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # takes a second to import: only where used

    block_q = next(block for block in SPLASH_BLOCKS if T // seq_parts % block == 0)
    block_kv = next(block for block in SPLASH_BLOCKS if T % block == 0)
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    mask = splash.MultiHeadMask([splash.CausalMask((T, T))] * N)
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=seq_parts, interpret=interpret)
    if mesh is None:
        return kernel, None
    return kernel, kernel.manual_sharding_spec(NamedSharding(mesh, P(None, "seq" if seq_parts > 1 else None)))


def splash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    kernel: Callable[..., Any],
    q_segments_BT: jax.Array | None = None,
    k_segments_BS: jax.Array | None = None,
) -> jax.Array:
    """Splash attention, one row of the batch at a time -> [B, T, N, H]. The kernel knows the position of its queries."""
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds  # takes a second to import: only where used

    q_BNTH, k_BKSH, v_BKSH = (x.swapaxes(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    q_BNTH = (q_BNTH.astype(jnp.float32) * q_BTNH.shape[-1] ** -0.5).astype(q_BTNH.dtype)
    if q_segments_BT is None or k_segments_BS is None:
        out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH)
    else:
        segments = SegmentIds(q_segments_BT.astype(jnp.int32), k_segments_BS.astype(jnp.int32))
        out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, segments)
    return out_BNTH.swapaxes(1, 2)
