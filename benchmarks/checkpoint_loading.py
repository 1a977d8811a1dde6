"""Loading a checkpoint from the page cache, beside reading the same files into NumPy in one go: speed and peak memory.

    .venv/bin/python benchmarks/checkpoint_loading.py [--gib 2] [--repeat 5] [--folder FOLDER] [--json]

A random 24-layer model of about --gib GiB is written in bfloat16 as sharded safetensors, loaded once unmeasured (so that
the files are cached and JAX is started), then loaded and read in turn. The peer is `np.fromfile` of every file: bytes in
memory, no model. Goal: at least half its speed, and a peak beyond the final arrays under the largest tensor plus 200 MB.

Memory is the process's resident set, mapped pages of files included: the kernel's peak (VmHWM, reset before) less what was
resident before and less the bytes of the final arrays. `load_pretrained` reads instead of mapping, so that cached
file pages, which belong to nobody, are not in it.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from afm_rl.config import ModelConfig
from afm_rl.huggingface import load_pretrained
from afm_rl.huggingface_config import CONFIG_FILE, to_hf_config, write_json
from afm_rl.huggingface_files import places, write_weights
from afm_rl.safetensors_file import LazyArray
from afm_rl.weights import leaves

MIB = 2**20


def main() -> None:
    """Write the checkpoint, measure, print one line per figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", help="where the checkpoint is written (default: the system's temporary folder)")
    parser.add_argument("--json", action="store_true", help="one JSON line per figure")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        largest = write_checkpoint(Path(folder), args.gib)
        for dtype in ("bfloat16", "float32"):
            for row in measure(Path(folder), dtype, args.repeat, largest):
                shown = f"{row['name']:<58} {row['value']:>9} {row['unit']:<5} peer {row['peer_value']} ratio {row['ratio']}"
                print(json.dumps(row) if args.json else shown, flush=True)


def write_checkpoint(folder: Path, gib: float) -> int:
    """A random bfloat16 model of 24 layers and about `gib` GiB in files of 512 MiB; returns its largest tensor's bytes."""
    dim = max(1, round(np.sqrt(gib * 2**30 / 2 / (24 * 11.5 + 24)) / 512)) * 512
    config = ModelConfig(24 * dim, dim, 3 * dim, 24, dim // 128, dim // 512, 128)
    rng = np.random.default_rng(0)

    def lazy(shape: tuple[int, ...]) -> LazyArray:
        dtype = np.dtype(ml_dtypes.bfloat16)
        return LazyArray(shape, dtype, lambda: rng.integers(0, 2**14, shape, np.uint16).view(dtype))

    tensors = {name: lazy(place.shape) for name, place in places(config).items()}
    write_weights(folder, tensors, max_shard_bytes=512 * MIB)
    write_json(folder / CONFIG_FILE, to_hf_config(config, dtype="bfloat16"))
    return max(int(np.prod(tensor.shape)) * 2 for tensor in tensors.values())


def measure(folder: Path, dtype: str, repeat: int, largest_bytes: int) -> list[dict[str, Any]]:
    """Medians of `repeat` loads and reads in turn, and the peak memory of the first load."""
    files = sorted(folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    load_pretrained(folder, dtype)
    gc.collect()  # modules hold references to themselves
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident_bytes("VmRSS")
    model = load_pretrained(folder, dtype)
    jax.block_until_ready(model.params)
    peak, after = resident_bytes("VmHWM") - before, resident_bytes("VmRSS") - before
    arrays = sum(leaf.nbytes for _, leaf in leaves(model.params))
    del model
    gc.collect()
    loads, reads = [], []
    for _ in range(repeat):
        start = time.perf_counter()
        model = load_pretrained(folder, dtype)
        jax.block_until_ready(model.params)
        loads.append(time.perf_counter() - start)
        del model
        gc.collect()
        start = time.perf_counter()
        read = [np.fromfile(file, np.uint8) for file in files]
        reads.append(time.perf_counter() - start)
        del read
    load_s, read_s = statistics.median(loads), statistics.median(reads)
    name = f"load {size / 2**30:.2f} GiB of bfloat16 as {dtype}"
    return [
        figure(f"{name}: speed", round(size / load_s / 2**30, 2), "GiB/s", round(size / read_s / 2**30, 2), read_s / load_s),
        figure(f"{name}: peak beyond the arrays", round((peak - arrays) / MIB, 1), "MiB"),
        figure(f"{name}: resident beyond the arrays afterwards", round((after - arrays) / MIB, 1), "MiB"),
        figure(f"{name}: arrays", round(arrays / MIB), "MiB"),
        figure("largest tensor of the files", round(largest_bytes / MIB, 1), "MiB"),
    ]


def figure(
    name: str, value: float, unit: str, peer_value: float | None = None, ratio: float | None = None
) -> dict[str, Any]:
    """One row of the output; the peer is np.fromfile."""
    peer = None if peer_value is None else "numpy.fromfile"
    rounded = None if ratio is None else round(ratio, 2)
    return {"name": name, "value": value, "unit": unit, "peer": peer, "peer_value": peer_value, "ratio": rounded}


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
