"""The journal of a run: an append-only file of records, the truth about what has been done.

The file starts with a magic word. A record is a 12-byte header (length, CRC-32 of the payload, CRC-32 of these eight
bytes) and a msgpack payload; each is on disk (fsync) before `append` returns. Only the last record can be torn by a
crash: it is cut off on opening, with a warning. Damage before a whole record is an error, since what follows would be
lost. One writer at a time, by a lock on the file beside the journal; readers need no lock.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

from afm_rl.errors import UserError

_MAGIC = b"AFMRLJ01"
_START = struct.Struct("<II")  # length and CRC-32 of the payload
_CHECK = struct.Struct("<I")  # CRC-32 of the two, so that a damaged length is not taken for a torn record
_HEADER_BYTES = _START.size + _CHECK.size
_ONCE = "once"
_log = logging.getLogger(__name__)


class JournalError(UserError):
    """The journal is damaged where no crash can damage it."""


class JournalLockedError(UserError):
    """Another process, or another `Journal` of this one, is writing."""


@dataclass(frozen=True)
class _Scan:
    """What a file holds: its records, the offset where they end, and whether a torn one stands there."""

    records: list[Any]
    end: int
    torn: bool


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
                _write_at(file, _MAGIC, 0)
                content = _MAGIC
            scan = _scan(content, self.path)
            if scan.torn:
                lost = len(content) - scan.end
                _log.warning("%s: cut off a torn last record (%d bytes at %d)", self.path, lost, scan.end)
                os.ftruncate(file, scan.end)
            os.fsync(file)
            if fresh:
                _sync_folder(self.path.parent)
        except BaseException:
            os.close(file)
            raise
        self._end = scan.end
        for record in scan.records:
            self._remember(record)
        return file

    @property
    def records(self) -> list[Any]:
        """Every record so far, oldest first, as read back from msgpack (tuples are lists)."""
        with self._mutex:
            return list(self._records)

    def append(self, record: Any) -> None:
        """Write one record and wait until it is on disk.

        Errors: TypeError where msgpack cannot hold it; OSError (disk full...), after which the journal is as before.
        """
        payload = _pack(record)
        with self._mutex:
            self._write(payload)

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
            payload = _pack({"kind": _ONCE, "key": key, "result": result})
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

    def _write(self, payload: bytes) -> None:
        """Frame and write one payload; the mutex is held."""
        if self._file < 0:
            raise ValueError(f"{self.path}: the journal is closed")
        start = _START.pack(len(payload), zlib.crc32(payload))
        frame = start + _CHECK.pack(zlib.crc32(start)) + payload
        try:
            _write_at(self._file, frame, self._end)
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._end)  # or the next record would follow half a one
            raise
        self._end += len(frame)
        self._remember(msgpack.unpackb(payload, strict_map_key=False))

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


def _scan(content: bytes, path: Path) -> _Scan:
    """Every record up to the end, or up to a torn one. Errors: `JournalError` if whole records follow the damage."""
    if not content.startswith(_MAGIC):
        raise JournalError(f"{path}: not a journal of this version (it starts with {content[:8]!r}); restore or remove it")
    view, at = memoryview(content), len(_MAGIC)
    records: list[Any] = []
    while at < len(content):
        payload = _payload(view, at)
        if payload is None:
            if (later := _next_record(view, at + 1)) is not None:
                raise JournalError(
                    f"{path}: damaged at offset {at}, with whole records from offset {later} on; restore the file from "
                    f"a copy, or truncate it to {at} bytes to give up what follows"
                )
            return _Scan(records, at, torn=True)
        records.append(msgpack.unpackb(payload, strict_map_key=False))
        at += _HEADER_BYTES + len(payload)
    return _Scan(records, at, torn=False)


def _payload(view: memoryview, at: int) -> memoryview | None:
    """The payload of the record at an offset, or None where no whole record starts."""
    start, body = view[at : at + _START.size], at + _HEADER_BYTES
    if body > len(view) or zlib.crc32(start) != _CHECK.unpack_from(view, at + _START.size)[0]:
        return None
    length, checksum = _START.unpack(start)
    payload = view[body : body + length]
    return payload if len(payload) == length and zlib.crc32(payload) == checksum else None


def _next_record(view: memoryview, at: int) -> int | None:
    """The offset of the first whole record at or after `at`, searched byte by byte."""
    return next((offset for offset in range(at, len(view) - _HEADER_BYTES + 1) if _payload(view, offset) is not None), None)


def _pack(record: Any) -> bytes:
    try:
        return msgpack.packb(record)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{error}; use plain numbers, text, bytes, lists and mappings") from error


def _write_at(file: int, data: bytes, offset: int) -> None:
    """All of `data` at `offset` (a single write may be short)."""
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


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
    _write_at(lock, str(os.getpid()).encode(), 0)
    return lock


def _sync_folder(folder: Path) -> None:
    """Make a new file's name survive a crash."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
