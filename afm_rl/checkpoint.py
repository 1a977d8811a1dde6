"""Checkpoints that survive a kill at any moment, written in the background: complete or absent, checked before use.

`Checkpoints.save` copies the arrays off the devices and returns; orbax writes them, every file is hashed, and the folder
is published under its step (see `checkpoint_folder.py`). `latest` falls back over damaged ones with a warning; `restore`
puts the arrays where `like` says, on any mesh and any number of processes. What a checkpoint holds: a tree (parameters,
optimizer state, step, PRNG keys), metadata of the caller's, and the state of a data iterator where there is one.

The paper does not describe its checkpoints; the requirement (exact resume, one truth about what was consumed) is ours.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from afm_rl import checkpoint_folder as on_disk
from afm_rl.checkpoint_folder import Checkpoint, CheckpointError
from afm_rl.checkpoint_leaves import describe, difference, iterator_file, iterator_text, read_leaves, restore_iterator

__all__ = ["Checkpoint", "CheckpointError", "Checkpoints", "latest", "restore"]

logger = logging.getLogger(__name__)

#: Tells the barriers of one process group apart; every process counts alike, because saving is collective.
_barrier_number = itertools.count()


class Checkpoints:
    """The writer of one folder: saves in the background, keeps the `keep` newest and every `keep_every`-th step.

    With several JAX processes every one of them constructs it and calls `save`, `wait`, `latest` and `close` alike; the
    folder is one that all of them see, and process 0 publishes. `timeout_s` bounds every wait, for the disk or for the
    other processes. One save is in flight at a time. Use as a context manager, or `close()` it: a process that ends
    with a save in flight loses that checkpoint, never an earlier one.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, keep: int = 2, keep_every: int | None = None, timeout_s: float = 1200.0
    ) -> None:
        if keep < 1 or (keep_every is not None and keep_every < 1) or timeout_s < 1:
            raise ValueError(f"Checkpoints needs keep, keep_every, timeout_s >= 1, got {keep}, {keep_every}, {timeout_s}")
        self.folder = Path(folder).absolute()
        self._keep, self._keep_every, self._timeout_s = keep, keep_every, timeout_s
        self._orbax: Any = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._doing = ""

    def save(self, step: int, tree: Any, metadata: Mapping[str, Any] | None = None, *, data_iterator: Any = None) -> None:
        """Start writing `tree` as the checkpoint of `step` (replacing one of the same step).

        Returns when the arrays are copied: the caller may donate them. `metadata` is JSON; `data_iterator` is anything
        with grain's get_state() and set_state(). Waits for the save before this one and raises its error. Raises
        CheckpointError when the disk is full (what was there stays), a later checkpoint exists or a deadline passes,
        TypeError when a leaf or `metadata` cannot be stored.
        """
        if step < 0:
            raise ValueError(f"a checkpoint needs step >= 0, got {step}")
        self.wait()
        rows, arrays = describe(tree)
        document = _as_json({"step": step, "metadata": dict(metadata or {}), "leaves": rows})
        files = {on_disk.METADATA_FILE: document} if _is_primary() else {}
        if data_iterator is not None:
            files[iterator_file(jax.process_index(), jax.process_count())] = iterator_text(data_iterator)
        temporary = on_disk.temporary_path(self.folder, step)
        try:
            if _is_primary():
                on_disk.start_writing(self.folder, step)
            self._meet("start")
            if arrays:
                self._start_arrays(temporary / on_disk.ARRAYS_FOLDER, arrays)
        except BaseException as error:
            self._give_up(error, step)
            raise
        self._thread = threading.Thread(target=self._finish, args=(step, files), name=f"checkpoint-{step}")
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> None:
        """Block until everything saved is on the disk (in every process), and raise what went wrong with it.

        Raises CheckpointError, saying what it waited for, after `timeout_s` (default: the constructor's).
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise CheckpointError(f"{self._thread.name} of {self.folder} not done after {timeout_s} s: {self._doing}")
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def latest(self) -> Checkpoint | None:
        """`latest(folder)`, agreed on by all processes: the first verifies the bytes, the others take its answer."""
        if jax.process_count() == 1:
            return latest(self.folder)
        from jax.experimental import multihost_utils

        step, failure, found = -1, None, None
        if _is_primary():
            try:
                found = latest(self.folder)
                step = -1 if found is None else found.step
            except CheckpointError as error:
                step, failure = -2, error
        self._meet("latest")
        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
        if step == -2:
            raise failure or CheckpointError(f"process 0 found no whole checkpoint in {self.folder}: see its log")
        if step == -1 or found is not None:
            return found
        return on_disk.open_verified(on_disk.final_path(self.folder, step))

    def close(self) -> None:
        """`wait`, then let go of the writer's threads. A later `save` starts anew."""
        try:
            self.wait()
        finally:
            if self._orbax is not None and self._thread is None:
                self._orbax.close()
                self._orbax = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _start_arrays(self, folder: Path, arrays: Mapping[str, Any]) -> None:
        """Hand the arrays to orbax: returns when they are off the devices (on CPU, when XLA knows that they are held)."""
        import orbax.checkpoint as ocp

        if self._orbax is None:
            # Named processes make orbax meet at barriers that have a deadline, not inside a collective that has none.
            processes = ocp.options.MultiprocessingOptions(primary_host=0, active_processes=_processes())
            handler = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=processes)
            # Directories made at once: their errors are then ours to raise, and no thread of orbax's waits for them.
            asynchronous = ocp.options.AsyncOptions(
                timeout_secs=int(self._timeout_s), create_directories_asynchronously=False
            )
            self._orbax = ocp.AsyncCheckpointer(handler, async_options=asynchronous, multiprocessing_options=processes)
        self._orbax.save(folder, args=ocp.args.PyTreeSave(dict(arrays)))

    def _finish(self, step: int, files: Mapping[str, str]) -> None:
        """In the background: wait for the arrays, write the rest, hash, publish, retain."""
        temporary = on_disk.temporary_path(self.folder, step)
        try:
            if self._orbax is not None:
                self._doing = "waiting for orbax to write the arrays of every process"
                self._orbax.wait_until_finished()
            for name, text in files.items():
                self._doing = f"writing {name}"
                on_disk.write_text(temporary / name, text)
            self._meet("written")
            if _is_primary():
                self._doing = "hashing and publishing"
                on_disk.seal(temporary)
                on_disk.publish(temporary, on_disk.final_path(self.folder, step))
                on_disk.retain(self.folder, keep=self._keep, keep_every=self._keep_every)
            self._meet("published")
        except BaseException as error:
            logger.error("the checkpoint of step %d in %s failed: %s", step, self.folder, error)
            try:
                self._give_up(error, step)
                self._error = error
            except CheckpointError as explained:
                self._error = explained

    def _give_up(self, error: BaseException, step: int) -> None:
        """Remove the half-written folder. Raises CheckpointError when the disk is full."""
        if _is_primary():
            shutil.rmtree(on_disk.temporary_path(self.folder, step), ignore_errors=True)
        if on_disk.is_disk_full(error):
            raise CheckpointError(on_disk.disk_full_message(self.folder, step)) from error

    def _meet(self, where: str) -> None:
        """Wait until every process is here; the error says who waited for what."""
        if jax.process_count() == 1:
            return
        from orbax.checkpoint import multihost

        self._doing = f"waiting for the other processes at {where!r}"
        key, begin = f"afm-rl-checkpoint-{next(_barrier_number)}-{where}", time.monotonic()
        try:
            multihost.get_barrier_sync_fn(processes=_processes())(key=key, timeout_ms=int(self._timeout_s * 1000))
        except jax.errors.JaxRuntimeError as error:
            raise CheckpointError(
                f"process {jax.process_index()} waited {time.monotonic() - begin:.0f} s for the others at {where!r} "
                f"of a checkpoint in {self.folder}: one of them is dead, late or refused to save (see its log): {error}"
            ) from error


