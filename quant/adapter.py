"""LoRA adapters on disk, in the layout of Hugging Face PEFT (paper 5.1): 16-bit values, one small folder per feature.

A folder holds adapter_config.json and adapter_model.safetensors, which PEFT reads and writes, and digests.json, ours:
an adapter that has one is verified when it is read, one from elsewhere is not. What PEFT can express and our model
cannot (DoRA, biases, other target modules, ranks that differ) is refused by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from afm_rl.lora import PROJECTIONS
from afm_rl.safetensors_file import SafetensorsError, read_safetensors, write_safetensors
from quant.digests import (
    PackageError,
    file_record,
    read_json,
    read_signed_json,
    verify_file,
    write_json,
    write_signed_json,
)

CONFIG_FILE, WEIGHTS_FILE, DIGESTS_FILE = "adapter_config.json", "adapter_model.safetensors", "digests.json"

_BLOCK = {name: "self_attn" if name in ("q", "k", "v", "o") else "mlp" for name in PROJECTIONS}
_KEY = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)_proj\.lora_([AB])\.weight")
#: Options of PEFT that change what the weights mean, with the values under which they mean what ours do.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "layers_to_transform": ([], None),
    "lora_bias": (False, None),
}


@dataclass(frozen=True)
class Adapter:
    """An adapter as `afm_rl.lora` knows it: {"layers": {projection: {"a", "b"}}} in NumPy; scale = alpha / rank."""

    params: dict[str, Any]
    rank: int
    alpha: float


def write_adapter(
    folder: str | os.PathLike[str], params: Mapping[str, Any], *, rank: int, alpha: float, dtype: str = "float16"
) -> None:
    """Write a LoRA tree as a PEFT folder; the weights file, which servers look for, comes last.

    Raises ValueError when a factor does not have `rank` or is not finite in `dtype` (16 bits, by the paper).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if unknown := set(params["layers"]) - set(PROJECTIONS):
        raise ValueError(f"an adapter has factors for {', '.join(PROJECTIONS)}; got {', '.join(sorted(unknown))}")
    names = [name for name in PROJECTIONS if name in params["layers"]]
    tensors = _to_tensors({name: params["layers"][name] for name in names}, rank, dtype)
    write_json(folder / CONFIG_FILE, _peft_config(names, rank, alpha))
    temporary = folder / f".{WEIGHTS_FILE}.{os.getpid()}.tmp"
    write_safetensors(temporary, tensors, metadata={"format": "pt"})
    records = {CONFIG_FILE: file_record(folder / CONFIG_FILE), WEIGHTS_FILE: file_record(temporary)}
    write_signed_json(folder / DIGESTS_FILE, {"files": records})
    temporary.replace(folder / WEIGHTS_FILE)


def read_adapter(folder: str | os.PathLike[str], *, dtype: str = "float32") -> Adapter:
    """Read a PEFT folder, its values cast to `dtype`. Raises PackageError naming the file and what is wrong with it."""
    folder = Path(folder)
    if (folder / DIGESTS_FILE).exists():
        for name, record in read_signed_json(folder / DIGESTS_FILE)["files"].items():
            verify_file(folder / name, record)
    config = read_json(folder / CONFIG_FILE)
    for key, allowed in _REQUIRED.items():
        if config.get(key, allowed[-1]) not in allowed:
            raise PackageError(f"{folder / CONFIG_FILE}: {key} = {config[key]!r} is not available in this version")
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        tensors = read_safetensors(folder / WEIGHTS_FILE)
    except (KeyError, TypeError, ValueError, FileNotFoundError, SafetensorsError) as error:
        raise PackageError(f"{folder}: not a readable LoRA adapter: {error!r}") from error
    return Adapter(_from_tensors(tensors, rank, folder / WEIGHTS_FILE, dtype), rank, alpha)


def _to_tensors(layers: Mapping[str, Any], rank: int, dtype: str) -> dict[str, np.ndarray]:
    tensors = {}
    for name, factors in layers.items():
        for factor, letter, rank_axis in (("a", "A", 1), ("b", "B", 2)):
            stacked = np.asarray(factors[factor])
            if stacked.shape[rank_axis] != rank:
                raise ValueError(f"{name}.{factor} {stacked.shape} is not of rank {rank}")
            with np.errstate(over="ignore"):
                cast = stacked.astype(dtype)
            if not np.isfinite(cast.astype(np.float32)).all():
                raise ValueError(f"{name}.{factor} has values that are not finite in {dtype}")
            for layer, matrix in enumerate(cast):
                tensors[_key(layer, name, letter)] = matrix
    return tensors


def _key(layer: int, name: str, letter: str) -> str:
    return f"base_model.model.model.layers.{layer}.{_BLOCK[name]}.{name}_proj.lora_{letter}.weight"


def _peft_config(names: list[str], rank: int, alpha: float) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": [f"{name}_proj" for name in names],
        "use_dora": False,
        "use_rslora": False,
    }


def _from_tensors(tensors: Mapping[str, np.ndarray], rank: int, path: Path, dtype: str) -> dict[str, Any]:
    found: dict[str, dict[str, dict[int, np.ndarray]]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or _BLOCK.get(match[3]) != match[2]:
            raise PackageError(f"{path}: {key} is not a LoRA factor of a projection of this architecture")
        if tensor.ndim != 2 or tensor.shape[0 if match[4] == "A" else 1] != rank:
            raise PackageError(f"{path}: {key} has shape {tensor.shape}, the rank is {rank}")
        found.setdefault(match[3], {}).setdefault(match[4].lower(), {})[int(match[1])] = tensor
    num_layers = 1 + max((layer for by in found.values() for each in by.values() for layer in each), default=-1)
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name in (name for name in PROJECTIONS if name in found):
        layers[name] = {}
        for factor in ("a", "b"):
            by_layer = found[name].get(factor, {})
            if missing := [layer for layer in range(num_layers) if layer not in by_layer]:
                raise PackageError(f"{path}: lora_{factor.upper()} of {name}_proj is missing for layers {missing}")
            layers[name][factor] = np.stack([by_layer[layer] for layer in range(num_layers)]).astype(dtype)
    if not layers:
        raise PackageError(f"{path} holds no LoRA factor")
    return {"layers": layers}
