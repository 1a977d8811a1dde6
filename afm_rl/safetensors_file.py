"""The safetensors format, streamed: written and hashed in one pass, read as memory maps or region by region.

The library's own writer builds the whole file in memory and reports a full disk as its own exception; this one writes
array by array, lets the OSError through (so that a checkpoint can name it) and syncs to the disk. bfloat16 and float8
included. The format: 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, the arrays' bytes.

`read_safetensors` maps a file. `open_safetensors` reads nothing yet: a `StoredTensor` copies the region asked for into
the caller's memory by plain reads, which leave no mapped pages behind, cast in small pieces where the dtypes differ.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from afm_rl.errors import UserError

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
#: Scratch of a read that casts or picks columns: it stays in a core's cache.
_SCRATCH_BYTES = 1 << 20
#: Parts of rows shorter than this are not read one by one: the disk and the page cache work in pages anyway.
_PAGE_BYTES = 4096

Region = tuple[slice, ...]


class SafetensorsError(UserError, ValueError):
    """The file is not valid safetensors: truncated, damaged or of another format."""


def write_safetensors(
    path: str | os.PathLike[str], arrays: Mapping[str, Any], *, metadata: Mapping[str, str] | None = None
) -> str:
    """Write `arrays` (NumPy or JAX, any shape) and sync them to the disk; returns the file's SHA-256 in hex.

    Raises TypeError for a dtype the format does not have, OSError when the disk refuses.
    """
    order = storage_order(arrays)
    digest = hashlib.sha256()
    header = _header(order, arrays, metadata)
    with open(path, "wb") as file:
        for data in itertools.chain([memoryview(header)], (_bytes_of(arrays[name]) for name in order)):
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def storage_order(arrays: Mapping[str, Any]) -> list[str]:
    """The names in the order in which the file holds (and the writer asks for) the arrays."""
    return sorted(arrays, key=lambda name: (-np.dtype(arrays[name].dtype).itemsize, name))


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


@dataclass(frozen=True)
class LazyArray:
    """An array that is made when it is written: shape and dtype are known, `make` gives the values."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.make(), dtype)


@dataclass(frozen=True)
class StoredTensor:
    """One array of a file, not read yet; `offset` is that of its first byte in the file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    def read(self, region: Region | None = None, *, dtype: Any = None) -> np.ndarray:
        """The array (or a region of it) as a fresh one of `dtype`, by default the stored one."""
        shape = self.shape if region is None else tuple(_length(part, n) for part, n in zip(region, self.shape, strict=True))
        target = np.empty(shape, self.dtype if dtype is None else dtype)
        self.read_into(target, region)
        return target

    def read_into(self, target: np.ndarray, region: Region | None = None) -> None:
        """Fill `target` (C-contiguous, of the region's shape, of any float dtype) from the file, reading only the region.

        Regions (slices of step 1) are of vectors and matrices. Raises SafetensorsError when the file has become shorter.
        """
        if not target.flags.c_contiguous:
            raise ValueError(f"{self.name}: the target must be contiguous")
        with open(self.path, "rb", buffering=0) as file:
            if region is None or all(_length(part, n) == n for part, n in zip(region, self.shape, strict=True)):
                self._read_run(file, 0, target.reshape(-1))
            elif len(self.shape) == 1 or _length(region[1], self.shape[1]) == self.shape[1]:
                row = math.prod(self.shape[1:])
                self._read_run(file, (region[0].start or 0) * row, target.reshape(-1))
            else:
                self._read_columns(file, target, region)

    def _read_columns(self, file: FileIO, target: np.ndarray, region: Region) -> None:
        """Part of every row of a matrix: row by row, or whole rows where the parts are less than a page."""
        width, first = self.shape[1], region[0].start or 0
        begin, _, _ = region[1].indices(width)
        if target.shape[1] * self.dtype.itemsize >= _PAGE_BYTES:
            for i, row in enumerate(target):
                self._read_run(file, (first + i) * width + begin, row)
            return
        block = max(1, _SCRATCH_BYTES // (width * self.dtype.itemsize))
        for at in range(0, len(target), block):
            rows = np.empty((min(block, len(target) - at), width), self.dtype)
            self._read_run(file, (first + at) * width, rows.reshape(-1))
            target[at : at + len(rows)] = rows[:, begin : begin + target.shape[1]]

    def _read_run(self, file: FileIO, first: int, target: np.ndarray) -> None:
        """`target.size` consecutive elements from element `first` on."""
        file.seek(self.offset + first * self.dtype.itemsize)
        if target.dtype == self.dtype:
            self._read_bytes(file, target)
            return
        scratch = np.empty(min(target.size, _SCRATCH_BYTES // self.dtype.itemsize), self.dtype)
        for at in range(0, target.size, max(1, scratch.size)):
            part = target[at : at + scratch.size]
            self._read_bytes(file, scratch[: part.size])
            part[...] = scratch[: part.size]

    def _read_bytes(self, file: FileIO, target: np.ndarray) -> None:
        view = memoryview(target.view(np.uint8))  # type: ignore[arg-type]
        while view:
            count = file.readinto(view)
            if not count:
                raise SafetensorsError(f"{self.path}: truncated while array {self.name!r} was read")
            view = view[count:]


def _length(part: slice, size: int) -> int:
    return len(range(*part.indices(size)))


def open_safetensors(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """Every array of the file, unread. Raises SafetensorsError naming file and cause, FileNotFoundError."""
    path = Path(path)
    header, start, size = _read_header(path)
    found = {}
    for name, row in header.items():
        dtype, shape, begin = _checked_row(row, size - start, f"{path}: array {name!r}")
        found[name] = StoredTensor(path, name, shape, dtype, start + begin)
    return found


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Every array of the file as a read-only view of its memory map. Raises SafetensorsError naming file and cause."""
    path = Path(path)
    header, start, size = _read_header(path)
    # An empty map is an error in mmap; a file that holds only empty arrays has nothing to map.
    data = np.memmap(path, np.uint8, "r", start) if size > start else np.zeros(0, np.uint8)
    arrays = {}
    for name, row in header.items():
        dtype, shape, begin = _checked_row(row, data.size, f"{path}: array {name!r}")
        end = begin + dtype.itemsize * math.prod(shape)
        arrays[name] = np.asarray(data[begin:end]).view(dtype).reshape(shape)
    return arrays


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """(rows of the header by name, where the arrays begin, size of the file)."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise SafetensorsError(f"{path}: truncated or not safetensors ({size} bytes, header of {length})")
            header = json.loads(file.read(length))
        header.pop(_METADATA, None)
        return dict(header.items()), 8 + length, size
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise SafetensorsError(f"{path}: damaged header: {error!r}") from error


def _checked_row(row: Mapping[str, Any], size: int, where: str) -> tuple[np.dtype, tuple[int, ...], int]:
    """(dtype, shape, first byte) of one array, out of `size` bytes of data."""
    try:
        name, shape, (begin, end) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
        if name not in _DTYPES:
            raise SafetensorsError(f"{where} has dtype {name}, which this version does not read")
        dtype = _DTYPES[name]
        expected = dtype.itemsize * math.prod(shape)
        if not 0 <= begin <= end <= size or end - begin != expected:
            raise SafetensorsError(
                f"{where} lies at bytes {begin}..{end} of {size}, expected {expected} bytes: truncated or damaged"
            )
    except (KeyError, TypeError) as error:
        raise SafetensorsError(f"{where}: damaged header: {error!r}") from error
    return dtype, shape, begin
