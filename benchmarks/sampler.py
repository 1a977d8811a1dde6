"""The sampler's engine against transformers and llama.cpp on this machine, side by side in one run.

    .venv/bin/python benchmarks/sampler.py --torch-python PYTHON --llamacpp-python PYTHON [--only shared,single] [--json F]

All sides load the same random model, written by `save_pretrained` (llama.cpp: converted, and quantized by itself); that they
compute the same is printed first. Parts: `shared` (8 prompts, 8 responses each) and `distinct` (64 prompts), 32 + 64 tokens;
`single` (one response); `prefill` (8 responses to one prompt of 512 tokens); `mixed` (lengths of 8 to 512 tokens against
one length); `alone` (tokens that differ when a request runs alone, fast mode); `deterministic` (what that mode costs).
tokens/s are new tokens over the whole call, prefill included (`prefill`: prompt tokens). Contestants take turns
(`contestant.py`); figures are medians over all rounds. A peer without its interpreter is skipped. Peers: transformers 5 with
torch 2.13; llama-cpp-python 0.3, gguf and numpy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from contestant import Contestant

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from afm_rl.config import ModelConfig  # noqa: E402 (the benchmark runs from a checkout, installed or not)
from afm_rl.flops import matrix_params  # noqa: E402
from afm_rl.huggingface import save_pretrained  # noqa: E402
from afm_rl.malloc import ACTOR_TUNABLES  # noqa: E402
from afm_rl.parameters import init_params  # noqa: E402

THREADS = os.cpu_count() or 1
MAX_BATCH = 64
SHAPES = {
    "tiny": ModelConfig(2048, 128, 384, 4, 4, 2, 32, max_positions=2048),
    "small": ModelConfig(8192, 512, 1536, 8, 8, 4, 64, max_positions=2048),
}
UNIFORM = {
    "shared": {"prompts": 8, "responses": 8, "prompt_tokens": 32, "new_tokens": 64},
    "distinct": {"prompts": 64, "responses": 1, "prompt_tokens": 32, "new_tokens": 64},
    "single": {"prompts": 1, "responses": 1, "prompt_tokens": 32, "new_tokens": 64},
    "prefill": {"prompts": 1, "responses": 8, "prompt_tokens": 512, "new_tokens": 1},
}
OTHERS = ("mixed", "alone", "deterministic")
DTYPES = ("bfloat16", "float32")
CACHES = ("dynamic", "static", "compiled")
#: llama.cpp's formats; float32 only where a step reads the weights for one token.
FORMATS = {
    "shared": ("f16", "q8_0"),
    "distinct": ("f16", "q8_0"),
    "single": ("f32", "f16", "q8_0"),
    "prefill": ("f16", "q8_0"),
}
#: (family of peers, times its best): what a part is to reach.
BATCHED_GOALS = (("transformers", 4.0), ("llama.cpp q8_0", 3.0))
GOALS = {"shared": BATCHED_GOALS, "distinct": BATCHED_GOALS, "single": (("llama.cpp f16", 1.0),), "prefill": ()}
#: Prompt tokens whose next-token distribution all sides must agree on, and how far quantized ones may be off.
SCORED_TOKENS, SCORE_BOUND = 32, 0.5
Row = dict[str, Any]
Contestants = Mapping[str, Contestant]


def our_environment() -> dict[str, str]:
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": ACTOR_TUNABLES, "PYTHONPATH": os.pathsep.join(paths)}


def ours(folder: Path, dtype: str, *, deterministic: bool = False) -> Contestant:
    job = {"model": str(folder), "dtype": dtype, "max_batch": MAX_BATCH, "deterministic": deterministic}
    return Contestant([sys.executable, str(HERE / "sampler_worker.py"), json.dumps(job)], our_environment())


def peers(folder: Path, formats: Sequence[str], args: argparse.Namespace) -> dict[str, Contestant]:
    """Every variant of the peers whose interpreters are given and whose names `--peers` admits."""
    commands = {}
    for dtype in DTYPES if args.torch_python else ():
        for cache in CACHES:
            job = {"model": str(folder), "dtype": dtype, "cache": cache, "threads": THREADS}
            script = HERE / "peers" / "generate_transformers.py"
            commands[f"transformers {dtype} {cache}"] = [args.torch_python, str(script), json.dumps(job)]
    for name in formats if args.llamacpp_python else ():
        job = {"model": str(folder / "gguf" / f"{name}.gguf"), "threads": THREADS}
        script = HERE / "peers" / "generate_llamacpp.py"
        commands[f"llama.cpp {name}"] = [args.llamacpp_python, str(script), json.dumps(job)]
    admitted = {name: command for name, command in commands.items() if name.startswith(tuple(args.peers))}
    return {name: Contestant(command, dict(os.environ)) for name, command in admitted.items()}


@contextmanager
def closing(everyone: dict[str, Contestant]) -> Iterator[dict[str, Contestant]]:
    """End the contestants' processes whatever happens."""
    try:
        yield everyone
    finally:
        for contestant in everyone.values():
            contestant.close()


