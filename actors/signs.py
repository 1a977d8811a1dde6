"""What an actor says about itself while it works: for whoever watches a run, never for the run itself.

Signs of life are a few counters that cost nothing to read: every actor is asked for them about every second, beside its
work.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, kw_only=True)
class Signs:
    """One actor, now. `life` names this life of its process; `working` calls are under way, for `busy_s` in all since the
    start, the present ones included; `mib` is resident memory. `engine`: of an actor that generates, its engine's state."""

    name: str
    role: str
    life: str
    host: str
    pid: int
    working: int
    busy_s: float
    calls: int
    mib: float
    peak_mib: float
    engine: EngineSigns | None = None


@dataclass(frozen=True)
class EngineSigns:
    """The version of the weights held (-1: none), responses that run and that wait, tokens made since the start."""

    version: int
    running: int
    waiting: int
    tokens: int


def place() -> tuple[str, int]:
    """Host name and process id of this process."""
    return socket.gethostname(), os.getpid()


def resident_mib() -> float:
    """Memory of this process that is in RAM now; 0 where /proc does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * _PAGE_BYTES / 2**20 if statm.exists() else 0.0
