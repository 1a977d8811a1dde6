"""What /proc says of processes that may end while it is read, when opening or reading raises."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

#: Seconds that a process may take to appear, however loaded the machine.
LIMIT_S = 900


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


def await_process(title: str, launch: subprocess.Popen) -> int:
    """A process of a launch whose title starts so. Ray rewrites titles at every call: a look may miss one."""
    before = time.monotonic()
    while not (found := descendants(launch.pid, title)):
        assert launch.poll() is None
        assert time.monotonic() - before < LIMIT_S, f"no {title}; there are {descendants(launch.pid)}"
        time.sleep(0.02)
    return min(found)


def descendants(root: int, title: str = "") -> dict[int, str]:
    """Titles by process, of the descendants of a process whose title starts so."""
    found, parents = {}, {}
    for pid in [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdecimal()]:
        stat, line = read(pid, "stat"), read(pid, "cmdline")
        if stat is not None and line is not None:
            parents[pid] = int(stat.rpartition(")")[2].split()[1])
            if line.startswith(title):
                found[pid] = line.replace("\0", " ").strip()

    def descends(pid: int) -> bool:
        return pid == root or (pid in parents and descends(parents[pid]))

    return {pid: line for pid, line in found.items() if pid != root and descends(pid)}
