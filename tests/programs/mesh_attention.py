"""Attention on meshes of 8 virtual devices, measured against one device; `test_attention_mesh.py` runs this and reads it.

Its argument is "fast" or "slow". Prints one JSON object: differences of outputs and gradients by case, how the output is
cut, and the collectives and memory of the compiled program.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from afm_rl import attention_xla
from afm_rl.attention import causal_attention
from afm_rl.attention_kernels import splash_attention, splash_kernel
from afm_rl.attention_sharding import attention_layout, shard_attention

FAST_MESHES = ("2x2x2x1", "1x1x8x1", "1x1x4x2", "2x1x2x2")
MESHES = ("1x8x1x1", "2x2x2x1", "1x2x2x2", "1x1x8x1", "1x1x4x2", "2x1x2x2")


def make_mesh(name: str) -> jax.sharding.Mesh:
    """Mesh "data x fsdp x seq x tensor" of the first devices."""
    shape = tuple(int(size) for size in name.split("x"))
    devices = jax.devices()[: int(np.prod(shape))]
    types = (jax.sharding.AxisType.Auto,) * 4
    return jax.make_mesh(shape, ("data", "fsdp", "seq", "tensor"), axis_types=types, devices=devices)


def example(B: int = 8, T: int = 32, N: int = 4, K: int = 2, H: int = 8, dtype: Any = np.float64) -> list[jax.Array]:
    """q, k, v and the output's cotangent."""
    rng = np.random.default_rng(B * T + N)
    return [jnp.asarray(rng.normal(size=(B, T, heads, H)), dtype) for heads in (N, K, K, N)]


def packed(B: int, T: int) -> jax.Array:
    """Documents of uneven lengths, which cross every border between shards, and a tail of padding."""
    ends = np.random.default_rng(1).integers(1, T, size=(B, 4))
    segments = 1 + (np.arange(T) >= ends[:, :, None]).sum(1)
    segments[:, T - 1 - T // 10 :] = 0
    return jnp.asarray(segments)


def with_gradients(attend: Callable[..., jax.Array]) -> Callable[..., Any]:
    """(q, k, v, cotangent, segments) -> (output, gradients of q, k, v)."""

    def run(q: Any, k: Any, v: Any, cotangent: Any, segments: Any) -> Any:
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, segments_BT=segments), q, k, v)
        return out, *back(cotangent)

    return run


#: Without a mesh: compiled once for all the meshes that are compared with it.
on_one_device = jax.jit(with_gradients(causal_attention))


def difference(got: Any, want: Any) -> float:
    """Largest |got - want|, relative to the largest |want| of each array."""
    return max(float(np.abs(np.asarray(g) - np.asarray(w)).max() / np.abs(w).max()) for g, w in zip(got, want, strict=True))


