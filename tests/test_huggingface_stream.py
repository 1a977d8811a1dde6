"""Streaming: every sharding gives the bits of the file, each process reads its part only, nothing is held twice.

What needs 8 devices or 2 processes runs in children: this file is their program too.
"""

import ctypes
import gc
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from afm_rl.config import ModelConfig
from afm_rl.huggingface import load_params, load_pretrained, save_pretrained
from afm_rl.huggingface_stream import StoredLeaf, fill_by_layers
from afm_rl.parameters import ParamSpec, param_specs
from afm_rl.safetensors_file import open_safetensors, read_safetensors, write_safetensors
from afm_rl.weights import leaves

MIB = 2**20
CONFIG = ModelConfig(512, 256, 384, 8, 4, 2, 64, rope_base=1e6, tie_embeddings=False, max_positions=64)
#: 98 MiB of float32; twice as much on eight devices, because the layout repeats it over "data".
LARGE = CONFIG.replace(num_layers=16, dim=512, ffn_dim=768)
#: Specs of matrices: rows, columns, both, the layers, nothing; vectors take the first axis that fits.
LAYOUTS = {
    "rows": P(None, "fsdp", None),
    "columns": P(None, None, "fsdp"),
    "both": P(None, "fsdp", "tensor"),
    "layers": P("data", ("fsdp", "tensor"), None),
    "replicated": P(),
}


def draw(config, dtype):
    rng = np.random.default_rng(0)

    def values(spec):
        return rng.standard_normal(spec.shape, np.float32).astype(jnp.dtype(dtype))

    return jax.tree.map(values, param_specs(config), is_leaf=lambda node: isinstance(node, ParamSpec))


def shardings(config, mesh, layout):
    """`layout` for stacked matrices, without its first axis for tables, only the layer axis for vectors."""

    def one(path, spec):
        rank = len(spec.shape)
        parts = tuple(LAYOUTS[layout]) + (None,) * 3
        wanted = parts[:rank] if path.startswith("layers/") and rank == 3 else parts[1:3] if rank == 2 else (None,)
        if path.startswith("layers/") and rank == 2:
            wanted = (parts[0], None)
        return NamedSharding(mesh, P(*wanted))

    specs = param_specs(config)
    flat = {path: one(path, spec) for path, spec in leaves(specs)}
    return jax.tree.unflatten(
        jax.tree.structure(specs, is_leaf=lambda node: isinstance(node, ParamSpec)), _in_tree_order(specs, flat)
    )


def _in_tree_order(specs, flat):
    paths, _ = jax.tree.flatten_with_path(specs, is_leaf=lambda node: isinstance(node, ParamSpec))
    return [flat["/".join(key.key for key in path)] for path, _ in paths]


def assert_same(loaded, expected):
    for path, leaf in leaves(loaded):
        np.testing.assert_array_equal(np.asarray(leaf), dict(leaves(expected))[path], err_msg=path)


