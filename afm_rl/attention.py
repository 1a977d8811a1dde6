"""Attention behind one seam: causal grouped-query attention over whole sequences, on one device or cut over a mesh.

Paper section 2 (grouped-query attention, 8 KV heads in the published models). Three implementations: `attention_xla` (every
backend, and the only one that this project's tests run on its own hardware), cuDNN on NVIDIA GPUs and splash on TPUs
(`attention_kernels`: neither has run on its hardware in these tests). All honour `segments_BT`: packed documents do not see
each other. `attention_sharding` cuts the work over the mesh. A cache of pages has its own: `generation/paged_attention.py`.

Shapes: B batch, T time, N query heads, K kv heads, H head dim.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

import jax

from afm_rl.attention_kernels import (
    cudnn_attention,
    cudnn_problem,
    splash_attention,
    splash_kernel,
    splash_problem,
)
from afm_rl.attention_sharding import Layout, attention_layout, shard_attention
from afm_rl.attention_xla import xla_attention

Implementation = Literal["auto", "xla", "cudnn", "splash"]


def causal_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """softmax(q k / sqrt(H)) v over the past of the same segment -> [B, T, N, H].

    Query head n reads kv head n // (N / K). The products run in the inputs' type, the softmax in float32 (in float64 for
    float64 inputs). `segments_BT` are integers, 0 for padding. Under a mesh of several devices (`jax.set_mesh`) the output
    is cut like q: batch over (data, fsdp), time over seq, heads over tensor, where they divide.

    Raises ValueError if the shapes do not fit, or if an implementation other than "auto" cannot run here.
    """
    chosen = chosen_implementation(q_BTNH, k_BTKH, implementation=implementation)
    layout = _checked_layout(q_BTNH.shape, k_BTKH.shape)
    operand, operand_spec = None, None
    if chosen == "splash":
        mesh = jax.sharding.get_abstract_mesh() if layout.on_mesh else None
        operand, operand_spec = splash_kernel(
            q_BTNH.shape[1], q_BTNH.shape[2] // layout.head_parts, seq_parts=layout.seq_parts, mesh=mesh
        )
    local = partial(_local, chosen)
    if not layout.on_mesh:
        return local(q_BTNH, k_BTKH, v_BTKH, segments_BT, segments_BT, 0, operand)
    return shard_attention(
        local,
        q_BTNH,
        k_BTKH,
        v_BTKH,
        segments_BT=segments_BT,
        layout=layout,
        operand=operand,
        operand_spec=operand_spec,
        check_vma=chosen == "xla",
    )


def chosen_implementation(
    q_BTNH: Any, k_BTKH: Any, *, implementation: Implementation = "auto", platform: str | None = None
) -> str:
    """What `causal_attention` runs on arrays of these shapes and types under the current mesh: "xla", "cudnn" or "splash".

    `q_BTNH` and `k_BTKH` need only `shape` and `dtype`. `platform` ("cpu", "gpu" or "tpu"; default: this process's) asks
    for another machine. "auto" is cuDNN on a GPU and splash on a TPU where they fit, else XLA.

    Raises ValueError if the shapes do not fit, or if a named implementation cannot run there, with the reason.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(f"attention implementation {implementation!r} is not one of {', '.join(get_args(Implementation))}")
    layout = _checked_layout(q_BTNH.shape, k_BTKH.shape)
    if implementation == "xla":
        return "xla"
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    facts = {
        "dtype": q_BTNH.dtype,
        "H": H,
        "T": T // layout.seq_parts,
        "S": T,
        "platform": platform or jax.default_backend(),
    }
    problems = {"cudnn": cudnn_problem(**facts), "splash": splash_problem(**facts)}
    if implementation == "auto":
        return next((name for name, problem in problems.items() if problem is None), "xla")
    if problem := problems[implementation]:
        raise ValueError(f"attention implementation {implementation!r}: {problem}; use 'auto' or 'xla'")
    return implementation


def _checked_layout(q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> Layout:
    """The layout of self-attention, or ValueError where these are not the shapes of its queries and keys."""
    if (
        len(q_shape) != 4
        or len(k_shape) != 4
        or (q_shape[:2], q_shape[3]) != (k_shape[:2], k_shape[3])
        or q_shape[2] % k_shape[2]
    ):
        raise ValueError(
            f"self-attention wants q [B, T, N, H] and k [B, T, K, H], N a multiple of K; got {q_shape} and {k_shape}"
        )
    return attention_layout(B=q_shape[0], T=q_shape[1], N=q_shape[2], K=k_shape[2])


def _local(
    chosen: str,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_segments_BT: jax.Array | None,
    k_segments_BS: jax.Array | None,
    offset: int | jax.Array,
    operand: Any,
) -> jax.Array:
    """One device's part, by the chosen implementation."""
    segments = {"q_segments_BT": q_segments_BT, "k_segments_BS": k_segments_BS}
    if chosen == "splash":
        return splash_attention(q_BTNH, k_BSKH, v_BSKH, kernel=operand, **segments)
    attend = cudnn_attention if chosen == "cudnn" else xla_attention
    return attend(q_BTNH, k_BSKH, v_BSKH, offset=offset, **segments)
