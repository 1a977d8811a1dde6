"""The model's parameters: a nested dict of arrays, layers stacked on axis 0, projections stored [out, in].

One declaration per parameter (`param_specs`) gives its shape, where it lies on the mesh and how it starts. Everything that
is shaped like a parameter lies where the parameter does: gradients, optimizer state, a reward model's trunk, frozen copies.

Shapes: D model, F ffn, H head dim, V vocab, L layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from afm_rl.config import ModelConfig
from afm_rl.sharding import Axis, constrain, fitting_spec

Params = dict[str, Any]

#: Up to this many values are drawn at once and cut up; a generator for every shape would take seconds to compile.
MAX_ONE_DRAW = 2**26


@dataclass(frozen=True)
class ParamSpec:
    """Shape of one parameter, the mesh axis of each dimension, and how it starts: normal with `std`, ones if None."""

    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    std: float | None


def param_specs(config: ModelConfig) -> Params:
    """Every parameter of the model. Init: normal, std 1/sqrt(fan_in); embedding std 1/sqrt(dim) (axlearn); norms 1."""
    L, D, F, V, H = config.num_layers, config.dim, config.ffn_dim, config.vocab_size, config.head_dim
    q_dim, kv_dim = config.num_heads * H, config.num_kv_heads * H

    def out_split(out: int) -> ParamSpec:
        return ParamSpec((L, out, D), (None, "tensor", "fsdp"), D**-0.5)

    def in_split(fan_in: int) -> ParamSpec:
        return ParamSpec((L, D, fan_in), (None, "fsdp", "tensor"), fan_in**-0.5)

    def gain(*shape: int) -> ParamSpec:
        return ParamSpec(shape, (None,) * len(shape), None)

    table = ParamSpec((V, D), ("tensor", "fsdp"), D**-0.5)
    specs: Params = {
        "embed": {"weight": table},
        "layers": {
            "attn_norm": gain(L, D),
            "q": out_split(q_dim),
            "k": out_split(kv_dim),
            "v": out_split(kv_dim),
            "o": in_split(q_dim),
            "q_norm": gain(L, H),
            "k_norm": gain(L, H),
            "mlp_norm": gain(L, D),
            "gate": out_split(F),
            "up": out_split(F),
            "down": in_split(F),
        },
        "final_norm": gain(D),
    }
    if not config.tie_embeddings:
        specs["lm_head"] = {"weight": table}
    return specs


def init_params(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Fresh parameters: for small models one draw, cut up in the tree's order, else one draw for each parameter."""
    specs, tree = jax.tree.flatten(param_specs(config), is_leaf=lambda x: isinstance(x, ParamSpec))
    sizes = [0 if spec.std is None else math.prod(spec.shape) for spec in specs]
    if sum(sizes) <= MAX_ONE_DRAW:
        draw = jax.random.normal(key, (sum(sizes),), dtype)
        offsets = itertools.accumulate(sizes, initial=0)
        draws = [draw[at : at + size] for at, size in zip(offsets, sizes, strict=False)]
    else:
        draws = [jax.random.normal(jax.random.fold_in(key, i), spec.shape, dtype) for i, spec in enumerate(specs)]

    def start(spec: ParamSpec, draw: jax.Array) -> jax.Array:
        return jnp.ones(spec.shape, dtype) if spec.std is None else spec.std * draw.reshape(spec.shape)

    return shard_like_params(jax.tree.unflatten(tree, [start(s, d) for s, d in zip(specs, draws, strict=True)]))


def param_shardings(config: ModelConfig, mesh: Mesh) -> Params:
    """Where every parameter of the model lies on the mesh: a tree of shardings."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, fitting_spec(spec.shape, spec.axes, mesh.shape)),
        param_specs(config),
        is_leaf=lambda x: isinstance(x, ParamSpec),
    )


def axes_like_params(path: tuple[Any, ...], ndim: int) -> tuple[Axis, ...]:
    """Mesh axes of a leaf, by the parameter that its path ends with: a gradient, an optimizer moment, a LoRA factor.

    A LoRA factor keeps the axis of the dimension that it shares with its projection: a [L, r, in], b [L, out, r]. What is
    neither lies whole on every device.
    """
    names = tuple(jax.tree_util.keystr(path, simple=True, separator="/").split("/"))
    for length in (2, 1):
        axes = _AXES.get(names[-length:])
        if axes is not None and len(axes) == ndim:
            return axes
    lora = _AXES.get(names[-3:-1])
    if lora is not None and ndim == 3 and names[-1] in ("a", "b"):
        return (None, None, lora[2]) if names[-1] == "a" else (None, lora[1], None)
    return (None,) * ndim


def shard_like_params(tree: Any) -> Any:
    """The tree with every leaf laid out like the parameter that it belongs to; the identity without a mesh."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: constrain(leaf, *axes_like_params(path, leaf.ndim)) if hasattr(leaf, "ndim") else leaf, tree
    )


def _declared_axes() -> Iterator[tuple[tuple[str, ...], tuple[Axis, ...]]]:
    any_shape = ModelConfig(1, 1, 1, 1, 1, 1, 2, tie_embeddings=False)
    leaves, _ = jax.tree_util.tree_flatten_with_path(param_specs(any_shape), is_leaf=lambda x: isinstance(x, ParamSpec))
    for path, spec in leaves:
        yield tuple(jax.tree_util.keystr(path, simple=True, separator="/").split("/")), spec.axes


_AXES = dict(_declared_axes())