def write_models(folder: Path, args: argparse.Namespace) -> None:
    """The random models in every side's format, where they are not there yet."""
    for size in args.sizes:
        config, target = SHAPES[size], folder / size
        if not (target / "config.json").exists():
            save_pretrained(init_params(config, jax.random.key(0)), target, config=config)
        if args.llamacpp_python and not (target / "gguf" / "q8_0.gguf").exists():
            command = [args.llamacpp_python, str(HERE / "peers" / "write_gguf.py"), str(target), str(target / "gguf")]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def agreement(everyone: Contestants, size: str) -> Iterator[Row]:
    """How far each side's next-token log-probabilities are from ours in float32. Raises where it is another model."""
    ids = np.random.default_rng(7).integers(4, SHAPES[size].vocab_size, SCORED_TOKENS).tolist()
    logps = {name: np.array(contestant.run({"score": ids})["logps"]) for name, contestant in everyone.items()}
    for name, found in logps.items():
        difference = float(np.abs(found - logps["afm-rl float32"]).max())
        if difference > SCORE_BOUND:
            raise RuntimeError(f"{name} computes another model: a log-probability is {difference:.2g} from ours")
        yield {"part": f"same {size}", "name": name, "value": round(difference, 6), "unit": "largest log-p difference"}


def race(everyone: Contestants, workloads: Mapping[str, Row], args: argparse.Namespace) -> dict[str, dict[str, list[Row]]]:
    """Results by workload and contestant, a list over rounds; every round has prompts of its own."""
    results: dict[str, dict[str, list[Row]]] = {part: {name: [] for name in everyone} for part in workloads}
    for seed in range(args.warmup + args.rounds):
        for part, workload in workloads.items():
            for name, contestant in everyone.items():
                result = contestant.measure({"generate": {**workload, "seed": seed}})
                print(f"round {seed} {part} {name}: {result['seconds'][0]:.2f} s", file=sys.stderr, flush=True)
                if seed >= args.warmup:
                    results[part][name].append(result)
    return results


def median(results: Sequence[Row], field: str = "seconds") -> float:
    return statistics.median(value for result in results for value in np.atleast_1d(result[field]))


def least(results: Sequence[Row]) -> float:
    return min(second for result in results for second in result["seconds"])


def measure_uniform(folder: Path, size: str, args: argparse.Namespace) -> Iterator[Row]:
    """Every workload of one length: ours beside the peers, the goals, what the engine counted, the distance to the limit."""
    parts = [part for part in UNIFORM if part in args.only]
    formats = list(dict.fromkeys(name for part in parts for name in FORMATS[part]))
    everyone = {f"afm-rl {dtype}": ours(folder / size, dtype) for dtype in DTYPES}
    with closing({**everyone, **peers(folder / size, formats, args)}) as everyone:
        yield from agreement(everyone, size)
        results = race(everyone, {part: UNIFORM[part] for part in parts}, args)
        machine = everyone["afm-rl float32"].run({"machine": MAX_BATCH})
    for part in parts:
        speeds = {name: counted_tokens(UNIFORM[part]) / median(found) for name, found in results[part].items()}
        fastest = {name: counted_tokens(UNIFORM[part]) / least(found) for name, found in results[part].items()}
        for row in speed_rows(f"{part} {size}", speeds, GOALS[part]):
            yield row | ({"fastest": round(fastest[row["name"]], 1)} if row["name"] in fastest else {})
        others = statistics.median(median(found, "others") for found in results[part].values())
        yield {"part": f"{part} {size}", "name": "cores that other processes used", "value": round(others, 2), "unit": ""}
        yield from counted_rows(part, size, results[part])
        for dtype in DTYPES:
            yield limit_row(part, size, dtype, median(results[part][f"afm-rl {dtype}"]), machine)


def counted_tokens(workload: Row) -> int:
    """What tokens/s count: the new ones, or the prompt's where hardly any are new."""
    if workload["new_tokens"] == 1:
        return workload["prompts"] * workload["prompt_tokens"]
    return workload["prompts"] * workload["responses"] * workload["new_tokens"]


