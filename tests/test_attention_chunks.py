"""Long sequences: attention in chunks of queries is the same attention, in a fraction of the memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afm_rl import attention_xla
from afm_rl.attention import causal_attention

B, N, K, H = 2, 4, 2, 8


def example(T: int) -> tuple[list[jax.Array], jax.Array]:
    """(q, k, v, cotangent) and segments whose borders are not those of the chunks, with a tail of padding."""
    rng = np.random.default_rng(T)
    segments = np.sort(rng.integers(1, 5, size=(B, T)), axis=1)
    segments[:, -3:] = 0
    return [jnp.asarray(rng.normal(size=(B, T, heads, H))) for heads in (N, K, K, N)], jnp.asarray(segments)


def with_gradients(arrays: list[jax.Array], segments: jax.Array | None, **options: Any) -> Any:
    """The output, and the gradients of q, k and v."""
    *qkv, cotangent = arrays

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        out, back = jax.vjp(
            lambda *qkv: attention_xla.xla_attention(*qkv, q_segments_BT=segments, k_segments_BS=segments, **options),
            q,
            k,
            v,
        )
        return out, *back(cotangent)

    return jax.jit(run)(*qkv)


@pytest.mark.parametrize(("T", "packed", "offset"), [(67, True, 0), (40, False, np.int32(0))])
def test_chunks_give_the_outputs_and_gradients_of_one_shot(
    monkeypatch: pytest.MonkeyPatch, T: int, packed: bool, offset: Any
) -> None:
    """Guards every cut: groups, chunks, keys left out, queries added to fill a chunk (67). In float64."""
    with jax.enable_x64(True):
        arrays, segments = example(T)
        given = segments if packed else None
        want = with_gradients(arrays, given)
        monkeypatch.setattr(attention_xla, "ONE_SHOT_LENGTH", 16)
        monkeypatch.setattr(attention_xla, "QUERY_CHUNK", 4)
        for ours, theirs in zip(with_gradients(arrays, given, offset=offset), want, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-13)


def test_memory_at_4096_tokens_is_far_below_the_scores() -> None:
    """Guards the reason of the chunks: the array of scores alone is 5 times what forward and backward take."""
    T, heads = 4096, 8
    q, k = (jax.ShapeDtypeStruct((1, T, n, 8), jnp.float32) for n in (heads, 2))

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return causal_attention(q, k, v).sum()

    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, k).compile()
    assert compiled.memory_analysis().temp_size_in_bytes * 5 < heads * T * T * 4
