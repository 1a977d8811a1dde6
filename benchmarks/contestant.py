"""A process that a benchmark talks to: it works when told to, is idle otherwise, and says how long the work took.

Contestants of one comparison are all built and warmed up first and stay alive; they then run in turn, round after round, so
that whatever else the machine does falls on all alike. How many cores that took is kept beside the seconds: where it is
above 0.1, measure again.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class Contestant:
    """One line of JSON to its standard input asks for work; a line `RESULT {...}` on its standard output answers."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.seconds: list[float] = []
        self.peak_mib = 0.0
        self.others: list[float] = []
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=HERE.parent
        )

    def run(self, request: Any) -> dict[str, Any]:
        """Do this now. Raises RuntimeError when the process has ended."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return read_result(self.process)

    def measure(self, request: Any) -> dict[str, Any]:
        """Run; keep the seconds, the peak memory and how many cores all other processes used meanwhile."""
        busy_s, own_s = machine_cpu_s(), process_cpu_s(self.process.pid)
        result = self.run(request)
        others_s = machine_cpu_s() - busy_s - (process_cpu_s(self.process.pid) - own_s)
        result["others"] = others_s / sum(result["seconds"])
        self.others.append(result["others"])
        self.seconds += result["seconds"]
        self.peak_mib = result["peak_mib"]
        return result

    def close(self) -> None:
        """End of its input ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def machine_cpu_s() -> float:
    """CPU seconds of every process of this machine since it started."""
    user, nice, system, _, _, irq, softirq, steal = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    return sum(map(int, (user, nice, system, irq, softirq, steal))) / os.sysconf("SC_CLK_TCK")


def process_cpu_s(pid: int) -> float:
    """CPU seconds of one process: fields 14 and 15 of its stat line, counted after the parenthesised name."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def read_result(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next result line of a worker. Raises RuntimeError when it ends without one (its error is on standard error)."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise RuntimeError(f"{process.args} ended with exit code {process.wait()} before it gave a result")
