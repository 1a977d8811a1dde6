"""Parameters in flight: a nested dict of arrays as one flat buffer per dtype, its layout and a digest of the bytes.

One contiguous buffer per dtype crosses Ray's object store several times faster than a dict of arrays; the digest is what a
sampler acknowledges before it may generate. bfloat16 travels as uint16, because NumPy-side transports do not know it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from afm_rl.types import Weights


class DigestMismatchError(ValueError):
    """The bytes that arrived are not the bytes that were published."""


def flatten(params: Mapping[str, Any], *, policy: str, version: int) -> Weights:
    """Pack a nested dict of arrays. Leaf order is the sorted path, so equal trees give equal buffers and digests.

    Raises ValueError for a version below 0, which no generator can tell from having no weights.
    """
    if version < 0:
        raise ValueError(f"policy {policy!r}: versions start at 0, got {version}")
    parts: dict[str, list[np.ndarray]] = {}
    offsets: dict[str, int] = {}
    layout = []
    for path, leaf in sorted(leaves(params)):
        array = np.asarray(leaf)
        dtype = array.dtype.name
        flat = np.ascontiguousarray(array).reshape(-1)
        layout.append((path, dtype, tuple(array.shape), offsets.get(dtype, 0)))
        offsets[dtype] = offsets.get(dtype, 0) + flat.size
        parts.setdefault(dtype, []).append(flat.view(np.uint16) if dtype == "bfloat16" else flat)
    buffers = {dtype: np.concatenate(arrays) for dtype, arrays in parts.items()}
    return Weights(policy, version, buffers, tuple(layout), digest_of(buffers, layout))


def unflatten(weights: Weights) -> dict[str, Any]:
    """The nested dict again, as views into the buffers (read-only where the buffers are).

    Raises DigestMismatchError when the bytes do not carry the digest they were published with.
    """
    if (found := digest_of(weights.buffers, weights.layout)) != weights.digest:
        raise DigestMismatchError(
            f"weights of policy {weights.policy!r} version {weights.version} are damaged: digest {found[:12]} "
            f"instead of {weights.digest[:12]}; publish them again"
        )
    flat: dict[str, Any] = {}
    for path, dtype, shape, offset in weights.layout:
        size = int(np.prod(shape, dtype=np.int64))
        values = weights.buffers[dtype][offset : offset + size]
        flat[path] = (values.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else values).reshape(shape)
    return nest(flat)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict whose `leaves` are these paths and values."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def digest(params: Mapping[str, Any]) -> str:
    """SHA-256 over dtype, shape, path and bytes of every leaf."""
    return flatten(params, policy="", version=0).digest


def digest_of(buffers: Mapping[str, np.ndarray], layout: Any) -> str:
    """SHA-256 of flat buffers and their layout."""
    sha = hashlib.sha256(repr([tuple(row) for row in layout]).encode())
    for dtype in sorted(buffers):
        sha.update(np.ascontiguousarray(buffers[dtype]).view(np.uint8).data)
    return sha.hexdigest()


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path with slashes, array) of every leaf of a nested dict."""
    for name, value in tree.items():
        if "/" in name:
            raise ValueError(f"parameter name {name!r} contains a slash")
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value
