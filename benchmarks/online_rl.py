"""Online RL: a whole step beside TRL's in one run, what the launched loop waits for, and the algorithms against each other.

    .venv/bin/python benchmarks/online_rl.py --trl-python PYTHON [--only step,learn,waiting,algorithms] [--json FILE]

`step`: 8 prompts x 8 responses x 64 tokens, prompts of 32, seconds a step and what they go to; `rloo` with one update and
beta 0 does what TRL's RLOOTrainer does, MDLOO with two inner steps stands beside it. `learn`: seconds until the mean reward
of a step (the share of tokens with id % 8 == 3) reaches 0.95, every side at its own best rate of one small grid, median over
seeds. Both run the product's own sampler and learner in one process; all sides start from the same random model and take
turns (`contestant.py`). `waiting` and `algorithms` launch topologies (`online_rl_topologies.py`). The peer's interpreter
needs torch, trl 1.16 and datasets; without it only our side runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
from contestant import Contestant

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from online_rl_topologies import measure_algorithms, measure_waiting  # noqa: E402 (from a checkout, installed or not)

from afm_rl.config import ModelConfig  # noqa: E402
from afm_rl.huggingface import save_pretrained  # noqa: E402
from afm_rl.malloc import LEARNER_TUNABLES  # noqa: E402
from afm_rl.parameters import init_params  # noqa: E402

THREADS = os.cpu_count() or 1
SHAPES = {
    "tiny": ModelConfig(2048, 128, 384, 4, 4, 2, 32, max_positions=2048),
    "small": ModelConfig(8192, 512, 1536, 8, 8, 4, 64, max_positions=2048),
}
WORKLOAD = {"prompts": 8, "responses": 8, "prompt_tokens": 32, "new_tokens": 64, "clip": 1.0}
#: Ours, by what `step` and `learn` call them. The first does what TRL does.
OURS: dict[str, dict[str, Any]] = {
    "rloo, 1 update": {"algorithm": "rloo", "inner_steps": 1},
    "mdloo, 2 inner steps": {"algorithm": "mdloo", "inner_steps": 2, "gamma": 0.1},
    "mdloo, 4 inner steps": {"algorithm": "mdloo", "inner_steps": 4, "gamma": 0.1},
}
DTYPES = ("bfloat16", "float32")
TRL = {
    "TRL float32": {"dtype": "float32", "cache": "dynamic"},
    "TRL bfloat16": {"dtype": "bfloat16", "cache": "dynamic"},
    "TRL float32, static cache": {"dtype": "float32", "cache": "static"},
}
#: Rates of AdamW that every side is given; a training that has not learned by then counts with the time it took.
RATES, MOST_STEPS, GOAL_REWARD = (1e-3, 3e-3, 1e-2), 60, 0.95
#: TRL's time for a step over ours; TRL's time to learn over ours.
STEP_GOAL, STEP_FLOOR, LEARN_GOAL = 5.0, 3.2, 5.0
PARTS = ("weights", "generate", "score", "train")
Row = dict[str, Any]


def ours(folder: Path, settings: Row, *, dtype: str) -> Contestant:
    """One of ours; programs are kept on the disk, as a launch keeps them."""
    job = {"model": str(folder), "dtype": dtype, "max_batch": 64, "settings": settings}
    paths = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": LEARNER_TUNABLES, "PYTHONPATH": paths}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "jax-cache")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.0"}
    return Contestant([sys.executable, str(HERE / "online_rl_worker.py"), json.dumps(job)], environment)


def trl(folder: Path, variant: Row, args: argparse.Namespace) -> Contestant:
    """One of the peer's."""
    job = {"model": str(folder), "threads": THREADS, **variant}
    script = HERE / "peers" / "rloo_trl.py"
    return Contestant([args.trl_python, str(script), json.dumps(job)], dict(os.environ))


@contextmanager
def closing(everyone: Mapping[str, Contestant]) -> Iterator[Mapping[str, Contestant]]:
    """End the contestants' processes whatever happens."""
    with ExitStack() as stack:
        for contestant in everyone.values():
            stack.callback(contestant.close)
        yield everyone


def write_model(folder: Path, size: str) -> Path:
    """The random model that all sides start from, where it is not there yet."""
    target = folder / size
    if not (target / "config.json").exists():
        save_pretrained(init_params(SHAPES[size], jax.random.key(0)), target, config=SHAPES[size])
    return target


