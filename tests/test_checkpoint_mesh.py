"""Checkpoints across meshes and processes: the same bits and the same next loss, whoever saved and whoever restores."""

import functools
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

#: One process of a group: trains two steps of a real model on a mesh and saves, or restores; then one step more.
WORKER = """
import hashlib, json, os, sys, time
import jax, numpy as np
from jax.experimental import multihost_utils

from afm_rl.checkpoint import CheckpointError, Checkpoints, restore
from afm_rl.config import ModelConfig
from afm_rl.parameters import axes_like_params, init_params
from afm_rl.policy_losses import supervised
from afm_rl.recipe import OptimizerSpec
from afm_rl.sharding import MeshShape, make_mesh, put, shard_batch
from afm_rl.training import create_state, make_train_step

job = json.loads(sys.argv[1])
if job["processes"] > 1:
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(job["coordinator"], job["processes"], job["process"], initialization_timeout=60)
mesh = make_mesh(MeshShape(data=job["mesh"][0], fsdp=job["mesh"][1]))

def on_mesh(path, leaf):
    return put(np.asarray(leaf), axes_like_params(path, np.ndim(leaf)), mesh)

def batch(step):
    rng = np.random.default_rng(step)
    host = {"tokens_BT": rng.integers(1, 64, size=(8, 16)).astype(np.int32), "mask_BT": np.ones((8, 16), np.float32)}
    host["mask_BT"][:, 0] = 0
    return shard_batch(host, mesh)

def bits(tree):
    whole = lambda x: x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
    return hashlib.sha256(b"".join(np.asarray(whole(x)).tobytes() for x in jax.tree.leaves(tree))).hexdigest()

config = ModelConfig(64, 32, 64, 2, 4, 2, 8)
optimizer = OptimizerSpec("afm", 0.01).build(width=config.dim)
step = make_train_step(supervised(config, dropout=0.1), optimizer, seed=3)
params = jax.tree_util.tree_map_with_path(on_mesh, init_params(config, jax.random.key(0)))
with jax.set_mesh(mesh):
    state = create_state(params, optimizer)
own = {"key": jax.random.key(7), "host": np.arange(5), "n": 4}  # what every process holds for itself
checkpoints, found = Checkpoints(job["folder"], keep=1, timeout_s=job["timeout_s"]), None
with jax.set_mesh(mesh):
    if job["do"] == "save":
        for number in range(2):
            state, _ = step(state, {}, batch(number))
            checkpoints.save(number + 1, {"state": state, "own": own}, {"next": number + 1})
        checkpoints.wait()
    elif job["do"] == "restore":
        found = checkpoints.latest()
        restored = restore(found, like={"state": state, "own": own})
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding == b.sharding, restored["state"], state)))
        state = restored["state"]
        assert restored["own"]["host"].tolist() == [0, 1, 2, 3, 4] and restored["own"]["n"] == 4
        assert (jax.random.key_data(restored["own"]["key"]) == jax.random.key_data(own["key"])).all()
    elif job["process"] == 0:
        time.sleep(job["timeout_s"] + 5)
        os._exit(0)
    else:
        try:
            checkpoints.save(1, {"state": state})
        except CheckpointError as error:
            print(json.dumps({"error": str(error)}), flush=True)
        os._exit(0)
    saved, sharded = bits(state), sum(not x.is_fully_replicated for x in jax.tree.leaves(state))
    state, metrics = step(state, {}, batch(2))
checkpoints.close()
loss = float(metrics["loss"])
print(json.dumps({"bits": saved, "loss": loss, "after": bits(state), "step": found and found.step, "sharded": sharded}))
"""


@dataclass(frozen=True)
class Shape:
    """How many processes with how many virtual devices each, and the mesh (data, fsdp) over all of them."""

    processes: int
    devices: int
    mesh: tuple[int, int]


TWO_BY_TWO = Shape(2, 2, (1, 4))
EIGHT = Shape(1, 8, (2, 4))
ONE = Shape(1, 1, (1, 1))


def run(do: str, folder: Path, shape: Shape, timeout_s: float = 60.0) -> list[dict[str, Any]]:
    """What each process of a group printed last. Every wait ends: the group is killed after two minutes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    job = {"do": do, "folder": str(folder), "coordinator": coordinator, "timeout_s": timeout_s}
    job |= {"processes": shape.processes, "mesh": shape.mesh}
    flags = f"--xla_force_host_platform_device_count={shape.devices}"
    group = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, json.dumps(job | {"process": process})],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(shape.processes)
    ]
    try:
        ended = [process.communicate(timeout=120) for process in group]
    finally:
        for process in group:
            process.kill()
    for process, (_, errors) in zip(group, ended, strict=True):
        assert process.returncode == 0, errors[-4000:]
    # The library between the processes prints too, even into the same line.
    return [json.loads(re.findall(r"\{.*\}", printed)[-1]) if printed else {} for printed, _ in ended]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Shape], tuple[Path, dict[str, Any]]]:
    """The folder a group of this shape saved into, and what its processes, who agree, say of the state and the next step."""

    @functools.cache
    def save(shape: Shape) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("saved")
        first, *others = run("save", folder, shape)
        assert all(other == first for other in others)
        assert first["sharded"] > 20
        assert [path.name for path in folder.iterdir()] == ["step-000000000002"]
        return folder, first

    return save


@pytest.mark.parametrize(
    ("saver", "restorer"),
    [
        (TWO_BY_TWO, ONE),
        (TWO_BY_TWO, Shape(1, 8, (8, 1))),
        (TWO_BY_TWO, TWO_BY_TWO),
        (EIGHT, TWO_BY_TWO),
        (EIGHT, EIGHT),
    ],
    ids=str,
)
def test_any_mesh_and_process_count_restores(saved, saver: Shape, restorer: Shape) -> None:
    """Guards moving a run: bit-equal state and the same next loss; on the shape that saved, the same next state too."""
    folder, expected = saved(saver)
    for found in run("restore", folder, restorer):
        assert (found["step"], found["bits"]) == (2, expected["bits"])
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        if restorer == saver:
            assert (found["loss"], found["after"]) == (expected["loss"], expected["after"])


def test_a_process_that_does_not_come_is_waited_for_until_the_deadline(tmp_path: Path) -> None:
    """Guards against a save that hangs for ever: the message says who waited, for what, and why that may be."""
    _, second = run("alone", tmp_path / "run", TWO_BY_TWO, timeout_s=3.0)
    assert re.search(r"process 1 waited \d+ s for the others at 'start' of a checkpoint in ", second["error"])
