"""Attention over a mesh: every device holds its own queries, and gathers the keys and values of the whole sequence.

The mesh of `jax.set_mesh` has the axes data, fsdp, seq, tensor: the batch is cut over (data, fsdp), time over seq, heads
over tensor. This is all-gather sequence parallelism: k, v and segments are gathered over seq, in the type they come in; q
and the scores [B, N, T/seq, S] never are. Per layer a device holds 2 B S K H gathered numbers, where ring attention holds
4 B (S/seq) K H (two blocks of keys and values); with grouped queries K is a fraction of N, so this is small beside the
scores, and there is one collective instead of `seq` steps that wait for each other.
Shards are contiguous: under the causal mask the last shard has the most keys to read, and the step waits for it.

Shapes: B batch, T query time, S key time, N query heads, K kv heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

#: (q, k, v, q_segments_BT, k_segments_BS, offset, operand) of one device -> out [B, T, N, H] of that device.
LocalAttention = Callable[..., jax.Array]


@dataclass(frozen=True)
class Layout:
    """Which axes of the mesh cut which dimension of q, k and v (None: not cut), and into how many parts."""

    on_mesh: bool
    batch: tuple[str, ...] | None
    seq: str | None
    q_heads: str | None
    kv_heads: str | None
    seq_parts: int
    head_parts: int

    @property
    def q_spec(self) -> P:
        """Of q and of the output [B, T, N, H]."""
        return P(self.batch, self.seq, self.q_heads, None)

    @property
    def kv_spec(self) -> P:
        """Of k and v [B, S, K, H], before they are gathered."""
        return P(self.batch, self.seq, self.kv_heads, None)


def attention_layout(*, B: int, T: int, N: int, K: int) -> Layout:
    """The cut of self-attention under the current mesh. A dimension that its axes do not divide stays whole.

    When the kv heads are fewer than the tensor axis (a multiple of them), they stay whole and each device takes its one.
    Outside of a mesh, on one device, and inside a `shard_map` that already holds the axes, nothing is cut.
    """
    mesh = jax.sharding.get_abstract_mesh()
    size = {axis: mesh.shape[axis] for axis in mesh.auto_axes}
    batch = tuple(axis for axis in ("data", "fsdp") if size.get(axis, 1) > 1)
    batch_parts = size.get("data", 1) * size.get("fsdp", 1)
    seq_parts = size.get("seq", 1) if T % size.get("seq", 1) == 0 else 1
    tensor = size.get("tensor", 1)
    one_kv_head_each = tensor > K and tensor % K == 0
    head_parts = tensor if N % tensor == 0 and (K % tensor == 0 or one_kv_head_each) else 1
    return Layout(
        on_mesh=len(size) == len(mesh.axis_names) and mesh.size > 1,
        batch=batch if batch_parts > 1 and B % batch_parts == 0 else None,
        seq="seq" if seq_parts > 1 else None,
        q_heads="tensor" if head_parts > 1 else None,
        kv_heads="tensor" if head_parts > 1 and not one_kv_head_each else None,
        seq_parts=seq_parts,
        head_parts=head_parts,
    )


def shard_attention(
    local: LocalAttention,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    segments_BT: jax.Array | None,
    layout: Layout,
    operand: Any = None,
    operand_spec: Any = None,
    check_vma: bool = True,
) -> jax.Array:
    """`local` on every device of the mesh, given its queries, all keys and values, and the position of its first query.

    `operand` is whatever else `local` takes, cut by `operand_spec`. `check_vma` is shard_map's check of replication, which
    kernels do not pass.
    """

    def on_device(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, operand: Any) -> jax.Array:
        k, v = _own_kv_head(k, layout), _own_kv_head(v, layout)
        if layout.seq is None:
            return local(q, k, v, segments, segments, 0, operand)
        k, v, k_segments = jax.tree.map(lambda x: jax.lax.all_gather(x, layout.seq, axis=1, tiled=True), (k, v, segments))
        return local(q, k, v, segments, k_segments, jax.lax.axis_index(layout.seq) * q.shape[1], operand)

    return jax.shard_map(
        on_device,
        in_specs=(layout.q_spec, layout.kv_spec, layout.kv_spec, P(layout.batch, layout.seq), operand_spec),
        out_specs=layout.q_spec,
        check_vma=check_vma,
    )(q_BTNH, k_BSKH, v_BSKH, segments_BT, operand)


def _own_kv_head(x_BSKH: jax.Array, layout: Layout) -> jax.Array:
    """The one kv head that this device's query heads read, where the tensor axis is larger than the number of kv heads."""
    if layout.q_heads is None or layout.kv_heads is not None:
        return x_BSKH
    head = jax.lax.axis_index(layout.q_heads) * x_BSKH.shape[2] // layout.head_parts
    return jax.lax.dynamic_slice_in_dim(x_BSKH, head, 1, axis=2)
