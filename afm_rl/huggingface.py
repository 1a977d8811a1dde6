"""Models in Hugging Face's layout, both ways and exactly: the architecture is theirs called Qwen3ForCausalLM (paper 2).

A folder holds config.json (`huggingface_config.py`), weights (`huggingface_files.py`) and, with a tokenizer, its files:
ours in both forms (tokenizer.model, tokenizer.json), a foreign one's as they were. Loading streams tensor by tensor into
the devices' own memory (`huggingface_stream.py`); saving holds one tensor at a time. What the architecture does not
cover is refused by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from afm_rl.config import ModelConfig
from afm_rl.huggingface_config import (
    CONFIG_FILE,
    GENERATION_FILE,
    IncompleteCheckpointError,
    UnsupportedCheckpointError,
    load_config,
    to_hf_config,
    write_json,
)
from afm_rl.huggingface_files import MAX_SHARD_BYTES, Place, open_checkpoint, places, split, write_weights
from afm_rl.huggingface_stream import StoredLeaf, load_leaf
from afm_rl.model import Transformer
from afm_rl.parameters import Params, param_specs
from afm_rl.safetensors_file import LazyArray, StoredTensor, storage_order
from afm_rl.tokenizer import Tokenizer
from afm_rl.tokenizer_afm import AfmTokenizer
from afm_rl.tokenizer_export import tokenizer_config, tokenizer_json
from afm_rl.weights import leaves, nest

__all__ = [
    "CopiedCheckpoint",
    "IncompleteCheckpointError",
    "UnsupportedCheckpointError",
    "check_vocabulary",
    "copy_pretrained",
    "load_config",
    "load_params",
    "load_pretrained",
    "save_pretrained",
]


@dataclass(frozen=True)
class CopiedCheckpoint:
    """What `copy_pretrained` wrote; `dtype` is the embedding's."""

    config: ModelConfig
    dtype: str
    tensors: int
    weights_bytes: int


def load_pretrained(
    folder: str | os.PathLike[str],
    dtype: str = "float32",
    *,
    shardings: Mapping[str, Any] | Callable[[ModelConfig], Mapping[str, Any]] | None = None,
) -> Transformer:
    """The model of a Hugging Face folder, its weights cast to `dtype`; `model(tokens_BT)` gives float32 logits.

    `shardings`: a tree like `param_specs(config)` with a `jax.sharding.Sharding` at every leaf, or a function from the
    configuration to one; None: all on the default device. Only the regions of this process's devices are read, and at most
    one tensor of the file is on the host beside the arrays. With several processes, each must call it. Raises as
    `load_params`; ValueError where `shardings` is not such a tree.
    """
    config, stored = open_checkpoint(folder)
    tree = shardings(config) if callable(shardings) else shardings
    by_path = dict(leaves(tree)) if tree is not None else {}
    wanted = _stored_leaves(config, stored)
    if tree is not None and by_path.keys() != wanted.keys():
        raise ValueError(f"shardings must have the model's leaves; these differ: {sorted(by_path.keys() ^ wanted.keys())}")
    arrays = {path: load_leaf(leaf, jnp.dtype(dtype), by_path.get(path)) for path, leaf in wanted.items()}
    return Transformer(config, nest(arrays))


def load_params(folder: str | os.PathLike[str], *, dtype: str = "float32") -> tuple[ModelConfig, Params]:
    """(configuration, parameters as NumPy arrays of `dtype`) of a Hugging Face folder.

    Raises IncompleteCheckpointError (a FileNotFoundError) for what is missing and UnsupportedCheckpointError (a
    ValueError), naming the key or the tensor, for what this architecture does not cover.
    """
    config, stored = open_checkpoint(folder)
    arrays = {}
    for path, leaf in _stored_leaves(config, stored).items():
        arrays[path] = np.empty(leaf.shape, jnp.dtype(dtype))
        leaf.read_into(arrays[path], tuple(slice(0, size) for size in leaf.shape))
    return config, nest(arrays)


