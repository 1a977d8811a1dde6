"""The weights of a Hugging Face folder as files: which tensors there must be, in which file each lies, and saving them.

A folder holds model.safetensors, or model-0000i-of-0000n.safetensors with model.safetensors.index.json; one tensor per
layer and projection, [out, in] as here. `open_checkpoint` checks all of it before a single value is read.
`write_weights` never holds more than one tensor, and leaves a folder that does not load until its caller has written
config.json: a save that is killed never passes for a whole one, and nothing of an earlier save is left.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from afm_rl.config import ModelConfig
from afm_rl.huggingface_config import (
    CONFIG_FILE,
    IncompleteCheckpointError,
    UnsupportedCheckpointError,
    load_config,
    read_json,
    write_json,
)
from afm_rl.parameters import param_specs
from afm_rl.safetensors_file import LazyArray, SafetensorsError, StoredTensor, open_safetensors, write_safetensors
from afm_rl.weights import leaves

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
#: Files of weights are split at this size, as transformers does by default.
MAX_SHARD_BYTES = 5_000_000_000
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_TOP_NAMES = {"embed/weight": _EMBED, "final_norm": "model.norm.weight", "lm_head/weight": _HEAD}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
#: Rows of the two tables of a tied checkpoint that are compared at a time.
_ROWS = 4096
_SHOWN = 5


@dataclass(frozen=True)
class Place:
    """Where one Hugging Face tensor lives in our tree: a whole leaf, or layer `layer` of a stacked one."""

    path: str
    layer: int | None
    shape: tuple[int, ...]


def places(config: ModelConfig) -> dict[str, Place]:
    """Every tensor of the Hugging Face model, by its name there."""
    found: dict[str, Place] = {}
    for path, spec in leaves(param_specs(config)):
        if path in _TOP_NAMES:
            found[_TOP_NAMES[path]] = Place(path, None, spec.shape)
            continue
        name = _LAYER_NAMES[path.removeprefix("layers/")]
        for layer in range(config.num_layers):
            found[f"model.layers.{layer}.{name}.weight"] = Place(path, layer, spec.shape[1:])
    return found


def open_checkpoint(folder: str | os.PathLike[str]) -> tuple[ModelConfig, dict[str, StoredTensor]]:
    """(configuration, every tensor of the model, unread) of a folder, after checking names, shapes and dtypes.

    Raises IncompleteCheckpointError and UnsupportedCheckpointError, naming the file, the key or the tensor.
    """
    folder = Path(folder)
    config = load_config(folder)
    stored: dict[str, StoredTensor] = {}
    for file in _weight_files(folder):
        try:
            found = open_safetensors(file)
        except SafetensorsError as error:
            raise UnsupportedCheckpointError(str(error)) from error
        except PermissionError as error:
            raise IncompleteCheckpointError(f"{file} cannot be read ({error.strerror}); check its permissions") from error
        if twice := sorted(stored.keys() & found.keys()):
            raise UnsupportedCheckpointError(f"{file}: {twice[0]} is in {stored[twice[0]].path.name} too")
        stored |= found
    _check(stored, config, folder)
    return config, stored


def write_weights(
    folder: Path, tensors: Mapping[str, np.ndarray | LazyArray], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write the tensors as one file, or as several of at most `max_shard_bytes` (a larger tensor has one to itself).

    Replaces the weights of an earlier save and removes its config.json, which the caller writes last.
    """
    shards = split(tensors, max_shard_bytes)
    names = [WEIGHTS_FILE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    temporaries = [folder / f".{name}.{os.getpid()}.tmp" for name in names]
    try:
        for shard, temporary in zip(shards, temporaries, strict=True):
            write_safetensors(temporary, shard, metadata={"format": "pt"})
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        for old in folder.glob("model*.safetensors*"):
            old.unlink()
        for name, temporary in zip(names, temporaries, strict=True):
            temporary.replace(folder / name)
    finally:
        for pattern in (".model*.safetensors*.tmp", ".*.json.*.tmp"):  # of earlier saves that were killed, too
            for temporary in folder.glob(pattern):
                temporary.unlink()
    if len(shards) > 1:
        by_tensor = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(_num_bytes(tensor) for tensor in tensors.values())
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(by_tensor.items()))})


def split(tensors: Mapping[str, np.ndarray | LazyArray], max_shard_bytes: int) -> list[dict[str, np.ndarray | LazyArray]]:
    """The tensors, in order, as groups of at most `max_shard_bytes`; a larger one is a group of its own."""
    shards: list[dict[str, np.ndarray | LazyArray]] = [{}]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and _num_bytes(tensor) > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor
        room -= _num_bytes(tensor)
    return shards


def _num_bytes(tensor: np.ndarray | LazyArray) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * np.dtype(tensor.dtype).itemsize


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if not (folder / INDEX_FILE).is_file():
        others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5") for p in folder.glob(pattern))
        found = f"; of {', '.join(others[:_SHOWN])} nothing is read: convert it with transformers" if others else ""
        raise IncompleteCheckpointError(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}{found}")
    index = folder / INDEX_FILE
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnsupportedCheckpointError(f"{index} has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not Path(name).name:
            raise UnsupportedCheckpointError(f"{index}: weight_map[{tensor!r}] must be the name of a file; it is {name!r}")
    files = [folder / Path(name).name for name in sorted(set(weight_map.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise IncompleteCheckpointError(f"{folder} lacks {', '.join(missing)}, which {INDEX_FILE} lists")
    return files


def _check(stored: dict[str, StoredTensor], config: ModelConfig, folder: Path) -> None:
    if config.tie_embeddings and _HEAD in stored and _EMBED in stored and _equal(stored[_HEAD], stored[_EMBED]):
        del stored[_HEAD]  # some tools write the tied table twice
    wanted = places(config)
    problems = [f"{name} is missing" for name in wanted if name not in stored]
    problems += [f"{name} has no place in this architecture" for name in stored if name not in wanted]
    for name in wanted.keys() & stored.keys():
        if stored[name].shape != wanted[name].shape:
            problems.append(f"{name} has shape {stored[name].shape}, config.json says {wanted[name].shape}")
        if stored[name].dtype.name not in _FLOATS:
            problems.append(f"{name} is {stored[name].dtype.name}, only {', '.join(_FLOATS)} are read")
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise UnsupportedCheckpointError(f"{folder}: {'; '.join(sorted(problems)[:_SHOWN])}{more}")


def _equal(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two stored tables hold the same bits."""
    if (a.shape, a.dtype) != (b.shape, b.dtype) or len(a.shape) != 2:
        return False
    blocks = [(slice(at, min(at + _ROWS, a.shape[0])), slice(0, a.shape[1])) for at in range(0, a.shape[0], _ROWS)]
    return all(a.read(block).tobytes() == b.read(block).tobytes() for block in blocks)
