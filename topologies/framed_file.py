"""Files of framed records: a magic word, then records of a 12-byte header and a msgpack payload.

The header is the payload's length and CRC-32, and the CRC-32 of these eight bytes, so that a damaged length is not taken
for a torn record. A crash can tear the last record only; damage before a whole record is found, and said where.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import msgpack

_START = struct.Struct("<II")  # length and CRC-32 of the payload
_CHECK = struct.Struct("<I")  # CRC-32 of the two
_HEADER_BYTES = _START.size + _CHECK.size


@dataclass(frozen=True)
class Scan:
    """What a file holds: its records, the offset where they end, whether a torn one stands there, and where whole records
    follow the damage (None: nowhere)."""

    records: list[Any]
    end: int
    torn: bool
    later: int | None = None


def pack(record: Any) -> bytes:
    """The payload of a record. Raises TypeError where msgpack cannot hold it."""
    try:
        return msgpack.packb(record)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{error}; use plain numbers, text, bytes, lists and mappings") from error


def unpack(payload: bytes | memoryview) -> Any:
    """A payload's record, as msgpack reads it back (tuples are lists)."""
    return msgpack.unpackb(payload, strict_map_key=False)


def frame(payload: bytes) -> bytes:
    """Header and payload."""
    start = _START.pack(len(payload), zlib.crc32(payload))
    return start + _CHECK.pack(zlib.crc32(start)) + payload


def scan(content: bytes, start: int) -> Scan:
    """Every record from offset `start` up to the end, or up to a torn one."""
    view, at = memoryview(content), start
    records: list[Any] = []
    while at < len(content):
        payload = _payload(view, at)
        if payload is None:
            return Scan(records, at, torn=True, later=_next_record(view, at + 1))
        records.append(unpack(payload))
        at += _HEADER_BYTES + len(payload)
    return Scan(records, at, torn=False)


def write_at(file: int, data: bytes, offset: int) -> None:
    """All of `data` at `offset` of an open file (a single write may be short)."""
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


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
