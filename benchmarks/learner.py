"""The learner against PyTorch on this machine, side by side in one run: what `docs/measurements.md` reports of training.

    .venv/bin/python benchmarks/learner.py --torch-python /path/to/torch/python [--only train,memory,compile,size] [--json F]

Training compares tokens/s of a step (next-token loss, forward, backward, AdamW) with PyTorch eager and compiled, in float32
and bfloat16 autocast. All contestants are built and compiled first and stay alive; they then run in turn, round after
round, so that whatever else the machine does falls on all alike; how many cores that took is reported (above 0.1: measure
again). Ratios are of medians over all rounds. The peer's
interpreter needs torch and transformers; without it only our side runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contestant import Contestant, read_result

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from afm_rl.config import ModelConfig  # noqa: E402 (the benchmark runs from a checkout, installed or not)
from afm_rl.flops import train_flops_per_token  # noqa: E402
from afm_rl.malloc import LEARNER_TUNABLES  # noqa: E402

BATCH, TOKENS = 16, 128
THREADS = os.cpu_count() or 1
SHAPES = {
    "tiny": {
        "vocab_size": 2048,
        "dim": 128,
        "ffn_dim": 384,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
    },
    "small": {
        "vocab_size": 8192,
        "dim": 512,
        "ffn_dim": 1536,
        "num_layers": 8,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 64,
    },
}
STEPS = {"tiny": 10, "small": 2}
PEERS = {
    f"PyTorch {'compiled' if compiled else 'eager'} {mode}": {"mode": mode, "compiled": compiled}
    for compiled in (False, True)
    for mode in ("float32", "autocast")
}
OURS = ("bfloat16", "float32")
#: Tokens a step in the table of sizes: the same at every context.
SIZE_TOKENS = 4096
Row = dict[str, Any]


def our_command(job: Row) -> list[str]:
    return [sys.executable, str(HERE / "learner_worker.py"), json.dumps({"batch": BATCH, "tokens": TOKENS, **job})]


def our_environment() -> dict[str, str]:
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": LEARNER_TUNABLES, "PYTHONPATH": os.pathsep.join(paths)}


def ask(job: Row) -> dict[str, Any]:
    """One measurement of ours in a process of its own."""
    process = subprocess.Popen(our_command(job), stdout=subprocess.PIPE, text=True, env=our_environment(), cwd=HERE.parent)
    result = read_result(process)
    process.wait(timeout=60)
    return result


def contestants(size: str, args: argparse.Namespace) -> dict[str, Contestant]:
    """Ours and, given its interpreter, every variant of the peer; not yet compiled."""
    everyone = {
        f"afm-rl {dtype}": Contestant(
            our_command({"kind": "train", "shape": SHAPES[size], "dtype": dtype}), our_environment()
        )
        for dtype in OURS
    }
    environment = {**os.environ, **({"GLIBC_TUNABLES": LEARNER_TUNABLES} if args.torch_malloc == "ours" else {})}
    for name, variant in PEERS.items() if args.torch_python else ():
        job = {**variant, "shape": SHAPES[size], "batch": BATCH, "tokens": TOKENS, "threads": THREADS}
        command = [args.torch_python, str(HERE / "peers" / "train_torch.py"), json.dumps(job)]
        everyone[name] = Contestant(command, environment)
    return everyone


def race(size: str, args: argparse.Namespace) -> dict[str, Contestant]:
    """All contestants over all rounds, in turn; two steps each to compile and warm up first."""
    everyone = contestants(size, args)
    try:
        for contestant in everyone.values():
            contestant.run(2)
        for _ in range(args.rounds):
            for contestant in everyone.values():
                contestant.measure(STEPS[size])
    finally:
        for contestant in everyone.values():
            contestant.close()
    return everyone


def ratio_rows(part: str, unit: str, values: dict[str, float], *, higher_is_better: bool) -> list[Row]:
    """One row a contestant; ours carry the best peer and the ratio to it (above 1: ours is better)."""
    peers = {name: value for name, value in values.items() if name in PEERS}
    best = (max if higher_is_better else min)(peers, key=lambda name: peers[name]) if peers else None
    rows = []
    for name, value in values.items():
        row: Row = {"part": part, "name": name, "value": round(value, 1), "unit": unit, "peer": None, "ratio": None}
        if best and name not in PEERS:
            ratio = value / peers[best] if higher_is_better else peers[best] / value
            row |= {"peer": best, "ratio": round(ratio, 2)}
        rows.append(row)
    return rows


def measure_train(args: argparse.Namespace) -> Iterator[Row]:
    """Tokens/s and MFU of both sizes, peak memory at small, and the parts of a step."""
    gflops = ask({"kind": "peak", "shape": SHAPES["tiny"], "dtype": "bfloat16"})["gflops"]
    yield {"part": "peak", "name": "matrix product, bfloat16 to float32", "value": round(gflops), "unit": "GFLOP/s"}
    for size in args.sizes:
        everyone = race(size, args)
        speeds = {name: BATCH * TOKENS / statistics.median(c.seconds) for name, c in everyone.items()}
        yield from ratio_rows(f"train {size}", "tokens/s", speeds, higher_is_better=True)
        others = max(0.0, statistics.median(share for c in everyone.values() for share in c.others))
        yield {"part": f"others {size}", "name": "cores that other processes used", "value": round(others, 2), "unit": ""}
        flops = train_flops_per_token(ModelConfig(**SHAPES[size]), TOKENS)
        for name, speed in speeds.items():
            mfu = round(100 * speed * flops / (1e9 * gflops), 1)
            yield {"part": f"MFU {size}", "name": name, "value": mfu, "unit": "% of the peak"}
        if size == "small":
            yield from memory_rows(everyone)
        for name, ms in ask({"kind": "parts", "shape": SHAPES[size], "dtype": "bfloat16"}).items():
            yield {"part": f"parts {size}", "name": name, "value": round(ms, 1), "unit": "ms"}


def memory_rows(everyone: dict[str, Contestant]) -> list[Row]:
    peaks = {name: contestant.peak_mib for name, contestant in everyone.items()}
    return ratio_rows("memory small", "MiB at its peak", peaks, higher_is_better=False)


def measure_memory(args: argparse.Namespace) -> Iterator[Row]:
    """Peak resident memory of the training processes at small (part of `train`, when that is measured)."""
    if "train" not in args.only or "small" not in args.sizes:
        yield from memory_rows(race("small", argparse.Namespace(**{**vars(args), "rounds": 1})))


def measure_compile(args: argparse.Namespace) -> Iterator[Row]:
    """Seconds to trace and compile the step of 4 and of 16 layers: as the product runs them, and both scanned."""
    for label, limit in (("as run", None), ("both scanned", 0)):
        seconds: dict[int, list[float]] = {4: [], 16: []}
        for _ in range(args.rounds):
            for layers, found in seconds.items():
                shape = {**SHAPES["small"], "num_layers": layers}
                job = {"kind": "compile", "shape": shape, "dtype": "bfloat16", "max_unrolled": limit}
                found.append(ask(job)["seconds"])
        few, many = statistics.median(seconds[4]), statistics.median(seconds[16])
        name = f"16 layers against 4 ({few:.2f} s), {label}"
        yield {"part": "compile", "name": name, "value": round(many, 2), "unit": "s", "ratio": round(many / few, 2)}


def measure_size(args: argparse.Namespace) -> Iterator[Row]:
    """Time per token over width and context, two layers, and the share of attention in it."""
    del args
    for dim in (128, 256, 512, 1024):
        for tokens in (256, 1024, 4096):
            heads = max(2, dim // 64)
            shape = {"vocab_size": 2048, "dim": dim, "ffn_dim": 3 * dim, "num_layers": 2, "num_heads": heads}
            shape |= {"num_kv_heads": heads // 2, "head_dim": dim // heads}
            job = {"kind": "size", "shape": shape, "dtype": "bfloat16", "batch": SIZE_TOKENS // tokens, "tokens": tokens}
            found = ask(job)
            name = f"d {dim}, context {tokens}: attention {100 * found['attention']:.0f} %"
            yield {"part": "size", "name": name, "value": round(found["us_per_token"], 1), "unit": "us/token"}


def main() -> None:
    """Measure the chosen parts, print the table as it comes and write the rows as JSON."""
    parts = {"train": measure_train, "memory": measure_memory, "compile": measure_compile, "size": measure_size}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", metavar="PATH", help="an interpreter that has torch and transformers")
    parser.add_argument(
        "--torch-malloc", choices=["default", "ours"], default="default", help="the peer's allocator settings"
    )
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(parts), help=",".join(parts))
    parser.add_argument("--sizes", type=lambda text: text.split(","), default=list(SHAPES), help="of train: tiny,small")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="write the rows here too")
    args = parser.parse_args()
    if unknown := (set(args.only) - set(parts)) | (set(args.sizes) - set(SHAPES)):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; --only takes {', '.join(parts)}, --sizes {', '.join(SHAPES)}")
    if not args.torch_python:
        print("no --torch-python: the peer is skipped", flush=True)
    everything: list[Row] = []
    for name in args.only:
        for row in parts[name](args):
            everything.append(row)
            against = f"  {row['ratio']}x {row.get('peer') or ''}" if row.get("ratio") else ""
            print(f"{row['part']:<13} {row['name']:<55} {row['value']:>10} {row['unit']}{against}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
