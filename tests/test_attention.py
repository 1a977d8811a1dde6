"""Attention against plain float64 loops: causality, grouped heads and packed documents."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afm_rl.attention import causal_attention

B, T, K, M, H = 2, 7, 2, 3, 4
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 3, 3, 3]])
attend = jax.jit(causal_attention)


def qkv() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(B, T, heads, H)).astype(np.float32) for heads in (K * M, K, K)]


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, segments: np.ndarray | None = None) -> np.ndarray:
    """One query at a time in float64: query head n reads kv head n // M."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(*q.shape[:3]):
        seen = [s for s in range(t + 1) if segments is None or segments[b, s] == segments[b, t]]
        scores = np.array([q[b, t, n] @ k[b, s, n // M] for s in seen]) / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = (weights / weights.sum()) @ v[b, seen, n // M]
    return out


def test_causal_attention_matches_the_reference() -> None:
    """Guards the scale, the causal mask, and which kv head a query head reads (not n % K)."""
    q, k, v = qkv()
    np.testing.assert_allclose(attend(q, k, v), reference(q, k, v), atol=2e-6)


def test_segments_match_the_reference() -> None:
    """Guards the mask of packed documents, which also keeps padding apart."""
    q, k, v = qkv()
    out = attend(q, k, v, segments_BT=SEGMENTS)
    np.testing.assert_allclose(out, reference(q, k, v, SEGMENTS), atol=2e-6)


def test_packed_documents_do_not_see_each_other() -> None:
    """Guards isolation bit for bit: other keys and values in one document change nothing in another."""
    q, k, v = qkv()
    other = SEGMENTS != 2
    k2, v2 = (np.where(other[:, :, None, None], 1e4, x).astype(np.float32) for x in (k, v))
    before, after = (np.asarray(attend(q, *kv, segments_BT=SEGMENTS)) for kv in ((k, v), (k2, v2)))
    np.testing.assert_array_equal(before[~other], after[~other])
    assert np.abs(np.asarray(attend(q, k2, v2)) - before)[~other].max() > 1


def test_the_softmax_is_float32_and_the_output_keeps_its_type() -> None:
    """Guards bfloat16 compute: many equal scores must still sum to one (bfloat16 sums stop growing at 256)."""
    zeros, ones = jnp.zeros((1, 600, 1, 2), jnp.bfloat16), jnp.ones((1, 600, 1, 2), jnp.bfloat16)
    out = attend(zeros, zeros, ones)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out[0, -1], np.float32), 1.0, rtol=0.01)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "packed"])
def test_gradients_match_the_reference(segments: np.ndarray | None) -> None:
    """Guards the written-out gradient: derivatives along random directions against differences of the float64 reference."""
    inputs, rng, step = qkv(), np.random.default_rng(1), 1e-5
    out, pull = jax.vjp(lambda q, k, v: causal_attention(q, k, v, segments_BT=segments), *inputs)
    g = rng.normal(size=out.shape)
    for index, gradient in enumerate(pull(jnp.asarray(g, jnp.float32))):
        for _ in range(3):
            direction = rng.normal(size=gradient.shape)
            moved = [
                [x + sign * step * direction if i == index else x.astype(np.float64) for i, x in enumerate(inputs)]
                for sign in (1, -1)
            ]
            ahead, behind = (reference(*qkv_moved, segments) for qkv_moved in moved)
            slope = (g * (ahead - behind)).sum() / (2 * step)
            np.testing.assert_allclose((np.asarray(gradient, np.float64) * direction).sum(), slope, rtol=1e-4, atol=1e-4)


def test_bfloat16_gradients_stay_close_to_float32() -> None:
    """Guards the types of the backward products: each gradient within two per cent of float32's, in norm."""
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in qkv()]

    def gradients(dtype: str) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(causal_attention, *(x.astype(dtype) for x in inputs))
        return pull(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape).astype(dtype))

    for low, exact in zip(gradients("bfloat16"), gradients("float32"), strict=True):
        assert low.dtype == jnp.bfloat16
        assert jnp.linalg.norm(low.astype(jnp.float32) - exact) < 0.02 * jnp.linalg.norm(exact)
