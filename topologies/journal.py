"""The journal of a run: an append-only file of records, the truth about what has been done.

The records are framed (`framed_file.py`); each is on disk (fsync) before `append` returns, but those that only save work
may leave that to the next one. Only the last record can be torn by a kill, only those since the last sync by a loss of
power: a torn tail is cut off on opening, with a warning. Damage before a whole record is an error, since what follows would
be lost. One writer at a time, by a lock on the file beside the journal; readers need no lock.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from afm_rl.errors import UserError
from topologies.framed_file import Scan, frame, pack, scan, unpack, write_at

_MAGIC = b"AFMRLJ01"
_ONCE = "once"
_log = logging.getLogger(__name__)


class JournalError(UserError):
    """The journal is damaged where no crash can damage it."""


class JournalLockedError(UserError):
    """Another process, or another `Journal` of this one, is writing."""


class Journal:
    """The writer. Use as a context manager, or `close()` it. Safe to share between threads.

    Errors: `JournalLockedError` if it is open for writing elsewhere, `JournalError` if it is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._mutex = threading.Lock()
        self._records: list[Any] = []
        self._results: dict[str, Any] = {}
        self._lock_file = _lock(self.path)
        try:
            self._file = self._open()
        except BaseException:
            os.close(self._lock_file)
            raise

    def _open(self) -> int:
        fresh = not self.path.exists()
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            content = self.path.read_bytes()
            if len(content) < len(_MAGIC) and _MAGIC.startswith(content):  # new, or killed while it was being created
                write_at(file, _MAGIC, 0)
                content = _MAGIC
            found = _scan(content, self.path)
            if found.torn:
                lost = len(content) - found.end
                _log.warning("%s: cut off a torn last record (%d bytes at %d)", self.path, lost, found.end)
                os.ftruncate(file, found.end)
            os.fsync(file)
            if fresh:
                _sync_folder(self.path.parent)
        except BaseException:
            os.close(file)
            raise
        self._end = found.end
        for record in found.records:
            self._remember(record)
        return file

    @property
    def records(self) -> list[Any]:
        """Every record so far, oldest first, as read back from msgpack (tuples are lists)."""
        with self._mutex:
            return list(self._records)

    def append(self, record: Any, *, durable: bool = True) -> None:
        """Write one record and wait until it is on disk; not `durable`: it survives this process, not yet the machine.

        Errors: TypeError where msgpack cannot hold it; OSError (disk full...), after which the journal is as before.
        """
        payload = pack(record)
        with self._mutex:
            self._write(payload, durable=durable)

    def once(self, key: str, fn: Callable[[], Any]) -> Any:
        """`fn()` the first time, its recorded result ever after, across restarts.

        The result is what msgpack reads back (tuples are lists), the first time too. If `fn` raises, nothing is kept.
        Errors: TypeError naming `key` where msgpack cannot hold the result.
        """
        with self._mutex:
            if key in self._results:
                return self._results[key]
        result = fn()
        try:
            payload = pack({"kind": _ONCE, "key": key, "result": result})
        except TypeError as error:
            raise TypeError(f"the result of {key!r} cannot be journalled: {error}") from error
        with self._mutex:
            if key not in self._results:  # another thread may have come first: its record stands
                self._write(payload)
            return self._results[key]

    def done(self, key: str) -> bool:
        """Whether `once(key, ...)` has a result."""
        with self._mutex:
            return key in self._results

    def close(self) -> None:
        """Release the file and the lock. Closing twice is fine."""
        with self._mutex:
            if self._file >= 0:
                os.close(self._file)
                os.close(self._lock_file)
                self._file = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, payload: bytes, *, durable: bool = True) -> None:
        """Frame and write one payload; the mutex is held."""
        if self._file < 0:
            raise ValueError(f"{self.path}: the journal is closed")
        framed = frame(payload)
        try:
            write_at(self._file, framed, self._end)
            if durable:
                os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._end)  # or the next record would follow half a one
            raise
        self._end += len(framed)
        self._remember(unpack(payload))

    def _remember(self, record: Any) -> None:
        self._records.append(record)
        if isinstance(record, dict) and record.get("kind") == _ONCE:
            self._results[record["key"]] = record["result"]


def read_journal(path: str | Path) -> list[Any]:
    """Every whole record of a journal that may be in use; changes nothing and needs no lock. A missing file is empty.

    Errors: `JournalError` as `Journal`; a torn last record is left out in silence (its writer may be at it).
    """
    path = Path(path)
    content = path.read_bytes() if path.exists() else b""
    return [] if _MAGIC.startswith(content) else _scan(content, path).records


class JournalTail:
    """A journal that may be in use, read again and again, each time what was added. Changes nothing and needs no lock."""

    def __init__(self, path: str | Path) -> None:
        self._path, self._at = Path(path), 0

    def new(self) -> list[Any]:
        """The whole records added since the last look. Errors: as `read_journal`."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            if self._at == 0:
                if (start := file.read(len(_MAGIC))) != _MAGIC:
                    return [] if _MAGIC.startswith(start) else _scan(start, self._path).records
                self._at = len(_MAGIC)
            file.seek(self._at)
            found = scan(file.read(), 0)
        if found.later is not None:
            raise JournalError(f"{self._path}: damaged at offset {self._at + found.end}, with whole records behind that")
        self._at += found.end
        return found.records


def _scan(content: bytes, path: Path) -> Scan:
    """Every record up to the end, or up to a torn one. Errors: `JournalError` if whole records follow the damage."""
    if not content.startswith(_MAGIC):
        raise JournalError(f"{path}: not a journal of this version (it starts with {content[:8]!r}); restore or remove it")
    found = scan(content, len(_MAGIC))
    if found.later is not None:
        raise JournalError(
            f"{path}: damaged at offset {found.end}, with whole records from offset {found.later} on; restore the file from "
            f"a copy, or truncate it to {found.end} bytes to give up what follows"
        )
    return found


def _lock(path: Path) -> int:
    """Hold `path`.lock, which names the process that has it. Errors: `JournalLockedError` naming that process."""
    lock_path = path.with_name(path.name + ".lock")
    lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise JournalLockedError(
            f"{path} is in use by process {holder}: the run is still going; wait for it or stop it first"
        ) from None
    os.ftruncate(lock, 0)
    write_at(lock, str(os.getpid()).encode(), 0)
    return lock


def _sync_folder(folder: Path) -> None:
    """Make a new file's name survive a crash."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
