"""Files that are verified when they are read: SHA-256 digests and JSON that reaches the disk.

A package travels to other machines; a flipped bit or a cut file must be an error that names the file, never a slightly
different model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afm_rl.errors import UserError


class PackageError(UserError, ValueError):
    """A package or an adapter that is damaged, incomplete or of a kind this version does not read."""


def file_record(path: Path) -> dict[str, Any]:
    """{"sha256", "bytes"} of a file."""
    with open(path, "rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def verify_file(path: Path, record: Mapping[str, Any]) -> None:
    """Raises PackageError unless the file has the recorded size and digest."""
    if not path.is_file():
        raise PackageError(f"{path} is missing: write the package again, or copy all of its files")
    if (size := path.stat().st_size) != record["bytes"]:
        raise PackageError(f"{path} has {size} bytes instead of {record['bytes']}: it is truncated or was replaced")
    if (found := file_record(path)["sha256"]) != record["sha256"]:
        raise PackageError(f"{path} is damaged: SHA-256 {found[:12]} instead of {record['sha256'][:12]}")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write and sync indented JSON."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def write_signed_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with the digest of its own content under "sha256"."""
    content = json.loads(json.dumps(content))  # as it will be read: JSON turns integer keys into strings
    write_json(path, {**content, "sha256": _digest(content)})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises PackageError naming the file if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PackageError(f"{path} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PackageError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise PackageError(f"{path} is damaged: not a JSON object")
    return content


def read_signed_json(path: Path) -> dict[str, Any]:
    """What `write_signed_json` wrote. Raises PackageError naming the file if a byte of it has changed."""
    content = read_json(path)
    if content.pop("sha256", None) != _digest(content):
        raise PackageError(f"{path} is damaged: it does not carry its own SHA-256")
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