def _processes() -> set[int] | None:
    return set(range(jax.process_count())) if jax.process_count() > 1 else None


def _is_primary() -> bool:
    return jax.process_index() == 0


def _as_json(document: Mapping[str, Any]) -> str:
    try:
        return json.dumps(document)
    except TypeError as error:
        raise TypeError(f"the metadata of the checkpoint is not JSON: {error}") from error


def latest(folder: str | os.PathLike[str]) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None when there is none at all; logs a warning for each damaged one.

    Raises CheckpointError when checkpoints exist and every one is damaged: starting over silently would lose the run.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        return None
    paths = on_disk.newest_first(folder)
    for path in paths:
        try:
            return on_disk.open_whole(path)
        except (CheckpointError, OSError) as error:
            logger.warning("checkpoint %s is damaged and not used: %s", path, error)
    if paths:
        raise CheckpointError(
            f"none of the {len(paths)} checkpoints in {folder} is whole (see the warnings above); "
            "restore the folder from a copy, or delete it to start again"
        )
    return None


def restore(checkpoint: Checkpoint, *, like: Any, data_iterator: Any = None) -> Any:
    """The saved tree, with the structure of `like`; its leaves say what is expected.

    An array leaf must agree in shape and dtype; where `like` holds a jax.Array or jax.ShapeDtypeStruct the result is a
    jax.Array on its sharding (of which a process reads its own shards), else NumPy; Python scalars come back as themselves.
    `data_iterator` is set to the state it was saved with. Raises CheckpointError naming every leaf that is missing,
    unexpected or different, or when no state of an iterator was saved by as many processes.
    """
    wanted, structure = jax.tree_util.tree_flatten_with_path(like)
    named = [(jax.tree_util.keystr(path), leaf) for path, leaf in wanted]
    paths = {path for path, _ in named}
    problems = [f"{path} is not in the checkpoint" for path, _ in named if path not in checkpoint.leaves]
    problems += [f"{path} is in the checkpoint only" for path in checkpoint.leaves if path not in paths]
    problems += [
        f"{path} {problem}"
        for path, leaf in named
        if path in checkpoint.leaves and (problem := difference(checkpoint.leaves[path], leaf))
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(f"{checkpoint.folder} does not fit the tree to restore: {shown}")
    leaves = read_leaves(checkpoint, named)
    if data_iterator is not None:
        restore_iterator(checkpoint, data_iterator)
    return jax.tree_util.tree_unflatten(structure, leaves)
