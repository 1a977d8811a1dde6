"""The compressed model as a folder (paper 5.2): palettized projections, int8 embedding, tokenizer and adapters.

    manifest.json            shape, bits of every operation, sizes, SHA-256 of every file (and of itself)
    palettized.safetensors   per operation: packed indices and lookup table; int8 embedding and scales; norms
    tokenizer.model          or the files of a foreign tokenizer
    adapters/NAME/           LoRA adapters in PEFT's layout (`quant/adapter.py`), added and replaced at any time

Indices are packed at their own width, lowest bits first. The layout is ours: the paper's runs on Apple's Neural Engine.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from afm_rl.config import ModelConfig
from afm_rl.lora import PROJECTIONS, projection_shapes
from afm_rl.quantized import Int8Embedding
from afm_rl.safetensors_file import SafetensorsError, read_safetensors, write_safetensors
from afm_rl.tokenizer import Tokenizer
from quant.adapter import Adapter, read_adapter, write_adapter
from quant.digests import PackageError, file_record, read_signed_json, verify_file, write_signed_json
from quant.operations import operation_name, operation_names
from quant.palettize import Palettized
from quant.recovery import stack, unstack

__all__ = [
    "Adapter",
    "Package",
    "PackageError",
    "is_package",
    "read_adapter",
    "read_package",
    "write_adapter",
    "write_package",
]

FORMAT = "afm-rl palettized package, version 1"
MANIFEST_FILE, WEIGHTS_FILE = "manifest.json", "palettized.safetensors"
_NORMS = ("attn_norm", "q_norm", "k_norm", "mlp_norm")


@dataclass(frozen=True)
class Package:
    """A package in memory: `params` with PalettizedWeight and Int8Embedding leaves (NumPy arrays inside).

    `bits_per_weight` is that of the projections, tables included; `file_bits_per_weight` counts the whole weights file
    against every parameter of the model.
    """

    params: dict[str, Any]
    config: ModelConfig
    bits: dict[str, int]
    bits_per_weight: float
    file_bits_per_weight: float
    manifest: dict[str, Any]


def is_package(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder holds a package (it has a manifest)."""
    return (Path(folder) / MANIFEST_FILE).is_file()


