"""The parts of `online_rl.py` that launch topologies: what the loop waits for, and the algorithms against each other.

All runs of a size start from one SFT policy, trained once; each is a launch of its own whose stage `rl` trains on the
verifier's reward. A finished run is not launched again, so that with `--keep` an interrupted measurement goes on where it
was. `waiting` reads what the loop logs of every iteration; `algorithms` gives every algorithm the same budget of responses,
its own best rate of one grid (by sampled accuracy with the first seed), and reports mean and spread over the seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from topologies.run_folder import RunFolder  # noqa: E402 (the benchmark runs from a checkout, installed or not)

LOCAL = ROOT / "topologies" / "local.yaml"
#: A launch that takes longer is stopped: a measurement must end by itself.
LIMIT_S = 1800.0
#: Of the SFT policy that all runs of a size start from.
START_STAGES = ("tokenizer", "pretrain", "sft")
#: The world at `small`: its speed is measured, not what it learns.
SMALL = {"vocab_size": 8192, "dim": 512, "ffn_dim": 1536, "num_layers": 8, "num_heads": 8, "num_kv_heads": 4, "head_dim": 64}
SHORT = {"steps": 10, "batch": 8, "sequence_length": 64, "warmup_steps": 2}
#: 25 iterations of 32 x 8 responses, as the committee's member of local.yaml trains.
LOOP = {"prompts": 32, "responses": 8, "max_tokens": 24, "warmup_steps": 5, "reward": {"model": 0.0, "verifier": 1.0}}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "mdloo": {"algorithm": "mdloo", "inner_steps": 2, "gamma": 0.2},
    "mdloo, running average": {"algorithm": "mdloo", "inner_steps": 2, "gamma": 0.2, "baseline": "running_average"},
    "ppo": {"algorithm": "ppo", "inner_steps": 2},
    "rloo": {"algorithm": "rloo", "inner_steps": 2},
    "grpo": {"algorithm": "grpo", "inner_steps": 2},
    "reinforce, running average": {"algorithm": "reinforce", "inner_steps": 1},
}
RATES = (2e-4, 5e-4, 1e-3)
STALENESS = (0, 1)
#: Metrics of an iteration that the table is made of, and what they are called in it.
WAITING = {"learner_wait_s": "learner waits", "generate_s": "samplers wait", "publish_s": "weights travel"}
Row = dict[str, Any]


def measure_waiting(args: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Shares of an iteration in which the learner waits, the samplers wait, weights travel, for each staleness."""
    for size in ("local", "small"):
        start = start_policy(folder, size)
        for staleness in STALENESS:
            options = {**ALGORITHMS["mdloo"], "learning_rate": 5e-4, "max_staleness": staleness}
            iterations = args.iterations if size == "local" else min(args.iterations, 8)
            run = launch_rl(folder, f"waiting-{size}-{staleness}", start, {**options, "iterations": iterations}, seed=0)
            rows = [json.loads(line) for line in (run / "metrics" / "rl.jsonl").read_text().splitlines()]
            logged = [row for row in rows if "iteration_s" in row][2:]  # the first two compile
            yield from waiting_rows(size, staleness, logged)


def waiting_rows(size: str, staleness: int, logged: Sequence[Row]) -> Iterator[Row]:
    """What the iterations of a loop took, and the shares of it that somebody waited.

    The samplers wait whenever they do not generate, whichever iteration they generate for: ahead of the learner, an
    iteration's own wait may be longer than the iteration.
    """
    seconds = {name: sum(row[name] for row in logged) for name in ("iteration_s", *WAITING)}
    seconds["generate_s"] = seconds["iteration_s"] - min(seconds["generate_s"], seconds["iteration_s"])
    part = f"waiting {size}"
    median = statistics.median(row["iteration_s"] for row in logged)
    name = f"max_staleness {staleness}: an iteration, median of {len(logged)}"
    yield {"part": part, "name": name, "value": round(median, 3), "unit": "s"}
    for metric, what in WAITING.items():
        share = 100 * seconds[metric] / seconds["iteration_s"]
        yield {"part": part, "name": f"max_staleness {staleness}: {what}", "value": round(share, 1), "unit": "% of the time"}


