"""Checkpoints that survive a kill at any moment: one folder per step, complete or absent, checked before it is used.

`folder/step-000000000012/` holds arrays.safetensors and metadata.json (which carries the arrays' SHA-256 and its own).
It is written under a temporary name, every file synced, renamed, and the parent synced. A damaged newest checkpoint is
logged and the one before it used. Any pytree: nested dicts, tuples, optax states, Python scalars, bfloat16, typed PRNG
keys. One writer a folder.

The paper does not describe its checkpoints; the requirement (exact resume, one truth about what was consumed) is ours.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afm_rl.errors import UserError
from afm_rl.safetensors_file import SafetensorsError, read_safetensors, write_safetensors

logger = logging.getLogger(__name__)

ARRAYS_FILE = "arrays.safetensors"
METADATA_FILE = "metadata.json"
FORMAT = "afm-rl checkpoint 1"
#: What a killed `save` may leave: half a folder, or a whole one set aside for its successor, which still counts.
_TEMPORARY, _ASIDE, _REMOVING = ".writing-", ".aside-", ".removing-"
_NAME = re.compile(rf"({re.escape(_ASIDE)})?step-(\d{{12,}})")


class CheckpointError(UserError, RuntimeError):
    """A checkpoint could not be written, or none of those present can be used."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint whose bytes were verified. `metadata` is what `save` was given, as JSON gives it back."""

    folder: Path
    step: int
    metadata: dict[str, Any]
    leaves: dict[str, dict[str, Any]] = field(repr=False)  # tree path -> {kind, and the value of a Python scalar}


def save(
    folder: str | os.PathLike[str], *, step: int, tree: Any, metadata: Mapping[str, Any] | None = None, keep: int = 2
) -> Path:
    """Write `tree` as the checkpoint of `step` (replacing one of the same step) and keep the `keep` newest.

    Returns the checkpoint's folder. Raises CheckpointError when the disk is full (what was there stays) or a later
    checkpoint exists, TypeError when a leaf or `metadata` cannot be stored.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"checkpoint.save needs step >= 0 and keep >= 1, got step {step}, keep {keep}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _clean_up(folder)
    _refuse_or_drop_later(folder, step)
    final = folder / f"step-{step:012d}"
    temporary = folder / f"{_TEMPORARY}{final.name}"
    try:
        _write(temporary, step, tree, metadata)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(_disk_full(folder, step)) from error
        raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _publish(temporary, final)
    for old in _newest_first(folder)[keep:]:
        _remove(old)
    return final


def latest(folder: str | os.PathLike[str]) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None when there is none at all; logs a warning for each damaged one.

    Raises CheckpointError when checkpoints exist and every one is damaged: starting over silently would lose the run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    paths = _newest_first(folder)
    for path in paths:
        try:
            return _open(path)
        except (CheckpointError, OSError) as error:
            logger.warning("checkpoint %s is damaged and not used: %s", path, error)
    if paths:
        raise CheckpointError(
            f"none of the {len(paths)} checkpoints in {folder} is whole (see the warnings above); "
            "restore the folder from a copy, or delete it to start again"
        )
    return None


def restore(checkpoint: Checkpoint, *, like: Any) -> Any:
    """The saved tree, with the structure of `like`; its leaves say what is expected.

    An array leaf must agree in shape and dtype; where `like` holds a jax.Array or jax.ShapeDtypeStruct the result is a
    jax.Array (with its sharding), else NumPy; Python scalars come back as themselves.
    Raises CheckpointError naming every leaf that is missing, unexpected or different.
    """
    wanted, structure = jax.tree_util.tree_flatten_with_path(like)
    paths = [jax.tree_util.keystr(path) for path, _ in wanted]
    problems = [f"{path} is not in the checkpoint" for path in paths if path not in checkpoint.leaves]
    problems += [f"{path} is in the checkpoint only" for path in checkpoint.leaves if path not in set(paths)]
    arrays = read_safetensors(checkpoint.folder / ARRAYS_FILE)
    leaves = []
    for path, (_, leaf) in zip(paths, wanted, strict=True):
        if path in checkpoint.leaves:
            problem = _difference(checkpoint.leaves[path], arrays.get(path), leaf)
            problems += [f"{path} {problem}"] if problem else []
            leaves.append(None if problem else _from_stored(checkpoint.leaves[path], arrays.get(path), leaf))
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(f"{checkpoint.folder} does not fit the tree to restore: {shown}")
    return jax.tree_util.tree_unflatten(structure, leaves)


def _write(temporary: Path, step: int, tree: Any, metadata: Mapping[str, Any] | None) -> None:
    temporary.mkdir()
    leaves: dict[str, dict[str, Any]] = {}
    arrays: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path)
        leaves[name], array = _to_stored(name, leaf)
        if array is not None:
            arrays[name] = array
    arrays_sha256 = write_safetensors(temporary / ARRAYS_FILE, arrays)
    body = {
        "format": FORMAT,
        "step": step,
        "metadata": _through_json(metadata or {}),
        "arrays_sha256": arrays_sha256,
        "leaves": leaves,
    }
    text = json.dumps({"sha256": _sha256_of(body), "body": body}, indent=1)
    with open(temporary / METADATA_FILE, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(temporary)


def _through_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What reading will give: the digest must be of that (JSON turns integer keys into strings, tuples into lists)."""
    try:
        return json.loads(json.dumps(dict(metadata)))
    except TypeError as error:
        raise TypeError(f"the metadata of the checkpoint is not JSON: {error}") from error