def write_package(
    folder: str | os.PathLike[str],
    *,
    params: Mapping[str, Any],
    config: ModelConfig,
    bits: Mapping[str, int],
    tokenizer: Tokenizer | None = None,
    details: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a quantised tree (`quant.recovery.quantize_params`) as a package; returns the manifest.

    Replaces what is there, whole or not at all (its adapters go too: they belong to the old base). `bits` is of every
    operation; `details` (JSON) is kept in the manifest, e.g. the target and the error table. Raises ValueError when the
    tree is not quantised or does not fit `config` and `bits`.
    """
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        manifest = _write(temporary, params, config, bits, tokenizer, dict(details or {}))
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def read_package(folder: str | os.PathLike[str]) -> Package:
    """Read and verify a package. Raises PackageError naming the file that is missing, damaged or of another version."""
    folder = Path(folder)
    manifest = read_signed_json(folder / MANIFEST_FILE)
    if manifest.get("format") != FORMAT:
        raise PackageError(f"{folder / MANIFEST_FILE}: format {manifest.get('format')!r}, this version reads {FORMAT!r}")
    for name, record in manifest["files"].items():
        verify_file(folder / name, record)
    config = ModelConfig(**manifest["config"])
    bits = {name: int(row["bits"]) for name, row in manifest["operations"].items()}
    try:
        arrays = read_safetensors(folder / WEIGHTS_FILE)
        params = _to_params(arrays, config, bits, axis=manifest["axis"], group_size=manifest["group_size"])
    except (SafetensorsError, KeyError, ValueError) as error:
        raise PackageError(f"{folder / WEIGHTS_FILE} does not hold what its manifest says: {error}") from error
    sizes = manifest["bits_per_weight"]
    return Package(params, config, bits, sizes["projections"], sizes["file"], manifest)


def pack_indices(indices: np.ndarray, bits: int) -> np.ndarray:
    """uint8 indices below 2**bits -> bytes, `bits` bits each, lowest first, the last byte filled up with zeros."""
    flat = indices.reshape(-1, 1)
    if flat.size and int(flat.max()) >= 2**bits:
        raise ValueError(f"index {int(flat.max())} does not fit in {bits} bits")
    return np.packbits(np.unpackbits(flat, axis=1, bitorder="little")[:, :bits].reshape(-1), bitorder="little")


def unpack_indices(packed: np.ndarray, *, bits: int, shape: tuple[int, int]) -> np.ndarray:
    """The inverse of `pack_indices` -> uint8 of `shape`."""
    count = shape[0] * shape[1]
    if packed.size != -(-count * bits // 8):
        raise ValueError(f"{packed.size} bytes do not hold {count} indices of {bits} bits")
    single = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    return np.packbits(single, axis=1, bitorder="little").reshape(shape)


def _write(
    folder: Path,
    params: Mapping[str, Any],
    config: ModelConfig,
    bits: Mapping[str, int],
    tokenizer: Tokenizer | None,
    details: dict[str, Any],
) -> dict[str, Any]:
    operations = _unstacked(params, config, bits)
    write_safetensors(folder / WEIGHTS_FILE, _to_arrays(params, operations), metadata={"format": FORMAT})
    if tokenizer is not None:
        tokenizer.save(folder)
    files = {path.name: file_record(path) for path in sorted(folder.iterdir())}
    any_operation = next(iter(operations.values()))
    weights = sum(p.indices.size for p in operations.values())
    manifest = {
        "format": FORMAT,
        "config": dataclasses.asdict(config),
        "axis": any_operation.axis,
        "group_size": any_operation.group_size,
        "bits_per_weight": {
            "projections": sum(p.storage_bits for p in operations.values()) / weights,
            "file": files[WEIGHTS_FILE]["bytes"] * 8 / config.num_params,
        },
        "operations": {
            name: {"bits": p.bits, "shape": list(p.shape), "bits_per_weight": p.bits_per_weight}
            for name, p in operations.items()
        },
        "details": details,
        "files": files,
    }
    write_signed_json(folder / MANIFEST_FILE, manifest)
    return manifest


def _unstacked(params: Mapping[str, Any], config: ModelConfig, bits: Mapping[str, int]) -> dict[str, Palettized]:
    if missing := [name for name in operation_names(config.num_layers) if name not in bits]:
        raise ValueError(f"no bits are given for {', '.join(missing[:5])}")
    by_projection = {}
    for projection, shape in projection_shapes(config).items():
        leaf = params["layers"][projection]
        if not hasattr(leaf, "indices") or tuple(leaf.shape) != (config.num_layers, *shape):
            raise ValueError(f"layers.{projection} must be palettized, with shape {(config.num_layers, *shape)}")
        widths = [bits[operation_name(layer, projection)] for layer in range(config.num_layers)]
        by_projection[projection] = unstack(leaf, widths)
    return {
        operation_name(layer, projection): by_projection[projection][layer]
        for layer in range(config.num_layers)
        for projection in PROJECTIONS
    }


def _to_arrays(params: Mapping[str, Any], operations: Mapping[str, Palettized]) -> dict[str, np.ndarray]:
    arrays = {f"layers.{name}": np.asarray(params["layers"][name]) for name in _NORMS}
    arrays["final_norm"] = np.asarray(params["final_norm"])
    for table in ("embed", "lm_head"):
        if table in params:
            leaf = params[table]["weight"]
            if not isinstance(leaf, Int8Embedding):
                raise ValueError(f"{table}.weight must be an Int8Embedding")
            arrays[f"{table}.values"], arrays[f"{table}.scale"] = np.asarray(leaf.values), np.asarray(leaf.scale)
    for name, palettized in operations.items():
        arrays[f"{name}.lut"] = palettized.lut
        arrays[f"{name}.indices"] = pack_indices(palettized.indices, palettized.bits)
    return arrays


def _to_params(
    arrays: Mapping[str, np.ndarray], config: ModelConfig, bits: Mapping[str, int], *, axis: int, group_size: int
) -> dict[str, Any]:
    layers: dict[str, Any] = {name: arrays[f"layers.{name}"] for name in _NORMS}
    for projection, shape in projection_shapes(config).items():
        groups = -(-shape[axis] // group_size)
        matrices = []
        for name in (operation_name(layer, projection) for layer in range(config.num_layers)):
            lut = arrays[f"{name}.lut"]
            if lut.shape != (groups, 2 ** bits[name]):
                raise ValueError(f"{name}.lut has shape {lut.shape}, expected {(groups, 2 ** bits[name])}")
            indices = unpack_indices(arrays[f"{name}.indices"], bits=bits[name], shape=shape)
            matrices.append(Palettized(lut, indices, bits[name], axis, group_size))
        layers[projection] = stack(matrices)
    params: dict[str, Any] = {"layers": layers, "final_norm": arrays["final_norm"]}
    for table in ("embed",) if config.tie_embeddings else ("embed", "lm_head"):
        values, scale = arrays[f"{table}.values"], arrays[f"{table}.scale"]
        if values.shape != (config.vocab_size, config.dim) or scale.shape != values.shape[:1]:
            raise ValueError(f"{table} has shapes {values.shape} and {scale.shape}")
        params[table] = {"weight": Int8Embedding(values, scale)}  # type: ignore[arg-type]
    return params