def speed_rows(part: str, speeds: Mapping[str, float], goals: Sequence[tuple[str, float]]) -> Iterator[Row]:
    """One row a contestant, ours with the ratio to the best of each family of peers; one row a goal."""
    families = {}
    for family in ("transformers", "llama.cpp"):
        if members := [name for name in speeds if name.startswith(family)]:
            families[family] = max(members, key=lambda name: speeds[name])
    for name, speed in speeds.items():
        row: Row = {"part": part, "name": name, "value": round(speed, 1), "unit": "tokens/s"}
        if name.startswith("afm-rl"):
            row["ratios"] = {best: round(speed / speeds[best], 2) for best in families.values()}
        yield row
    our_best = max(speed for name, speed in speeds.items() if name.startswith("afm-rl"))
    for family, times in goals:
        if members := [speed for name, speed in speeds.items() if name.startswith(family)]:
            goal = times * max(members)
            reached = {"the goal": round(our_best / goal, 2)}
            yield {
                "part": part,
                "name": f"goal: {times:g} x {family}",
                "value": round(goal),
                "unit": "tokens/s",
                "ratios": reached,
            }


def counted_rows(part: str, size: str, results: Mapping[str, list[Row]]) -> Iterator[Row]:
    """What the engine says it prefilled."""
    prefilled = sorted(
        {result["prompt_tokens"] for name, rs in results.items() if name.startswith("afm-rl") for result in rs}
    )
    once = UNIFORM[part]["prompts"] * UNIFORM[part]["prompt_tokens"]
    shown = prefilled[0] if len(prefilled) == 1 else prefilled
    yield {"part": f"{part} {size}", "name": "prompt tokens prefilled", "value": shown, "unit": f"of {once} in all prompts"}


def limit_row(part: str, size: str, dtype: str, seconds: float, machine: Row) -> Row:
    """How near a run came to what the machine's arithmetic, and its memory, would allow."""
    flops, read_bytes = work(SHAPES[size], UNIFORM[part], weight_bytes=2 if dtype == "bfloat16" else 4)
    arithmetic_s, memory_s = flops / (1e9 * machine["gflops"][dtype]), read_bytes / (1e9 * machine["read_gb_s"])
    limits = f"% of the limit of arithmetic ({flops / 1e9:.1f} GFLOP, {machine['gflops'][dtype]:.0f} GFLOP/s), "
    limits += (
        f"{100 * memory_s / seconds:.0f} % of the memory's ({read_bytes / 1e9:.2f} GB, {machine['read_gb_s']:.0f} GB/s)"
    )
    fields = {"memory_percent": round(100 * memory_s / seconds, 1), "gflop": flops / 1e9, "gigabytes": read_bytes / 1e9}
    value = round(100 * arithmetic_s / seconds, 1)
    return {"part": f"limit {part} {size}", "name": f"afm-rl {dtype}", "value": value, "unit": limits, **fields, **machine}


def work(config: ModelConfig, workload: Row, *, weight_bytes: int) -> tuple[float, float]:
    """(floating-point operations, bytes) that a workload takes at the least.

    Every prompt is prefilled once up to its last token, which is the responses' first input. A step reads all weights
    once, a prompt's keys and values (float32) once for all of its responses, and writes and reads its logits.
    """
    P, G, S, new = (workload[name] for name in ("prompts", "responses", "prompt_tokens", "new_tokens"))
    head = config.vocab_size * config.dim
    contexts = P * S * (S - 1) / 2 + P * G * sum(S + t for t in range(new))
    flops = 2.0 * matrix_params(config) * (P * (S - 1) + P * G * new) + 2.0 * head * P * G * new
    flops += 4.0 * config.num_layers * config.num_heads * config.head_dim * contexts
    position_bytes = 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim
    cached = sum(P * S + P * G * t for t in range(new))
    weights = weight_bytes * (matrix_params(config) * (new + 1) + head * new)
    return flops, float(weights + position_bytes * cached + 2 * 4 * P * G * config.vocab_size * new)


def mixed_lengths() -> list[int]:
    """Log-normal new tokens of 512 requests, 8 to 512."""
    lengths = np.exp(np.random.default_rng(0).normal(np.log(64), 1.0, 512))
    return np.clip(np.round(lengths), 8, 512).astype(int).tolist()


def measure_mixed(folder: Path, size: str, args: argparse.Namespace) -> Iterator[Row]:
    """Useful tokens/s where lengths differ, as a share of those where all are equal and as many tokens are made."""
    lengths = mixed_lengths()
    shape = {"prompts": len(lengths), "responses": 1, "prompt_tokens": 32}
    mean = round(statistics.mean(lengths))
    workloads = {"mixed": {**shape, "new_tokens": lengths}, "uniform": {**shape, "new_tokens": mean}}
    with closing({"afm-rl bfloat16": ours(folder / size, "bfloat16")}) as everyone:
        results = race(everyone, workloads, args)
    speeds = {
        "mixed": sum(lengths) / median(results["mixed"]["afm-rl bfloat16"]),
        "uniform": len(lengths) * mean / median(results["uniform"]["afm-rl bfloat16"]),
    }
    names = {"mixed": f"lengths {min(lengths)} to {max(lengths)}", "uniform": f"all of {mean}"}
    for kind, speed in speeds.items():
        row = {"part": f"mixed {size}", "name": f"bfloat16, {names[kind]}", "value": round(speed, 1), "unit": "tokens/s"}
        yield row | ({"ratios": {"uniform": round(speed / speeds["uniform"], 2)}} if kind == "mixed" else {})


