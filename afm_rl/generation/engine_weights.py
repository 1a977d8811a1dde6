"""Weights as the engine's programs take them: per layer, in the compute type, dequantised; and the bank of LoRA adapters.

Splitting and casting happen once, when weights arrive: no program slices or casts a matrix. Arrays that lie suitably in
memory (a float32 buffer of the object store) are used where they are. A bank holds several adapters side by side, so that
rows of one batch can each use their own: the low-rank products of all adapters are computed together, and each row keeps
only its adapter's part.

Shapes: L layers, A adapters of a bank, r rank, N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from afm_rl.config import ModelConfig
from afm_rl.generation.packed_weight import PackedWeight, cannot_pack, pack
from afm_rl.lora import PROJECTIONS, BankedLora, LoraWeight, projection_shapes
from afm_rl.parameters import Params, ParamSpec, param_specs
from afm_rl.quantized import Int8Embedding, PalettizedWeight


class EngineWeights(NamedTuple):
    """`base`: the parameter tree with "layers" a tuple of per-layer dicts. `bank`: the adapters, or None."""

    base: dict[str, Any]
    bank: Bank | None = None


class Bank(NamedTuple):
    """A adapters: scale_A, 0 where a place is empty, and per layer {projection: (a [A * r, in], b [out, A * r])}."""

    scale_A: jax.Array
    layers: tuple[dict[str, tuple[jax.Array, jax.Array]], ...]


def prepare(params: Params, config: ModelConfig, dtype: Any) -> dict[str, Any]:
    """The tree that `EngineWeights.base` holds. Vectors (norm gains) stay as they are; matrices get the type `dtype`.

    Raises ValueError naming a parameter that is missing or has another shape than the model's.
    """
    found, expected = _shapes(params), _shapes(param_specs(config))
    for name, shape in expected.items():
        if found.get(name) != shape:
            raise ValueError(f"the weights' {name} is {found.get(name, 'missing')}, the model needs {shape}")
    layers = tuple(
        {name: _packed(_matrix(_of_layer(leaf, index), dtype)) for name, leaf in params["layers"].items()}
        for index in range(config.num_layers)
    )
    outer = {k: jax.tree.map(lambda w: _matrix(w, dtype), v, is_leaf=_is_leaf) for k, v in params.items() if k != "layers"}
    output = "embed" if config.tie_embeddings else "lm_head"
    outer[output] = {"weight": _packed(outer[output]["weight"])}
    return {**outer, "layers": layers}


def prepare_finite(params: Mapping[str, Any], config: ModelConfig, dtype: str, *, what: str) -> dict[str, Any]:
    """As `prepare`. Raises ValueError too, which begins with `what`, where a value is not finite."""
    base = prepare(dict(params), config, jnp.dtype(dtype))
    if not bool(_all_finite(base)):
        raise ValueError(f"{what} hold values that are not finite")
    return base


@jax.jit
def _all_finite(params: Any) -> jax.Array:
    floats = [leaf for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]).all()


def embed(base: Mapping[str, Any], token_N: Any) -> jax.Array:
    """The embeddings of tokens, [N, D]; the table may be packed, where it is also the output's."""
    table = base["embed"]["weight"]
    return table.rows(token_N) if isinstance(table, PackedWeight) else jnp.take(table, token_N, axis=0)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: _is_leaf(x) or isinstance(x, ParamSpec))
    return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}


def _is_leaf(leaf: Any) -> bool:
    return isinstance(leaf, PalettizedWeight | Int8Embedding | LoraWeight)


def _of_layer(leaf: Any, index: int) -> Any:
    if isinstance(leaf, LoraWeight):
        return LoraWeight(_of_layer(leaf.base, index), leaf.a[index], leaf.b[index], leaf.scale)
    if isinstance(leaf, PalettizedWeight):
        return PalettizedWeight(leaf.lut[index], leaf.indices[index], leaf.axis, leaf.group_size)
    return leaf[index]


def _matrix(leaf: Any, dtype: Any) -> Any:
    if isinstance(leaf, LoraWeight):
        return LoraWeight(_matrix(leaf.base, dtype), _matrix(leaf.a, dtype), _matrix(leaf.b, dtype), leaf.scale)
    if isinstance(leaf, PalettizedWeight | Int8Embedding):
        leaf = leaf.dequantize()
    if leaf.ndim < 2 or leaf.dtype == dtype:
        return _placed(leaf)
    return jnp.asarray(leaf).astype(dtype)


def _packed(leaf: Any) -> Any:
    """Laid out for the compiled product, where this machine has it."""
    if isinstance(leaf, LoraWeight):
        return LoraWeight(_packed(leaf.base), leaf.a, leaf.b, leaf.scale)
    return leaf if leaf.ndim < 2 or cannot_pack(leaf) is not None else pack(leaf)