def measure_step(args: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Seconds a step of every side, in turn, and what they go to; the goals."""
    for size in args.sizes:
        model = write_model(folder, size)
        everyone = {f"afm-rl {name}": ours(model, settings, dtype="bfloat16") for name, settings in step_settings().items()}
        everyone["afm-rl rloo, 1 update, float32"] = ours(model, OURS["rloo, 1 update"], dtype="float32")
        everyone |= {name: trl(model, variant, args) for name, variant in TRL.items()} if args.trl_python else {}
        run = {**WORKLOAD, "steps": args.skip + args.steps, "rate": 1e-3}
        with closing(everyone):
            found: dict[str, list[Row]] = {name: [] for name in everyone}
            for seed in range(args.rounds):
                for name, contestant in everyone.items():
                    found[name].append(contestant.measure({"train": {**run, "seed": seed}}))
                    print(f"round {seed}: {name} {found[name][-1]['seconds'][-1]:.2f} s", file=sys.stderr, flush=True)
        yield from step_rows(size, found, skip=args.skip)


def step_settings() -> dict[str, Row]:
    """Those of ours whose single step is of interest."""
    return {name: settings for name, settings in OURS.items() if settings["inner_steps"] <= 2}


def step_rows(size: str, found: Mapping[str, Sequence[Row]], *, skip: int) -> Iterator[Row]:
    """One row a side, with its parts and the ratio to the best of TRL; then the goals."""

    def seconds(name: str, field: str) -> list[float]:
        return [value for result in found[name] for value in result.get(field, ())[skip:]]

    medians = {name: statistics.median(seconds(name, "seconds")) for name in found}
    best = min((name for name in found if name.startswith("TRL")), key=lambda name: medians[name], default=None)
    for name, median in medians.items():
        parts = {part: round(statistics.median(seconds(name, part)), 4) for part in PARTS if seconds(name, part)}
        row: Row = {"part": f"step {size}", "name": name, "value": round(median, 4), "unit": "s a step", "seconds": parts}
        row |= {"fastest": round(min(seconds(name, "seconds")), 4)}
        if best is not None and not name.startswith("TRL"):
            row["ratios"] = {best: round(medians[best] / median, 2)}
        yield row
    others = statistics.median(result["others"] for results in found.values() for result in results)
    yield {"part": f"step {size}", "name": "cores that other processes used", "value": round(others, 2), "unit": ""}
    if best is not None:
        reached = medians[best] / medians["afm-rl rloo, 1 update"]
        for kind, goal in (("goal", STEP_GOAL), ("floor", STEP_FLOOR)):
            row = {"part": f"step {size}", "name": f"{kind}: {goal:g} x TRL, rloo with 1 update", "unit": "x"}
            yield row | {"value": round(reached, 2), "ratios": {f"the {kind}": round(reached / goal, 2)}}


def measure_learn(args: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Seconds to the goal's reward: first every rate with one seed, then the best of each side with the other seeds."""
    model = write_model(folder, "tiny")
    everyone = {f"afm-rl {name}": ours(model, settings, dtype="bfloat16") for name, settings in OURS.items()}
    if args.trl_python:
        everyone["TRL float32"] = trl(model, TRL["TRL float32"], args)
    with closing(everyone):
        tried: dict[str, dict[float, Row]] = {name: {} for name in everyone}
        for rate in RATES:
            for name, contestant in everyone.items():
                tried[name][rate] = learn(contestant, name, rate=rate, seed=0)
        rates = {name: best_rate(found) for name, found in tried.items()}
        found: dict[str, list[Row]] = {name: [] for name in everyone}
        for seed in range(1, 1 + args.rounds):
            for name, contestant in everyone.items():
                found[name].append(learn(contestant, name, rate=rates[name], seed=seed))
    yield from learn_rows(tried, rates, found)


def learn_rows(
    tried: Mapping[str, Mapping[float, Row]], rates: Mapping[str, float], found: Mapping[str, Sequence[Row]]
) -> Iterator[Row]:
    """One row a side: median seconds at its own best rate, the curves, and the ratio to TRL's time."""
    wall_s = {name: statistics.median(sum(result["seconds"]) for result in results) for name, results in found.items()}
    peer_s = next((seconds for name, seconds in wall_s.items() if name.startswith("TRL")), None)
    for name, results in found.items():
        steps = statistics.median(len(result["seconds"]) for result in results)
        reached = sum(result["rewards"][-1] >= GOAL_REWARD for result in results)
        label = f"{name}, rate {rates[name]:g}: {steps:g} steps, {reached} of {len(results)} seeds"
        row: Row = {"part": "learn tiny", "name": label, "value": round(wall_s[name], 2), "unit": f"s to {GOAL_REWARD}"}
        row |= {
            "curves": [curve(result) for result in results],
            "first_training_s": round(sum(tried[name][RATES[0]]["seconds"]), 2),
        }
        row |= {"grid": {rate: [len(t["seconds"]), t["rewards"][-1]] for rate, t in tried[name].items()}}
        if peer_s is not None and not name.startswith("TRL"):
            ratio = peer_s / wall_s[name]
            row["ratios"] = {"TRL's time": round(ratio, 2), "the goal": round(ratio / LEARN_GOAL, 2)}
        yield row


def learn(contestant: Contestant, name: str, *, rate: float, seed: int) -> Row:
    """One training up to the goal's reward."""
    run = {**WORKLOAD, "steps": MOST_STEPS, "until": GOAL_REWARD, "rate": rate, "seed": seed}
    result = contestant.measure({"train": run})
    reached = f"{len(result['seconds'])} steps, {sum(result['seconds']):.1f} s, reward {result['rewards'][-1]:.3f}"
    print(f"{name}, rate {rate:g}, seed {seed}: {reached}", file=sys.stderr, flush=True)
    return result


def best_rate(found: Mapping[float, Row]) -> float:
    """The rate that needed the fewest steps; of those that never got there, the one that got furthest."""
    return min(found, key=lambda rate: (len(found[rate]["seconds"]), -found[rate]["rewards"][-1]))


def curve(result: Row) -> Row:
    """The curve of a training: seconds since its start, and the mean reward then."""
    ends = [sum(result["seconds"][: i + 1]) for i in range(len(result["seconds"]))]
    return {"seconds": [round(end, 3) for end in ends], "rewards": [round(reward, 4) for reward in result["rewards"]]}


def main() -> None:
    """Measure the chosen parts, print the table as it comes and write the rows as JSON."""
    parts = {"step": measure_step, "learn": measure_learn, "waiting": measure_waiting, "algorithms": measure_algorithms}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl-python", metavar="PATH", help="an interpreter that has torch, trl and datasets")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(parts), help=",".join(parts))
    parser.add_argument("--sizes", type=lambda text: text.split(","), default=["tiny"], help="of step: tiny,small")
    parser.add_argument("--rounds", type=int, default=3, help="of step; seeds of learn")
    parser.add_argument("--steps", type=int, default=6, help="counted steps of a round")
    parser.add_argument("--skip", type=int, default=2, help="steps at the start of a round that are not counted")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of algorithms")
    parser.add_argument("--iterations", type=int, default=25, help="of a launched loop")
    parser.add_argument("--keep", metavar="FOLDER", help="where models and runs are kept, and found the next time")
    parser.add_argument("--json", metavar="FILE", help="write the rows here too")
    args = parser.parse_args()
    if unknown := (set(args.only) - set(parts)) | (set(args.sizes) - set(SHAPES)):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; --only takes {', '.join(parts)}, --sizes {', '.join(SHAPES)}")
    if not args.trl_python and {"step", "learn"} & set(args.only):
        print("no --trl-python: TRL is skipped", flush=True)
    everything: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        for part in args.only:
            for row in parts[part](args, Path(args.keep or temporary)):
                everything.append(row)
                show(row)
                if args.json:
                    Path(args.json).write_text(json.dumps(everything, indent=1) + "\n")


def show(row: Row) -> None:
    """One line of the table."""
    against = "".join(f"  {ratio}x {name}" for name, ratio in row.get("ratios", {}).items())
    split = "  " + ", ".join(f"{part} {value}" for part, value in row["seconds"].items()) if "seconds" in row else ""
    fastest = f" (fastest {row['fastest']})" if "fastest" in row else ""
    print(f"{row['part']:<16} {row['name']:<62} {row['value']:>9} {row['unit']}{fastest}{split}{against}", flush=True)


if __name__ == "__main__":
    main()
