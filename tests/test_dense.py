"""The product of every projection: value, gradients and types, against float64 NumPy and against plain `dot_general`.

Shapes: B batch, T time; in/out as the weight [out, in].
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afm_rl.dense import dense
from afm_rl.lora import LoraWeight

ROOT = Path(__file__).resolve().parents[1]
#: Largest relative error of one rounding to bfloat16 (8 bits of mantissa, to nearest).
BF16_ROUNDING = 2.0**-8


def _case(lead: tuple[int, ...], *, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [*lead, 24], weight [40, 24] and a cotangent [*lead, 40]; every entry is a bfloat16 value."""
    rng = np.random.default_rng(seed)
    arrays = rng.normal(size=(*lead, 24)), rng.normal(size=(40, 24)), rng.normal(size=(*lead, 40))
    return tuple(np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in arrays)  # type: ignore[return-value]


def _gradients(x: np.ndarray, w: np.ndarray, g: np.ndarray, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    out, pull = jax.vjp(dense, jnp.asarray(x, dtype), jnp.asarray(w, jnp.float32))
    return out, *pull(jnp.asarray(g, dtype))


def _reference(x: np.ndarray, w: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows, cotangents = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return x @ w.T, g @ w, cotangents.T @ rows


@pytest.mark.parametrize("lead", [(5,), (256,), (2, 7), (2, 3, 4)])
def test_float32_is_exact_float32(lead: tuple[int, ...]) -> None:
    """Every rank of activations: value and both gradients within float32 summation error of float64."""
    case = _case(lead)
    for ours, reference in zip(_gradients(*case, "float32"), _reference(*case), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("lead", [(5,), (256,), (2, 7)])
def test_bfloat16_rounds_results_only(lead: tuple[int, ...]) -> None:
    """bfloat16 operands accumulate in float32: one rounding of the result, none of a float32 weight's gradient."""
    case = _case(lead)
    out, x_gradient, w_gradient = _gradients(*case, "bfloat16")
    reference = _reference(*case)
    assert (out.dtype, x_gradient.dtype, w_gradient.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    for rounded, exact in ((out, reference[0]), (x_gradient, reference[1])):
        np.testing.assert_allclose(np.asarray(rounded, np.float64), exact, rtol=BF16_ROUNDING, atol=1e-4)
    np.testing.assert_allclose(w_gradient, reference[2], rtol=1e-5, atol=1e-4)


def test_gradient_equals_plain_products() -> None:
    """The hand-written gradient under jit, scan, vmap and checkpoint is the one JAX derives from a plain product."""
    x, w, _ = _case((4, 6))
    weights = jnp.asarray(np.stack([w[:24], 0.5 * w[16:40]]), jnp.float32)
    rows = jnp.asarray(x, jnp.float32)

    def stacked(product):  # type: ignore[no-untyped-def]
        def layer(h, weight):  # type: ignore[no-untyped-def]
            return jnp.tanh(product(h, weight)), None

        def one(h, weights):  # type: ignore[no-untyped-def]
            return jax.lax.scan(jax.checkpoint(layer), h, weights)[0].sum()

        return jax.jit(jax.grad(lambda w, h: jax.vmap(one, (0, None))(h, w).sum(), (0, 1)))

    plain = stacked(lambda h, weight: jnp.einsum("...i,oi->...o", h, weight))(weights, rows)
    for ours, derived in zip(stacked(dense)(weights, rows), plain, strict=True):
        np.testing.assert_allclose(ours, derived, rtol=1e-4, atol=1e-5)


def test_lora_trains_its_factors_only_through_their_product() -> None:
    """A LoRA leaf multiplies and differentiates as the matrix it stands for."""
    x, w, g = _case((3, 5))
    rng = np.random.default_rng(1)
    a, b, scale = rng.normal(size=(2, 24)), rng.normal(size=(40, 2)), 0.5

    def apply(a: jax.Array, b: jax.Array) -> jax.Array:
        return dense(jnp.asarray(x, jnp.float32), LoraWeight(jnp.asarray(w, jnp.float32), a, b, scale))

    out, pull = jax.vjp(apply, jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    a_gradient, b_gradient = pull(jnp.asarray(g, jnp.float32))
    w_gradient = g.reshape(-1, 40).T @ x.reshape(-1, 24)
    np.testing.assert_allclose(out, x @ (w + scale * b @ a).T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(a_gradient, scale * b.T @ w_gradient, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(b_gradient, scale * w_gradient @ a.T, rtol=1e-4, atol=1e-3)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from afm_rl.dense import dense

mesh = jax.make_mesh((2, 2, 2), ("data", "seq", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
rng = np.random.default_rng(0)
x, w, g = rng.normal(size=(4, 8, 16)), rng.normal(size=(32, 16)), rng.normal(size=(4, 8, 32))
x, w, g = (np.asarray(a, np.float32) for a in (x, w, g))
grad = jax.jit(jax.grad(lambda x, w: (dense(x, w) * g).sum(), (0, 1)))
place = lambda a, *axes: jax.device_put(a, NamedSharding(mesh, P(*axes)))
with jax.set_mesh(mesh):
    dx, dw = grad(place(x, "data", "seq"), place(w, "tensor"))
np.testing.assert_allclose(dx, g @ w, rtol=1e-4, atol=1e-4)
np.testing.assert_allclose(dw, np.einsum("bto,bti->oi", g, x), rtol=1e-4, atol=1e-4)
print("devices", len(dw.sharding.device_set))
"""


def test_gradients_on_eight_devices() -> None:
    """Activations sharded over batch and time, weights over their outputs: the gradients of one."""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = str(ROOT)
    ran = subprocess.run([sys.executable, "-c", SHARDED], env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.split() == ["devices", "8"]
