"""The safetensors format, streamed: written and hashed in one pass, read as memory maps.

The library's own writer builds the whole file in memory and reports a full disk as its own exception; this one writes
array by array, lets the OSError through (so that a checkpoint can name it) and syncs to the disk. bfloat16 and float8
included. The format: 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, the arrays' bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
#: The library refuses longer headers; so do we, rather than allocate what a damaged length asks for.
_MAX_HEADER_BYTES = 100_000_000


class SafetensorsError(ValueError):
    """The file is not valid safetensors: truncated, damaged or of another format."""


def write_safetensors(
    path: str | os.PathLike[str], arrays: Mapping[str, Any], *, metadata: Mapping[str, str] | None = None
) -> str:
    """Write `arrays` (NumPy or JAX, any shape) and sync them to the disk; returns the file's SHA-256 in hex.

    Raises TypeError for a dtype the format does not have, OSError when the disk refuses.
    """
    order = sorted(arrays, key=lambda name: (-np.dtype(arrays[name].dtype).itemsize, name))
    digest = hashlib.sha256()
    header = _header(order, arrays, metadata)
    with open(path, "wb") as file:
        for data in itertools.chain([memoryview(header)], (_bytes_of(arrays[name]) for name in order)):
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _bytes_of(array: Any) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _header(order: list[str], arrays: Mapping[str, Any], metadata: Mapping[str, str] | None) -> bytes:
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        dtype = np.dtype(arrays[name].dtype)
        if dtype not in _NAMES or name == _METADATA:
            raise TypeError(f"array {name!r} of dtype {dtype} cannot be stored as safetensors; cast or rename it")
        shape = list(arrays[name].shape)
        end = offset + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the arrays aligned in the memory map
    return len(text).to_bytes(8, "little") + text


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Every array of the file as a read-only view of its memory map. Raises SafetensorsError naming file and cause."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise SafetensorsError(f"{path}: truncated or not safetensors ({size} bytes, header of {length})")
            header = json.loads(file.read(length))
        header.pop(_METADATA, None)
        start = 8 + length
        # An empty map is an error in mmap; a file that holds only empty arrays has nothing to map.
        data = np.memmap(path, np.uint8, "r", start) if size > start else np.zeros(0, np.uint8)
        return {name: _view(data, row, f"{path}: array {name!r}") for name, row in header.items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise SafetensorsError(f"{path}: damaged header: {error!r}") from error


def _view(data: np.ndarray, row: Mapping[str, Any], where: str) -> np.ndarray:
    if row["dtype"] not in _DTYPES:
        raise SafetensorsError(f"{where} has dtype {row['dtype']}, which this version does not read")
    dtype, shape, (begin, end) = _DTYPES[row["dtype"]], tuple(row["shape"]), row["data_offsets"]
    expected = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    if not 0 <= begin <= end <= data.size or end - begin != expected:
        raise SafetensorsError(f"{where} lies at bytes {begin}..{end} of {data.size}, expected {expected} bytes")
    return np.asarray(data[begin:end]).view(dtype).reshape(shape)