def run_child(*arguments, devices, **environment):
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    env |= {"PYTHONPATH": str(Path(__file__).parents[1]), **environment}
    return subprocess.Popen([sys.executable, __file__, *map(str, arguments)], env=env, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A bfloat16 checkpoint in several files."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_pretrained(draw(CONFIG, "bfloat16"), folder, config=CONFIG, max_shard_bytes=2 * MIB)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    return folder


def answer(out):
    """The JSON object in what a child printed; the library between its processes prints too, even into the same line."""
    return json.loads(re.findall(r"\{.*\}", out)[-1])


@pytest.mark.slow
def test_every_layout_on_eight_devices(checkpoint, tmp_path):
    """Bits and shardings as asked, same dtype and cast; saving the shards gives the checkpoint."""
    child = run_child("layouts", checkpoint, tmp_path, devices=8)
    out, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    result = answer(out)
    assert result["layouts"] == [*LAYOUTS]
    assert load_params(tmp_path / "saved")[0] == CONFIG
    assert_same(load_params(tmp_path / "saved", dtype="bfloat16")[1], load_params(checkpoint, dtype="bfloat16")[1])


@pytest.mark.slow
def test_memory_is_never_doubled(checkpoint, tmp_path):
    """The kernel's own peak, mapped file pages included, is the final arrays and little more (a second copy: 98 MiB)."""
    save_pretrained(draw(LARGE, "bfloat16"), tmp_path, config=LARGE)
    child = run_child("memory", checkpoint, tmp_path, devices=8)
    out, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    result = answer(out)
    assert result["arrays_mib"] > 150
    assert -20 < result["peak_above_arrays_mib"] < 40


@pytest.mark.slow
def test_two_processes_read_and_write_their_part(checkpoint, tmp_path):
    """Each process reads about half of the files; gathered again and written by process 0, they are the same."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [run_child("process", checkpoint, tmp_path, rank, port, devices=2) for rank in range(2)]
    results = [answer(child.communicate(timeout=180)[0]) for child in children]
    assert [child.returncode for child in children] == [0, 0]
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    for result in results:
        assert 0.4 * size < result["read_bytes"] < 0.65 * size
    saved = {name: array for file in tmp_path.glob("*.safetensors") for name, array in read_safetensors(file).items()}
    original = {name: array for file in checkpoint.glob("*.safetensors") for name, array in read_safetensors(file).items()}
    assert saved.keys() == original.keys()
    for name, array in saved.items():
        assert array.tobytes() == original[name].tobytes(), name


def test_layer_by_layer_fill_is_exact(tmp_path):
    """The way taken on accelerators, run here: updates of a donated array, also of a region of it."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3, 6, 10), np.float32)
    write_safetensors(tmp_path / "x", {str(i): row for i, row in enumerate(values)} | {"table": values[0]})
    stored = open_safetensors(tmp_path / "x")
    leaf = StoredLeaf(values.shape, [stored[str(i)] for i in range(3)], stacked=True)
    region = (slice(1, 3), slice(2, 5), slice(0, 10))
    for array in fill_by_layers(leaf, region, jnp.bfloat16, [None, None]):
        np.testing.assert_array_equal(np.asarray(array), values[1:, 2:5].astype(jnp.bfloat16))
    table = StoredLeaf(values[0].shape, [stored["table"]], stacked=False)
    (array,) = fill_by_layers(table, (slice(0, 6), slice(3, 4)), np.dtype(np.float32), [None])
    np.testing.assert_array_equal(np.asarray(array), values[0][:, 3:4])


def test_loaded_weights_may_be_donated(checkpoint):
    """A training step donates its parameters: the adopted host memory must neither be written nor freed under it."""
    expected = load_params(checkpoint)[1]
    model = load_pretrained(checkpoint)
    doubled = jax.jit(lambda params: jax.tree.map(lambda leaf: 2 * leaf, params), donate_argnums=0)(model.params)
    for path, leaf in leaves(doubled):
        np.testing.assert_array_equal(np.asarray(leaf), 2 * dict(leaves(expected))[path])


def test_shardings_must_fit_the_model(checkpoint):
    """A leaf too few is named, before anything is read."""
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"))
    with pytest.raises(ValueError, match="final_norm"):
        load_pretrained(checkpoint, shardings=lambda c: {**shardings(c, mesh, "rows"), "final_norm": {}})


def _memory_kib(field):
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def layouts_child(checkpoint, scratch):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
    expected = {dtype: load_params(checkpoint, dtype=dtype)[1] for dtype in ("bfloat16", "float32")}
    for layout in LAYOUTS:
        for dtype in expected:
            wanted = shardings(CONFIG, mesh, layout)
            model = load_pretrained(checkpoint, dtype, shardings=lambda config: shardings(config, mesh, layout))  # noqa: B023
            assert_same(model.params, expected[dtype])
            for path, leaf in leaves(model.params):
                assert leaf.sharding == dict(leaves(wanted))[path], path
                assert leaf.dtype == dtype
                for shard in leaf.addressable_shards:
                    np.testing.assert_array_equal(shard.data, dict(leaves(expected[dtype]))[path][shard.index])
    model = load_pretrained(checkpoint, "bfloat16", shardings=shardings(CONFIG, mesh, "both"))
    save_pretrained(model, scratch / "saved", max_shard_bytes=3 * MIB)
    print(json.dumps({"layouts": [*LAYOUTS]}))


def memory_child(checkpoint, large):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
    where = shardings(LARGE, mesh, "both")
    load_pretrained(checkpoint, shardings=shardings(CONFIG, mesh, "both"))  # starts everything
    gc.collect()  # modules hold references to themselves
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that is kept would hide what the load takes
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _memory_kib("VmRSS")
    model = load_pretrained(large, shardings=where)
    peak = _memory_kib("VmHWM")
    arrays = sum(shard.data.nbytes for _, leaf in leaves(model.params) for shard in leaf.addressable_shards)
    print(
        json.dumps(
            {
                "arrays_mib": arrays / MIB,
                "peak_above_arrays_mib": (peak - before) / 1024 - arrays / MIB,
            }
        )
    )


def process_child(checkpoint, scratch, rank, port):
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank), initialization_timeout=60)
    mesh = jax.make_mesh((1, 4, 1), ("data", "fsdp", "tensor"))
    before = _read_bytes()
    model = load_pretrained(checkpoint, "bfloat16", shardings=lambda config: shardings(config, mesh, "rows"))
    read = _read_bytes() - before
    save_pretrained(model, scratch, max_shard_bytes=3 * MIB)
    print(json.dumps({"read_bytes": read}))


def _read_bytes():
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


if __name__ == "__main__":
    kind, *paths = sys.argv[1:]
    if kind in ("layouts", "memory"):
        {"layouts": layouts_child, "memory": memory_child}[kind](*map(Path, paths))
    else:
        process_child(Path(paths[0]), Path(paths[1]), *paths[2:])
