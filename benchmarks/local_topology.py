"""Time, peak memory and figures of a whole topology, over several seeds: what `docs/measurements.md` reports.

    .venv/bin/python benchmarks/local_topology.py --seeds 0 1 2 [--json] [--topology topologies/local.yaml]

Each seed is a launch of its own in a fresh folder with a fresh cache of compiled programs, as on a new machine. Peak
memory is the largest sum, sampled every two seconds, of the proportional set sizes of the launch and every process it
started. There is no peer: no other system runs this loop, so `peer` and `ratio` are null.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: A launch that takes longer is stopped: a load test must end by itself.
LIMIT_S = 3600.0
#: Seconds between two looks at the memory: more often, looking itself would take a tenth of a core.
SAMPLE_S = 2.0


def main() -> None:
    """Launch every seed, print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default=str(ROOT / "topologies" / "local.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", action="store_true", help="one JSON line per figure")
    parser.add_argument("--keep", metavar="FOLDER", help="keep the run folders here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for seed in args.seeds:
            root = Path(args.keep or scratch) / f"seed-{seed}"
            for name, value in measure(args.topology, seed, root).items():
                row = {"name": f"seed {seed}: {name}", "value": value, "peer": None, "peer_value": None, "ratio": None}
                print(json.dumps(row) if args.json else f"{row['name']:<70} {value}", flush=True)


def measure(topology: str, seed: int, root: Path) -> dict[str, Any]:
    """Seconds, peak MiB and the report's figures of one launch. Raises CalledProcessError when it fails."""
    root.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "topologies.cli", "launch", topology]
    command += ["--set", f"seed={seed}", "--set", f"run_root={root}"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(root / ".jax-cache")}
    before = time.monotonic()
    with open(root / "launch.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        peak_kib = 0
        while process.poll() is None:
            peak_kib = max(peak_kib, sum(pss_kib(pid) for pid in family(process.pid)))
            if time.monotonic() - before > LIMIT_S:
                process.terminate()
            time.sleep(SAMPLE_S)
    seconds = time.monotonic() - before
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, (root / "launch.log").read_text()[-2000:])
    report = json.loads(next(root.glob("*/report.json")).read_text())
    figures = {f"{s['name']}: {f['label']}": f["value"] for s in report["stages"] for f in s["figures"]}
    return {"wall_s": round(seconds, 1), "peak_mib": round(peak_kib / 1024), **figures}


def family(pid: int) -> list[int]:
    """`pid` and everything below it."""
    found = [pid]
    for child in _children(pid):
        found += family(child)
    return found


def _children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(c) for task in tasks for c in (task / "children").read_text().split()]
    except OSError:  # it has ended in the meantime
        return []


def pss_kib(pid: int) -> int:
    """Proportional set size in KiB: shared pages are counted once over all processes; 0 for one that has ended."""
    try:
        rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(row.split()[1]) for row in rows if row.startswith("Pss:")), 0)


if __name__ == "__main__":
    main()
