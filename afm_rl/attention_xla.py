"""Causal grouped-query attention in plain jax.numpy: runs on every backend, and is what the kernels are compared with.

Up to ONE_SHOT_LENGTH keys the scores are one array. Beyond, the queries go through in chunks of QUERY_CHUNK, one at a time,
and the backward pass computes each chunk's scores again: memory grows as B N QUERY_CHUNK S and not as B N T S. The chunks
of a whole sequence form KEY_EXTENTS groups, and a group reads the keys up to its own end only, which leaves 5/8 of the
products. A shard of a sequence is one group: its place, and so how far it reads, is not known when compiling.

Shapes: B batch, T query time, S key time, N query heads, K kv heads, M query heads per kv head, H head dim, C chunks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

#: Added to a masked score; finite, so that a fully masked (padding) row gives a uniform row and never NaN.
MASKED = -1e30

#: Up to this number of keys the scores of all queries are one array: fastest on short sequences.
ONE_SHOT_LENGTH = 1024

#: Queries whose scores are in memory at the same time, beyond ONE_SHOT_LENGTH keys.
QUERY_CHUNK = 128

#: Groups of chunks, each compiled for its own number of keys. More save products (a share of 1/2 + 1/2n is left of them),
#: but are compiled one by one, and XLA keeps some of the chunks of several in memory together.
KEY_EXTENTS = 4


def xla_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_segments_BT: jax.Array | None = None,
    k_segments_BS: jax.Array | None = None,
    offset: int | jax.Array = 0,
) -> jax.Array:
    """softmax(q k / sqrt(H)) v over the past of the same segment -> [B, T, N, H].

    `offset` is the position of the first query among the keys. A traced one (a shard of a sequence) reads all keys.
    """
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    if S <= ONE_SHOT_LENGTH:
        return _one_shot(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, offset)
    groups = KEY_EXTENTS if isinstance(offset, int) else 1
    group = QUERY_CHUNK * -(-T // (QUERY_CHUNK * groups))
    outs = []
    for start in range(0, T, group):
        end = min(start + group, T)
        extent = min(offset + end, S) if isinstance(offset, int) else S
        outs.append(
            _query_group(
                q_BTNH[:, start:end],
                k_BSKH[:, :extent],
                v_BSKH[:, :extent],
                None if q_segments_BT is None else q_segments_BT[:, start:end],
                None if k_segments_BS is None else k_segments_BS[:, :extent],
                offset + start,
            )
        )
    return jnp.concatenate(outs, axis=1)


def _query_group(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_segments_BT: jax.Array | None,
    k_segments_BS: jax.Array | None,
    offset: int | jax.Array,
) -> jax.Array:
    """Queries that read the same keys, QUERY_CHUNK at a time, without keeping their scores for the backward pass."""
    T = q_BTNH.shape[1]
    if T <= QUERY_CHUNK:
        return jax.checkpoint(_one_shot)(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, offset)
    C = -(-T // QUERY_CHUNK)

    def chunks(x_BT: jax.Array) -> jax.Array:
        padded = jnp.pad(x_BT, [(0, 0), (0, C * QUERY_CHUNK - T)] + [(0, 0)] * (x_BT.ndim - 2))
        return jnp.moveaxis(padded.reshape(x_BT.shape[0], C, QUERY_CHUNK, *x_BT.shape[2:]), 1, 0)

    def attend(chunk: tuple[jax.Array, jax.Array | None, jax.Array]) -> jax.Array:
        q, segments, start = chunk
        return jax.checkpoint(_one_shot)(q, k_BSKH, v_BSKH, segments, k_segments_BS, start)

    segments = None if q_segments_BT is None else chunks(q_segments_BT)
    out = jax.lax.map(attend, (chunks(q_BTNH), segments, offset + QUERY_CHUNK * jnp.arange(C)))
    return jnp.moveaxis(out, 0, 1).reshape(q_BTNH.shape[0], C * QUERY_CHUNK, *q_BTNH.shape[2:])[:, :T]


def _one_shot(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_segments_BT: jax.Array | None,
    k_segments_BS: jax.Array | None,
    offset: int | jax.Array,
) -> jax.Array:
    """All the scores [B, K, M, T, S] at once. Products in the inputs' type, softmax in float32 (float64 inputs: float64)."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BKMTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    visible = visible_keys(T, S, q_segments_BT=q_segments_BT, k_segments_BS=k_segments_BS, offset=offset)
    out_BKMTH = _mix(q_BKMTH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), visible)
    return out_BKMTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


@jax.custom_vjp
def _mix(q_BKMTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, visible: jax.Array) -> jax.Array:
    """Attention with the batch axes first. Every product takes operands of the inputs' type and accumulates in float32.

    The gradient is written out because the one JAX derives multiplies float32 cotangents, for which no matrix unit has
    a kernel, and keeps the float32 scores beside the weights.
    """
    return _mix_forward(q_BKMTH, k_BKSH, v_BKSH, visible)[0]


def _mix_forward(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    scores = jnp.where(visible, _einsum("bkmth,bksh->bkmts", q, k) * q.shape[-1] ** -0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = _einsum("bkmts,bksh->bkmth", weights, v).astype(q.dtype)
    return out, (q, k, v, weights, out)


def _mix_backward(kept: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, weights, out = kept
    v_gradient = _einsum("bkmts,bkmth->bksh", weights, g)
    weights_gradient = _einsum("bkmth,bksh->bkmts", g, v)
    mean_gradient = (g.astype(weights_gradient.dtype) * out).sum(-1, keepdims=True)  # of each row, under its weights
    scores_gradient = (weights * (weights_gradient - mean_gradient) * q.shape[-1] ** -0.5).astype(q.dtype)
    q_gradient = _einsum("bkmts,bksh->bkmth", scores_gradient, k)
    k_gradient = _einsum("bkmts,bkmth->bksh", scores_gradient, q)
    return q_gradient.astype(q.dtype), k_gradient.astype(k.dtype), v_gradient.astype(v.dtype), None


_mix.defvjp(_mix_forward, _mix_backward)


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def visible_keys(
    T: int,
    S: int,
    *,
    q_segments_BT: jax.Array | None,
    k_segments_BS: jax.Array | None,
    offset: int | jax.Array,
) -> jax.Array:
    """Which keys each query reads: bool [T, S], or [B, 1, 1, T, S] with segments."""
    past_TS = offset + jnp.arange(T)[:, None] >= jnp.arange(S)
    if q_segments_BT is None or k_segments_BS is None:
        return past_TS
    return (past_TS & (q_segments_BT[:, :, None] == k_segments_BS[:, None, :]))[:, None, None]
