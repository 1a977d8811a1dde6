"""What a checkpoint is on the disk: its names, the manifest that makes it whole, its publication and its end.

`folder/step-000000000012/` holds `arrays/` (orbax), metadata.json, one file per data iterator, and manifest.json: the size
and SHA-256 of every other file, and its own. The manifest is written last, under a temporary name of the folder; then
everything is synced and the folder renamed. So a folder under a checkpoint's name whose manifest does not hold is damaged,
whatever happened to it. One writer a folder.

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
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afm_rl.errors import UserError

logger = logging.getLogger(__name__)

ARRAYS_FOLDER = "arrays"
METADATA_FILE = "metadata.json"
MANIFEST_FILE = "manifest.json"
FORMAT = "afm-rl checkpoint 2"
#: What a killed writer may leave: half a folder, or a whole one set aside for its successor, which still counts.
_TEMPORARY, _ASIDE, _REMOVING = ".writing-", ".aside-", ".removing-"
_NAME = re.compile(rf"({re.escape(_ASIDE)})?step-(\d{{12,}})")
_DISK_FULL = ("no space left on device", "disk quota exceeded")


class CheckpointError(UserError, RuntimeError):
    """A checkpoint could not be written, or none of those present can be used."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint whose bytes were verified. `metadata` is what `save` was given, as JSON gives it back."""

    folder: Path
    step: int
    metadata: dict[str, Any]
    leaves: dict[str, dict[str, Any]] = field(repr=False)  # tree path -> {kind, shape and dtype, or a scalar's value}


def open_whole(path: Path) -> Checkpoint:
    """The checkpoint at `path`, every byte verified. Raises CheckpointError with the reason, or OSError."""
    try:
        document = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
        manifest = document["body"]
        if document["sha256"] != _sha256_of(manifest):
            raise CheckpointError(f"{MANIFEST_FILE} does not carry its own SHA-256")
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"its format is {manifest['format']!r}, this version reads {FORMAT!r}")
        _verify_files(path, manifest["files"])
    except FileNotFoundError as error:
        raise CheckpointError(f"it has no {Path(error.filename).relative_to(path)}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{MANIFEST_FILE} is unreadable: {error!r}") from error
    return open_verified(path)


def open_verified(path: Path) -> Checkpoint:
    """The checkpoint at `path`, which another process has verified a moment ago."""
    body = json.loads((path / METADATA_FILE).read_text(encoding="utf-8"))
    return Checkpoint(path, body["step"], body["metadata"], body["leaves"])


def _verify_files(path: Path, files: Mapping[str, Any]) -> None:
    for name, (size, _) in files.items():
        if (found := (path / name).stat().st_size) != size:
            raise CheckpointError(f"{name} has {found} bytes, expected {size}")
    for name, digest in _digests(path, files):
        if digest != files[name][1]:
            raise CheckpointError(f"{name} has SHA-256 {digest[:12]}, expected {files[name][1][:12]}")


def _digests(path: Path, names: Iterable[str], *, sync: bool = False) -> Iterator[tuple[str, str]]:
    """(name, SHA-256) of each file, several at once: hashing releases the interpreter's lock."""

    def digest(name: str) -> tuple[str, str]:
        with open(path / name, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if sync:
                os.fsync(file.fileno())
        return name, found

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(digest, names)


def seal(temporary: Path) -> None:
    """Hash and sync every file of a finished folder, then write its manifest: from here on it may be published."""
    names = sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file())
    files = {name: [(temporary / name).stat().st_size, digest] for name, digest in _digests(temporary, names, sync=True)}
    body = {"format": FORMAT, "files": files}
    write_text(temporary / MANIFEST_FILE, json.dumps({"sha256": _sha256_of(body), "body": body}, indent=1))
    for folder in [path for path in temporary.rglob("*") if path.is_dir()] + [temporary]:
        _sync_folder(folder)


def write_text(path: Path, text: str) -> None:
    """Write and sync a file."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sha256_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def final_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:012d}"


def temporary_path(folder: Path, step: int) -> Path:
    return folder / f"{_TEMPORARY}step-{step:012d}"


def step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[2])


def newest_first(folder: Path) -> list[Path]:
    """Every checkpoint of the folder, damaged ones included; ".aside-step-N" follows its successor "step-N"."""
    found = [(int(match[2]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def start_writing(folder: Path, step: int) -> Path:
    """Tidy the folder up, refuse a step that lies behind a whole checkpoint, and make the temporary folder of `step`."""
    folder.mkdir(parents=True, exist_ok=True)
    _clean_up(folder)
    _refuse_or_drop_later(folder, step)
    temporary = temporary_path(folder, step)
    temporary.mkdir()
    return temporary


def publish(temporary: Path, final: Path) -> None:
    """Give a sealed folder its name; one of the same name is set aside first and removed last."""
    aside = final.with_name(_ASIDE + final.name)
    if final.exists():
        final.rename(aside)
    temporary.rename(final)
    _sync_folder(final.parent)
    if aside.exists():
        _remove(aside)


def retain(folder: Path, *, keep: int, keep_every: int | None) -> None:
    """Remove all but the `keep` newest checkpoints and those whose step is a multiple of `keep_every`."""
    for old in newest_first(folder)[keep:]:
        if keep_every is None or step_of(old) % keep_every:
            _remove(old)


def _refuse_or_drop_later(folder: Path, step: int) -> None:
    """A resumed run moves forward: what lies ahead of it is either damaged (dropped) or another run's (refused)."""
    for path in newest_first(folder):
        if step_of(path) <= step:
            return
        try:
            open_whole(path)
        except (CheckpointError, OSError) as error:
            logger.warning("damaged checkpoint %s is removed, step %d takes over: %s", path, step, error)
            _remove(path)
        else:
            raise CheckpointError(
                f"cannot save step {step}: {path} is later. Resume from it, or delete the checkpoints after step {step}"
            )


def _clean_up(folder: Path) -> None:
    """Finish or undo what a killed writer left half done (the writer only: a reader changes nothing)."""
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


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for lack of space: as OSError says it, or as the storage library words it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(error).lower() for words in _DISK_FULL)


def disk_full_message(folder: Path, step: int) -> str:
    """What happened, what is untouched and what to do."""
    before = newest_first(folder)
    kept = f"{before[0].name} is untouched" if before else "there is no earlier one"
    return (
        f"no space left on the disk of {folder} while writing the checkpoint of step {step} "
        f"({shutil.disk_usage(folder).free / 2**20:.0f} MiB free); {kept}. Free some space, then resume the run"
    )