def compare(mesh_name: str, arrays: list[jax.Array], segments: Any = None, attend: Any = causal_attention) -> dict[str, Any]:
    """One device against the mesh, its inputs cut like the model's activations."""
    want = on_one_device(*arrays, segments)
    with jax.set_mesh(mesh := make_mesh(mesh_name)):
        (B, T, N, _), K = arrays[0].shape, arrays[1].shape[2]
        layout = attention_layout(B=B, T=T, N=N, K=K)
        specs = [layout.q_spec, layout.kv_spec, layout.kv_spec, layout.q_spec]
        cut = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
        got = jax.jit(with_gradients(attend))(*cut, segments)
    shard = got[0].sharding.shard_shape(got[0].shape)
    parts = [whole // part for whole, part in zip(got[0].shape, shard, strict=True)]
    return {"difference": difference(got, want), "parts": parts}


def bfloat16_types() -> list[str]:
    """Of the output and the gradients of bfloat16 inputs, traced on a mesh."""
    with jax.set_mesh(make_mesh("1x2x2x2")):
        shapes = jax.eval_shape(with_gradients(causal_attention), *example(dtype=jnp.bfloat16), packed(8, 32))
    return [x.dtype.name for x in shapes]


def layers(x_BTD: jax.Array, weights_LDD: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """A stack of rematerialised attention layers under scan, as in the model: 4 query heads, 2 kv heads."""
    B, T, D = x_BTD.shape

    @jax.checkpoint
    def layer(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
        q = (x @ weight).reshape(B, T, 4, D // 4)
        k = q[:, :, :2] + q[:, :, 2:]
        return x + causal_attention(q, k, jnp.sin(k), segments_BT=segments_BT).reshape(B, T, D), None

    return jnp.sum(jnp.sin(jax.lax.scan(layer, x_BTD, weights_LDD)[0]))


def layer_gradients() -> float:
    """Inside jit, scan, checkpoint and grad: the mesh against one device."""
    rng = np.random.default_rng(3)
    x, weights = jnp.asarray(rng.normal(size=(4, 16, 32))), jnp.asarray(rng.normal(size=(3, 32, 32)) / 6)
    step = jax.jit(jax.grad(layers, (0, 1)))
    want = step(x, weights, packed(4, 16))
    with jax.set_mesh(make_mesh("1x2x2x2")):
        return difference(step(x, weights, packed(4, 16)), want)


def compiled_facts(mesh_name: str, T: int) -> dict[str, Any]:
    """Of the compiled step of 4 query and 2 kv heads of 16: its memory and the shapes its collectives give, per device."""
    arrays = example(B=1, T=T, N=4, K=2, H=16, dtype=np.float32)
    with jax.set_mesh(mesh := make_mesh(mesh_name)):
        layout = attention_layout(B=1, T=T, N=4, K=2)
        specs = [layout.q_spec, layout.kv_spec, layout.kv_spec, layout.q_spec]
        cut = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
        compiled = jax.jit(with_gradients(causal_attention)).lower(*cut, None).compile()
    text = compiled.as_text()
    shapes = re.findall(r"= \(?\w+\[([\d,]*)\][^=]*? all-gather", text)
    largest = max(np.prod([int(n) for n in shape.split(",") if n]) for shape in re.findall(r"f32\[([\d,]*)\]", text))
    return {
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "gathered": sorted({tuple(int(n) for n in shape.split(",")) for shape in shapes}),
        "largest_array": int(largest),
        "other_collectives": sorted(set(re.findall(r"(all-to-all|collective-permute)\(", text))),
    }


def splash_on(mesh_name: str) -> dict[str, Any]:
    """Splash in Pallas' interpreter, each device with its part of the kernel's block tables."""
    T, N = 768, 4

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, *, segments_BT: jax.Array) -> jax.Array:
        mesh = jax.sharding.get_abstract_mesh()
        layout = attention_layout(B=q.shape[0], T=T, N=N, K=k.shape[2])
        kernel, spec = splash_kernel(T, N // layout.head_parts, seq_parts=layout.seq_parts, mesh=mesh, interpret=True)

        def local(q: Any, k: Any, v: Any, q_segments: Any, k_segments: Any, offset: Any, kernel: Any) -> jax.Array:
            del offset
            return splash_attention(q, k, v, kernel=kernel, q_segments_BT=q_segments, k_segments_BS=k_segments)

        return shard_attention(
            local, q, k, v, segments_BT=segments_BT, layout=layout, operand=kernel, operand_spec=spec, check_vma=False
        )

    arrays = example(B=2, T=T, N=N, K=2, H=128, dtype=np.float32)
    return compare(mesh_name, arrays, packed(2, T), attend=attend)


def fast_facts() -> dict[str, Any]:
    """What the fast tests read: the meshes that cut time most, every special case once."""
    facts: dict[str, Any] = {"compiled": {name: compiled_facts(name, 1024) for name in ("1x1x1x1", "1x1x8x1")}}
    jax.config.update("jax_disable_most_optimizations", True)
    facts["bfloat16"] = bfloat16_types()
    jax.config.update("jax_enable_x64", True)
    facts["packed"] = {name: compare(name, example(), packed(8, 32)) for name in FAST_MESHES}
    facts["odd"] = {
        "batch and heads": compare("2x1x2x2", example(B=3, N=3, K=3), packed(3, 32)),
        "time": compare("1x2x2x2", example(T=31), packed(8, 31)),
    }
    facts["few_kv_heads"] = compare("1x1x2x4", example(B=2, N=8, K=2), packed(2, 32))
    facts["layers"] = layer_gradients()
    attention_xla.ONE_SHOT_LENGTH, attention_xla.QUERY_CHUNK = 8, 4
    facts["chunked"] = compare("1x2x2x2", example(B=2, T=40), packed(2, 40))
    return facts


def slow_facts() -> dict[str, Any]:
    """What the slow tests read: splash over the mesh, and every mesh in every way."""
    facts: dict[str, Any] = {"splash": splash_on("1x1x2x2")}
    jax.config.update("jax_disable_most_optimizations", True)
    facts["float32"] = {name: compare(name, example(dtype=np.float32), packed(8, 32)) for name in MESHES}
    jax.config.update("jax_enable_x64", True)
    facts["packed"] = {name: compare(name, example(), packed(8, 32)) for name in MESHES if name not in FAST_MESHES}
    facts["causal"] = {name: compare(name, example()) for name in MESHES}
    facts["few_kv_heads"] = {f"K={K}": compare("1x1x2x4", example(B=2, N=8, K=K), packed(2, 32)) for K in (1, 4)}
    attention_xla.ONE_SHOT_LENGTH, attention_xla.QUERY_CHUNK = 8, 4
    facts["chunked"] = {name: compare(name, example(), packed(8, 32)) for name in MESHES}
    return facts


if __name__ == "__main__":
    print(json.dumps({"fast": fast_facts, "slow": slow_facts}[sys.argv[1]]()))
