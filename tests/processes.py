"""What /proc says of processes that may end while it is read, when opening or reading raises."""

from __future__ import annotations

from pathlib import Path


def read(pid: int, name: str) -> str | None:
    """The text of /proc/PID/NAME; None of a process that is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None


def running(pid: int) -> bool:
    """Whether it still runs. One that has ended stays in the table until its parent takes note: a zombie, state Z."""
    stat = read(pid, "stat")
    return stat is not None and stat.rpartition(")")[2].split()[0] != "Z"