def measure_algorithms(args: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Held-out accuracy after the same budget of responses: every algorithm at its best rate, over the seeds."""
    start = start_policy(folder, "local")
    before = None
    for name, settings in ALGORITHMS.items():
        grid = {rate: run_of(folder, start, name, settings, rate=rate, seed=args.seeds[0], args=args) for rate in RATES}
        best = max(grid, key=lambda rate: grid[rate]["sampled"])
        found = [run_of(folder, start, name, settings, rate=best, seed=seed, args=args) for seed in args.seeds]
        if before is None:
            before = found[0]["before"]
            yield {"part": "algorithms", "name": "the SFT policy that all start from, greedy", "value": before, "unit": "%"}
        for measure in ("greedy", "sampled"):
            values = [of_seed[measure] for of_seed in found]
            spread = round(statistics.stdev(values), 2) if len(values) > 1 else 0.0
            row: Row = {"part": "algorithms", "name": f"{name}, rate {best:g}: {measure} accuracy", "seeds": values}
            row |= {"value": round(statistics.mean(values), 2), "unit": f"% (standard deviation {spread})", "spread": spread}
            yield row | (
                {"grid": {rate: of_rate["sampled"] for rate, of_rate in grid.items()}} if measure == "sampled" else {}
            )


def run_of(
    folder: Path, start: Path, name: str, settings: Mapping[str, Any], *, rate: float, seed: int, args: argparse.Namespace
) -> dict[str, float]:
    """Accuracies, in per cent, of one algorithm at one rate and seed."""
    options = {**settings, "learning_rate": rate, "iterations": args.iterations}
    label = "".join(c if c.isalnum() else "-" for c in f"{name}-{rate:g}-{args.iterations}")
    report = json.loads((launch_rl(folder, label, start, options, seed=seed) / "report.json").read_text())
    [stage] = [stage for stage in report["stages"] if stage["name"] == "rl"]
    figures = {figure["label"]: figure for figure in stage["figures"]}
    greedy = figures["greedy accuracy"]
    before = float(greedy["note"].split(";")[1].split("%")[0])
    return {"greedy": greedy["value"], "sampled": figures["sampled accuracy"]["value"], "before": before}


def start_policy(folder: Path, size: str) -> Path:
    """The policy that every run of a size starts from, trained once."""
    topology = yaml.safe_load(LOCAL.read_text())
    topology["stages"] = [stage for stage in topology["stages"] if stage_name(stage) in START_STAGES]
    if size == "small":
        topology["model"] = SMALL
        phases = {"stages": ["core"], "core": {**SHORT, "peak_lr": 1e-3}}
        topology["stages"] = [
            "tokenizer",
            {"pretrain": phases},
            {"sft": {"steps": 10, "batch": 8, "learning_rate": 1e-4, "warmup_steps": 2}},
        ]
    run = launch(folder, {**topology, "name": f"start-{size}"})
    return max((run / "policies" / "sft").iterdir())


def stage_name(stage: Any) -> str:
    """A stage is its name, or a mapping from it to its options."""
    return stage if isinstance(stage, str) else next(iter(stage))


def launch_rl(folder: Path, name: str, start: Path, options: Mapping[str, Any], *, seed: int) -> Path:
    """A run of the stage `rl` alone on the world of local.yaml."""
    local = yaml.safe_load(LOCAL.read_text())
    topology = {"name": f"{name}-seed-{seed}", "seed": seed, "model": {"huggingface": str(start)}, "data": local["data"]}
    actors = {role: local["actors"][role] for role in ("learner", "sampler", "reward")}
    return launch(folder, {**topology, "actors": actors, "stages": [{"rl": {**LOOP, **options}}]})


def launch(folder: Path, topology: Mapping[str, Any]) -> Path:
    """Launch a topology unless it is done; its run folder. Raises RuntimeError with the end of what it printed."""
    root = folder.absolute() / "runs"
    run, file = root / topology["name"], root / f"{topology['name']}.yaml"
    if (run / "topology.yaml").exists() and RunFolder.open(run).finished:
        return run
    root.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump({**topology, "run_root": str(root)}, sort_keys=False))
    print(f"launching {topology['name']}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "topologies.cli", "launch", str(file), "--resume"]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return run


if __name__ == "__main__":
    raise SystemExit("these are parts of benchmarks/online_rl.py: run that")