def save_pretrained(
    params_or_model: Params | Transformer,
    folder: str | os.PathLike[str],
    *,
    config: ModelConfig | None = None,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a policy as a Hugging Face folder, in the dtype its parameters have; config.json comes last.

    Weights of an earlier save go, its tokenizer files only when `tokenizer` brings others. Where the arrays are spread over
    several processes each must call it: tensors are gathered one by one, and process 0 writes. Raises ValueError when
    the parameters are not those of `config` (adapters must be merged, palettized weights dequantised first), or the
    tokenizer's vocabulary is larger than the model's.
    """
    if isinstance(params_or_model, Transformer):
        params, config = params_or_model.params, config or params_or_model.config
    else:
        params = params_or_model
    if config is None:
        raise ValueError("save_pretrained needs config= with a parameter tree (a Transformer carries its own)")
    if tokenizer is not None:
        check_vocabulary(tokenizer, config)
    ours = _checked_leaves(params, config)
    tensors = {name: _lazy(ours[place.path], place) for name, place in places(config).items()}
    spread = any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in ours.values())
    if spread and jax.process_index() != 0:
        _take_part(split(tensors, max_shard_bytes))
    else:
        dtype = np.dtype(ours["embed/weight"].dtype).name
        _write(Path(folder), config, tensors, tokenizer, dtype=dtype, max_shard_bytes=max_shard_bytes)
    if spread:
        multihost_utils.sync_global_devices("save_pretrained")


def copy_pretrained(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_tensor: Callable[[int, int], None] = lambda _done, _total: None,
) -> CopiedCheckpoint:
    """Check a Hugging Face folder and write it again, tensor by tensor, cast to `dtype` (None: each as it is stored).

    `on_tensor(done, total)` is called after each. Raises as `load_params` and `save_pretrained`.
    """
    config, stored = open_checkpoint(source)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config)
    done = 0

    def lazy(tensor: StoredTensor) -> LazyArray:
        wanted = tensor.dtype if dtype is None else jnp.dtype(dtype)

        def make() -> np.ndarray:
            nonlocal done
            done += 1
            on_tensor(done, len(stored))
            return tensor.read(dtype=wanted)

        return LazyArray(tensor.shape, wanted, make)

    tensors = {name: lazy(stored[name]) for name in places(config)}
    found = tensors["model.embed_tokens.weight"].dtype.name
    _write(Path(folder), config, tensors, tokenizer, dtype=found, max_shard_bytes=max_shard_bytes)
    size = sum(int(np.prod(tensor.shape)) * tensor.dtype.itemsize for tensor in tensors.values())
    return CopiedCheckpoint(config, found, len(tensors), size)


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raises UnsupportedCheckpointError when the tokenizer has ids that the model has no row for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UnsupportedCheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model only {config.vocab_size}: not a pair"
        )


def _write(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, LazyArray],
    tokenizer: Tokenizer | None,
    *,
    dtype: str,
    max_shard_bytes: int,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, tensors, max_shard_bytes=max_shard_bytes)
    ends: dict[str, Any] = {}
    if tokenizer is not None:
        tokenizer.save(folder)
        ends = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id}
        if isinstance(tokenizer, AfmTokenizer):
            ends["bos_token_id"] = None
            write_json(folder / "tokenizer.json", tokenizer_json(tokenizer))
            write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, max_positions=config.max_positions))
        if isinstance(tokenizer, AfmTokenizer) or not (folder / GENERATION_FILE).exists():
            stops = {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
            write_json(folder / GENERATION_FILE, stops)
    write_json(folder / CONFIG_FILE, to_hf_config(config, dtype=dtype, ends=ends))


def _stored_leaves(config: ModelConfig, stored: Mapping[str, StoredTensor]) -> dict[str, StoredLeaf]:
    """Every leaf of our tree, by its path, as it lies on the disk."""
    tensors: dict[str, list[StoredTensor]] = {}
    for name, place in places(config).items():  # layers in their order
        tensors.setdefault(place.path, []).append(stored[name])
    specs = dict(leaves(param_specs(config)))
    return {path: StoredLeaf(specs[path].shape, rows, path.startswith("layers/")) for path, rows in tensors.items()}


def _checked_leaves(params: Params, config: ModelConfig) -> dict[str, jax.Array | np.ndarray]:
    """Our leaves by path, after comparing them with what `config` says."""
    specs = dict(leaves(param_specs(config)))
    ours = dict(leaves(params))
    if missing := sorted(set(specs) - set(ours)):
        raise ValueError(f"the parameters lack {', '.join(missing)}")
    if extra := sorted(set(ours) - set(specs)):
        raise ValueError(f"Qwen3ForCausalLM has no place for the parameters {', '.join(extra)}")
    for path, leaf in ours.items():
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise ValueError(f"parameter {path} is a {type(leaf).__name__}: merge adapters or dequantise it first")
        if leaf.shape != specs[path].shape:
            raise ValueError(f"parameter {path} has shape {leaf.shape}, the configuration says {specs[path].shape}")
    return ours


def _lazy(leaf: jax.Array | np.ndarray, place: Place) -> LazyArray:
    return LazyArray(place.shape, np.dtype(leaf.dtype), lambda: _to_host(leaf, place.layer))


def _to_host(leaf: jax.Array | np.ndarray, layer: int | None) -> np.ndarray:
    """A leaf or one layer of it, whole; gathered from every process where it is spread over several."""
    if isinstance(leaf, np.ndarray):
        return leaf if layer is None else leaf[layer]
    tensor = leaf if layer is None else _layer(leaf, layer)
    return np.asarray(multihost_utils.process_allgather(tensor, tiled=True) if not leaf.is_fully_addressable else tensor)


@jax.jit
def _layer(leaf: jax.Array, index: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, index, axis=0, keepdims=False)


def _take_part(shards: Sequence[Mapping[str, np.ndarray | LazyArray]]) -> None:
    """Gather every tensor in the order in which process 0 writes them."""
    for shard in shards:
        for name in storage_order(shard):
            np.asarray(shard[name])
