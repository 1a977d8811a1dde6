"""LoRA adapters (paper 5.1) on every linear projection of self-attention and of the feed-forward network.

An adapter is a nested dict of its own, {"layers": {"q": {"a": [L, r, in], "b": [L, out, r]}, ...}}: that is what is
trained, stored and swapped. `attach` pairs it with the projections of a base model, plain or palettized, as
`LoraWeight` leaves, on which the model's `dense` dispatches; the base is shared, never copied.

Shapes: L layers, r rank, in/out as the projection's weight [L, out, in].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afm_rl.config import ModelConfig
from afm_rl.quantized import PalettizedWeight

#: Every linear projection of a layer, in the order of the forward pass.
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@partial(jax.tree_util.register_dataclass, data_fields=["base", "a", "b"], meta_fields=["scale"])
@dataclass(frozen=True)
class LoraWeight:
    """A projection with an adapter: W = base + scale * b @ a.

    base [(L,) out, in] (an array, a PalettizedWeight or another LoraWeight), a [(L,) r, in], b [(L,) out, r];
    scale = alpha / rank.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight it stands for."""
        return tuple(self.base.shape)


@partial(jax.tree_util.register_dataclass, data_fields=["base", "a", "b", "share"], meta_fields=[])
@dataclass(frozen=True)
class BankedLora:
    """One layer's projection with several adapters side by side, of which each of N tokens uses its own (or none).

    base [out, in], a [A * r, in], b [out, A * r]; share [N, A * r] is the scale in the columns of a token's adapter and 0
    in all others.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    share: jax.Array


def projection_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of every projection of one layer."""
    q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "q": (q_dim, config.dim),
        "k": (kv_dim, config.dim),
        "v": (kv_dim, config.dim),
        "o": (config.dim, q_dim),
        "gate": (config.ffn_dim, config.dim),
        "up": (config.ffn_dim, config.dim),
        "down": (config.dim, config.ffn_dim),
    }


def init_lora(config: ModelConfig, rank: int, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, Any]:
    """A fresh adapter: a normal with std 1/sqrt(in), b zero, so that attaching it changes nothing.

    Raises ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"the rank of a LoRA adapter must be at least 1, got {rank}")
    L, shapes = config.num_layers, projection_shapes(config)
    # One draw, cut up: a draw per shape would compile the generator seven times.
    ends = np.cumsum([L * rank * fan_in for _, fan_in in shapes.values()])
    draws = jnp.split(jax.random.normal(key, (int(ends[-1]),), dtype), ends[:-1])
    layers = {}
    for (name, (out, fan_in)), draw in zip(shapes.items(), draws, strict=True):
        a = fan_in**-0.5 * draw.reshape(L, rank, fan_in)
        layers[name] = {"a": a, "b": jnp.zeros((L, out, rank), dtype)}
    return {"layers": layers}


def attach(params: Mapping[str, Any], lora: Mapping[str, Any], *, alpha: float, rank: int) -> dict[str, Any]:
    """`params` with the adapted projections as LoraWeight leaves of scale alpha / rank; no array is copied.

    An adapter may cover some of the projections. Raises ValueError for one that names no projection of the model, or
    whose shapes do not fit it or `rank`.
    """
    layers = dict(params["layers"])
    for name, factors in lora["layers"].items():
        if name not in PROJECTIONS or name not in layers:
            raise ValueError(f"the adapter has weights for {name!r}; the projections are: {', '.join(PROJECTIONS)}")
        base, a, b = layers[name], factors["a"], factors["b"]
        *lead, out, fan_in = base.shape
        if tuple(a.shape) != (*lead, rank, fan_in) or tuple(b.shape) != (*lead, out, rank):
            raise ValueError(
                f"adapter of rank {rank} does not fit projection {name!r} {tuple(base.shape)}: "
                f"a is {tuple(a.shape)}, b is {tuple(b.shape)}"
            )
        layers[name] = LoraWeight(base, a, b, alpha / rank)
    return {**params, "layers": layers}


def merge(params: Any) -> Any:
    """Every LoraWeight folded into one float32 array, palettized bases dequantised; other leaves untouched."""
    return jax.tree.map(lambda leaf: _fold(leaf) if _is_lora(leaf) else leaf, params, is_leaf=_is_lora)


def _is_lora(leaf: Any) -> bool:
    return isinstance(leaf, LoraWeight)


def _fold(leaf: Any) -> jax.Array:
    if isinstance(leaf, LoraWeight):
        a, b = leaf.a.astype(jnp.float32), leaf.b.astype(jnp.float32)
        return _fold(leaf.base) + leaf.scale * jnp.matmul(b, a, precision="highest")
    return leaf.dequantize() if isinstance(leaf, PalettizedWeight) else jnp.asarray(leaf, jnp.float32)