def measure_alone(folder: Path, size: str, args: argparse.Namespace) -> Iterator[Row]:
    """Fast mode: how often a request alone takes another token than in company, at the same seeds."""
    del args
    for dtype in DTYPES:
        with closing({"ours": ours(folder / size, dtype)}) as everyone:
            found = everyone["ours"].run({"alone": {**UNIFORM["distinct"], "seed": 0, "compared": 16}})
        share = 100 * found["differing"] / found["tokens"]
        name = f"{dtype}: {found['parted']} responses part in {found['same_context']} tokens"
        yield {"part": f"alone {size}", "name": name, "value": round(share, 2), "unit": "% of the tokens differ"}


def measure_deterministic(folder: Path, size: str, args: argparse.Namespace) -> Iterator[Row]:
    """tokens/s of the deterministic mode beside the fast one."""
    workloads = {part: UNIFORM[part] for part in ("shared", "distinct")}
    modes = {
        f"{dtype}{mark}": ours(folder / size, dtype, deterministic=bool(mark)) for dtype in DTYPES for mark in ("", " det.")
    }
    with closing(modes) as everyone:
        results = race(everyone, workloads, args)
    for part, workload in workloads.items():
        speeds = {name: counted_tokens(workload) / median(found) for name, found in results[part].items()}
        for name, speed in speeds.items():
            row = {"part": f"mode {part} {size}", "name": name, "value": round(speed, 1), "unit": "tokens/s"}
            fast = name.removesuffix(" det.")
            yield row | ({"ratios": {fast: round(speed / speeds[fast], 2)}} if fast != name else {})


def measure(folder: Path, args: argparse.Namespace) -> Iterator[Row]:
    """All rows of the chosen parts and sizes."""
    singles = {"mixed": measure_mixed, "alone": measure_alone, "deterministic": measure_deterministic}
    write_models(folder, args)
    for size in args.sizes:
        if set(args.only) & set(UNIFORM):
            yield from measure_uniform(folder, size, args)
        for part, run in singles.items():
            if part in args.only:
                yield from run(folder, size, args)


def arguments() -> argparse.Namespace:
    """The command line."""
    parts = [*UNIFORM, *OTHERS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", metavar="PATH", help="an interpreter that has torch and transformers")
    parser.add_argument("--llamacpp-python", metavar="PATH", help="an interpreter that has llama-cpp-python, gguf, numpy")
    parser.add_argument("--only", type=lambda text: text.split(","), default=parts, help=",".join(parts))
    parser.add_argument("--sizes", type=lambda text: text.split(","), default=list(SHAPES), help=",".join(SHAPES))
    names = "how the peers' names may begin, such as: transformers bfloat16,llama.cpp"
    parser.add_argument("--peers", type=lambda text: text.split(","), default=["transformers", "llama.cpp"], help=names)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2, help="rounds that compile and are not counted")
    parser.add_argument("--models", metavar="FOLDER", help="where the models are written, and found the next time")
    parser.add_argument("--json", metavar="FILE", help="write the rows here too")
    args = parser.parse_args()
    if unknown := (set(args.only) - set(parts)) | (set(args.sizes) - set(SHAPES)):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; --only takes {', '.join(parts)}, --sizes {', '.join(SHAPES)}")
    for option, peer in (("torch_python", "transformers"), ("llamacpp_python", "llama.cpp")):
        if not getattr(args, option):
            print(f"no --{option.replace('_', '-')}: {peer} is skipped", flush=True)
    return args


def main() -> None:
    """Measure the chosen parts, print the table as it comes and write the rows as JSON."""
    args = arguments()
    everything: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        for row in measure(Path(args.models or temporary), args):
            everything.append(row)
            against = "".join(f"  {ratio}x {name}" for name, ratio in row.get("ratios", {}).items())
            fastest = f" (fastest {row['fastest']})" if "fastest" in row else ""
            print(f"{row['part']:<15} {row['name']:<42} {row['value']:>10} {row['unit']}{fastest}{against}", flush=True)
            if args.json:
                Path(args.json).write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