def _to_stored(name: str, leaf: Any) -> tuple[dict[str, Any], Any]:
    """(what metadata.json says of a leaf, its array or None)."""
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return {"kind": "key", "dtype": str(leaf.dtype), "impl": str(jax.random.key_impl(leaf))}, jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        return {"kind": "array"}, leaf
    if isinstance(leaf, bool | int | float | str):
        return {"kind": type(leaf).__name__, "value": leaf}, None
    raise TypeError(f"leaf {name} is a {type(leaf).__name__}; a checkpoint holds arrays, PRNG keys and Python scalars")


def _from_stored(row: Mapping[str, Any], array: np.ndarray | None, like: Any) -> Any:
    if array is None:
        return row["value"]
    if row["kind"] == "key":
        return jax.random.wrap_key_data(jnp.array(array), impl=row["impl"])
    if isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        sharding = like.sharding
        # On one device the array stays uncommitted, as fresh ones are: a committed one could not meet other devices'.
        several = sharding is not None and len(sharding.device_set) > 1
        return jax.device_put(np.array(array), sharding) if several else jnp.array(array)
    return array[()].copy() if isinstance(like, np.generic) else np.array(array)


def _difference(row: Mapping[str, Any], array: np.ndarray | None, like: Any) -> str | None:
    """Why a stored leaf cannot take the place of `like`, or None."""
    if array is None and row["kind"] in ("array", "key"):
        return f"has no array in {ARRAYS_FILE}"
    is_key = hasattr(like, "dtype") and jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key)
    wanted = "key" if is_key else "array" if hasattr(like, "dtype") else type(like).__name__
    if row["kind"] != wanted:
        return f"is stored as {row['kind']}, expected {wanted}"
    if wanted == "key":
        return None if row["dtype"] == str(like.dtype) else f"is a {row['dtype']}, expected {like.dtype}"
    if wanted == "array" and array is not None and (array.shape, array.dtype) != (like.shape, np.dtype(like.dtype)):
        return f"is {array.dtype}{list(array.shape)}, expected {like.dtype}{list(like.shape)}"
    return None


def _open(path: Path) -> Checkpoint:
    """The checkpoint at `path`, every byte verified. Raises CheckpointError with the reason, or OSError."""
    try:
        document = json.loads((path / METADATA_FILE).read_text(encoding="utf-8"))
        body = document["body"]
        if document["sha256"] != _sha256_of(body):
            raise CheckpointError(f"{METADATA_FILE} does not carry its own SHA-256")
        if body["format"] != FORMAT:
            raise CheckpointError(f"its format is {body['format']!r}, this version reads {FORMAT!r}")
        with open(path / ARRAYS_FILE, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != body["arrays_sha256"]:
            raise CheckpointError(f"{ARRAYS_FILE} has SHA-256 {found[:12]}, expected {body['arrays_sha256'][:12]}")
        read_safetensors(path / ARRAYS_FILE)
        return Checkpoint(path, body["step"], body["metadata"], body["leaves"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, SafetensorsError) as error:
        raise CheckpointError(f"{METADATA_FILE} or {ARRAYS_FILE} is unreadable: {error!r}") from error


def _sha256_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _newest_first(folder: Path) -> list[Path]:
    found = [(int(match[2]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]  # ".aside-step-N" sorts below its successor "step-N"


def _refuse_or_drop_later(folder: Path, step: int) -> None:
    """A resumed run moves forward: what lies ahead of it is either damaged (dropped) or another run's (refused)."""
    for path in _newest_first(folder):
        if path.name <= f"step-{step:012d}":
            return
        try:
            _open(path)
        except (CheckpointError, OSError) as error:
            logger.warning("damaged checkpoint %s is removed, step %d takes over: %s", path, step, error)
            _remove(path)
        else:
            raise CheckpointError(
                f"cannot save step {step}: {path} is later. Resume from it, or delete the checkpoints after step {step}"
            )


def _publish(temporary: Path, final: Path) -> None:
    """Give a complete folder its name; one of the same name is set aside first and removed last."""
    aside = final.with_name(_ASIDE + final.name)
    if final.exists():
        final.rename(aside)
    temporary.rename(final)
    _sync_folder(final.parent)
    if aside.exists():
        _remove(aside)


def _clean_up(folder: Path) -> None:
    """Finish or undo what a killed `save` left half done (the writer only: a reader changes nothing)."""
    for path in list(folder.iterdir()):
        final = folder / path.name.removeprefix(_ASIDE)
        if path.name.startswith((_TEMPORARY, _REMOVING)):
            shutil.rmtree(path)
        elif path.name.startswith(_ASIDE) and final.exists():
            _remove(path)
        elif path.name.startswith(_ASIDE):
            path.rename(final)


def _remove(path: Path) -> None:
    """Renamed before it is emptied, so that no kill leaves half a folder under a checkpoint's name."""
    doomed = path.with_name(_REMOVING + path.name.removeprefix(_ASIDE))
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_full(folder: Path, step: int) -> str:
    before = _newest_first(folder)
    kept = f"{before[0].name} is untouched" if before else "there is no earlier one"
    return (
        f"no space left on the disk of {folder} while writing the checkpoint of step {step} "
        f"({shutil.disk_usage(folder).free / 2**20:.0f} MiB free); {kept}. Free some space, then resume the run"
    )