def _placed(leaf: Any) -> jax.Array:
    """On the device. What nobody can write (a message from the object store) is used where it lies, if the device can."""
    if isinstance(leaf, np.ndarray) and not leaf.flags.writeable:
        return jax.device_put(leaf, may_alias=True)
    return jnp.asarray(leaf)


class AdapterBank:
    """Up to `places` adapters of rank up to `rank`, on the host; `device` gives the arrays that the programs take."""

    def __init__(self, config: ModelConfig, *, places: int, rank: int, dtype: Any) -> None:
        self._rank, self._dtype = rank, dtype
        self._scale_A = np.zeros(places, np.float32)
        self._layers = [
            {
                name: (np.zeros((places * rank, fan_in), np.float32), np.zeros((out, places * rank), np.float32))
                for name, (out, fan_in) in projection_shapes(config).items()
            }
            for _ in range(config.num_layers)
        ]
        self.names: list[str | None] = [None] * places

    def put(self, name: str, lora: Mapping[str, Any], *, alpha: float, rank: int) -> int:
        """Give an adapter a place (its own again, if it has one); returns the place.

        Raises ValueError for an adapter that does not fit the model or the bank, is not finite, or finds no place.
        """
        self._check(name, lora, rank)
        place = self.names.index(name) if name in self.names else self._free_place(name)
        self.drop(name)
        at = slice(place * self._rank, place * self._rank + rank)
        for projection, factors in lora["layers"].items():
            for index, layer in enumerate(self._layers):
                a, b = layer[projection]
                a[at] = np.asarray(factors["a"][index], np.float32)
                b[:, at] = np.asarray(factors["b"][index], np.float32)
        self._scale_A[place], self.names[place] = alpha / rank, name
        return place

    def drop(self, name: str) -> None:
        """Free an adapter's place, if it has one."""
        if name not in self.names:
            return
        place = self.names.index(name)
        at = slice(place * self._rank, (place + 1) * self._rank)
        for layer in self._layers:
            for a, b in layer.values():
                a[at], b[:, at] = 0.0, 0.0
        self._scale_A[place], self.names[place] = 0.0, None

    def device(self) -> Bank:
        """A copy of everything, on the device."""
        copy = lambda array: jnp.array(array, self._dtype, copy=True)
        layers = tuple({name: (copy(a), copy(b)) for name, (a, b) in layer.items()} for layer in self._layers)
        return Bank(jnp.array(self._scale_A, copy=True), layers)

    def _free_place(self, name: str) -> int:
        if None not in self.names:
            raise ValueError(
                f"adapter {name!r}: all {len(self.names)} places are taken by {', '.join(map(str, self.names))}; "
                "drop one or raise max_adapters"
            )
        return self.names.index(None)

    def _check(self, name: str, lora: Mapping[str, Any], rank: int) -> None:
        if not 1 <= rank <= self._rank:
            raise ValueError(
                f"adapter {name!r} has rank {rank}; this engine holds ranks 1 to {self._rank} (max_adapter_rank)"
            )
        for projection, factors in lora["layers"].items():
            if projection not in PROJECTIONS:
                raise ValueError(
                    f"adapter {name!r} has weights for {projection!r}; the projections: {', '.join(PROJECTIONS)}"
                )
            (a, b), L = self._layers[0][projection], len(self._layers)
            expected = {"a": (L, rank, a.shape[1]), "b": (L, b.shape[0], rank)}
            for factor, shape in expected.items():
                if tuple(factors[factor].shape) != shape:
                    found = tuple(factors[factor].shape)
                    raise ValueError(f"adapter {name!r}: {factor} of {projection!r} is {found}, the model needs {shape}")
                if not np.isfinite(np.asarray(factors[factor], np.float32)).all():
                    raise ValueError(f"adapter {name!r} holds values that are not finite ({factor} of {projection!r})")


def with_adapters(weights: EngineWeights, adapter_N: jax.Array) -> tuple[dict[str, Any], ...]:
    """The layers as the model takes them; token n uses adapter `adapter_N[n]`, or none where that is -1."""
    layers: tuple[dict[str, Any], ...] = weights.base["layers"]
    if weights.bank is None:
        return layers
    places = weights.bank.scale_A.shape[0]
    own_NA = jnp.where(adapter_N[:, None] == jnp.arange(places), weights.bank.scale_A, 0.0)
    rank = weights.bank.layers[0]["q"][0].shape[0] // places
    share_NR = jnp.repeat(own_NA, rank, axis=1)
    return tuple(
        {**layer, **{name: BankedLora(layer[name], a, b, share_NR) for name, (a, b) in factors.items()}}
        for layer, factors in zip(layers, weights.bank.layers, strict=True)
    )
