"""The choice of an attention kernel, and the adapters of cuDNN and splash, without their hardware."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afm_rl.attention import causal_attention, chosen_implementation
from afm_rl.attention_kernels import cudnn_attention, splash_attention, splash_kernel
from afm_rl.attention_xla import xla_attention

#: Three blocks of 128 each way.
SPLASH_SHAPE = {"B": 2, "T": 384, "N": 2, "K": 1, "H": 128}


def shapes(T: int = 256, H: int = 128, dtype: Any = jnp.bfloat16, N: int = 4, K: int = 2) -> list[jax.ShapeDtypeStruct]:
    """Queries and keys, by shape and type only."""
    return [jax.ShapeDtypeStruct((2, T, heads, H), dtype) for heads in (N, K)]


def example(B: int, T: int, N: int, K: int, H: int) -> tuple[list[jax.Array], jax.Array]:
    """(q, k, v, cotangent) and packed segments with a tail of padding."""
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(1, 4, size=(B, T)), axis=1)
    segments[:, -T // 8 :] = 0
    return [jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.float32) for heads in (N, K, K, N)], jnp.asarray(segments)


def with_gradients(attend: Any, arrays: list[jax.Array], **options: Any) -> list[jax.Array]:
    """The output, and the gradients of q, k and v."""
    *qkv, cotangent = arrays

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        out, back = jax.vjp(lambda *qkv: attend(*qkv, **options), q, k, v)
        return out, *back(cotangent)

    return run(*qkv)


@pytest.mark.parametrize(
    ("platform", "query_and_key", "want"),
    [
        ("cpu", shapes(), "xla"),
        ("gpu", shapes(), "cudnn"),
        ("gpu", shapes(dtype=jnp.float32), "xla"),
        ("gpu", shapes(H=100), "xla"),
        ("gpu", shapes(H=256), "xla"),
        ("gpu", shapes(T=255), "xla"),
        ("tpu", shapes(), "splash"),
        ("tpu", shapes(dtype=jnp.float32), "splash"),
        ("tpu", shapes(T=192), "xla"),
        ("tpu", shapes(H=64), "xla"),
        ("tpu", shapes(dtype=jnp.float16), "xla"),
    ],
)
def test_auto_takes_the_kernel_that_fits(platform: str, query_and_key: list[Any], want: str) -> None:
    """Guards the fall-back: a shape or type that a kernel does not take goes to XLA, not into an error."""
    assert chosen_implementation(*query_and_key, platform=platform) == want


@pytest.mark.parametrize(
    ("implementation", "platform", "query_and_key", "reason"),
    [
        ("cudnn", "cpu", shapes(), "needs an NVIDIA GPU and this is cpu; use 'auto' or 'xla'"),
        ("cudnn", "gpu", shapes(dtype=jnp.float32), "bfloat16 and float16, not float32"),
        ("cudnn", "gpu", shapes(H=100), "multiples of 8 up to 128, not 100"),
        ("cudnn", "gpu", shapes(T=255), "even lengths under a mask, not 255"),
        ("splash", "gpu", shapes(), "needs a TPU and this is gpu"),
        ("splash", "tpu", shapes(T=192), "multiples of 128, not 192"),
        ("splash", "tpu", shapes(H=64), "head dims that are multiples of 128, not 64"),
        ("flash", "gpu", shapes(), "'flash' is not one of auto, xla, cudnn, splash"),
        ("xla", "cpu", shapes(N=3), "N a multiple of K"),
    ],
)
def test_a_named_implementation_that_cannot_run_says_why(
    implementation: Any, platform: str, query_and_key: list[Any], reason: str
) -> None:
    """Guards against a silent fall-back where the user asked for a kernel by name."""
    with pytest.raises(ValueError, match=reason.replace("'", ".")):
        chosen_implementation(*query_and_key, implementation=implementation, platform=platform)


def test_splash_refuses_64_bit_mode() -> None:
    """Guards the reason: the kernel's index arithmetic does not compile there."""
    with jax.enable_x64(True), pytest.raises(ValueError, match="jax_enable_x64"):
        chosen_implementation(*shapes(), implementation="splash", platform="tpu")


def test_the_seam_passes_the_choice_on() -> None:
    """Guards `implementation` itself: a kernel asked for by name does not run as XLA here."""
    (q, k, v, _), _ = example(B=1, T=4, N=2, K=1, H=8)
    with pytest.raises(ValueError, match="splash needs a TPU"):
        causal_attention(q, k, v, implementation="splash")


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_splash_in_the_interpreter_is_xla_attention(packed: bool) -> None:
    """Guards the adapter (scale, head order, segments) and its backward pass. Tolerance: float32 sums in another order."""
    arrays, segments = example(**SPLASH_SHAPE)
    options = {"q_segments_BT": segments, "k_segments_BS": segments} if packed else {}
    kernel, _ = splash_kernel(SPLASH_SHAPE["T"], SPLASH_SHAPE["N"], interpret=True)
    got = with_gradients(splash_attention, arrays, kernel=kernel, **options)
    want = with_gradients(xla_attention, arrays, **options)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_splash_compiles_to_mosaic_for_a_tpu() -> None:
    """Guards the block sizes: forward and backward kernels in bfloat16 at 2048 tokens, as far as it goes without a TPU."""
    kernel, _ = splash_kernel(2048, 4)
    arrays = [jax.ShapeDtypeStruct((2, 2048, heads, 128), jnp.bfloat16) for heads in (4, 2, 2)]
    segments = jax.ShapeDtypeStruct((2, 2048), jnp.int32)

    def total(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        out = splash_attention(q, k, v, kernel=kernel, q_segments_BT=segments, k_segments_BS=segments)
        return out.astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(*arrays, segments)
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 3


@pytest.mark.parametrize(("offset", "packed"), [(0, False), (0, True), (8, False), (8, True)])
def test_what_cudnn_is_given_means_causal_attention(offset: int, packed: bool) -> None:
    """Guards masks and head order: JAX's XLA version of the same call, whole and as the second shard of a sequence."""
    (q, k, v, cotangent), segments = example(B=2, T=16, N=4, K=2, H=8)
    arrays = [q[:, offset:], k, v, cotangent[:, offset:]]
    options: dict[str, Any] = {"offset": offset}
    if packed:
        options |= {"q_segments_BT": segments[:, offset:], "k_segments_BS": segments}
    got = with_gradients(cudnn_attention, arrays, backend="xla", **options)
    for ours, theirs in zip(got, with_gradients(xla_attention, arrays, **options), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
