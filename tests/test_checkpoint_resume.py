"""Exact resume of a real training run: 2n steps equal n, a save, a restore in another process, and n more."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

N = 4
#: Trains the real model with dropout, from the newest checkpoint to a step; prints every loss and a digest of the state.
TRAIN = """
import hashlib, json, sys
import jax, numpy as np
from afm_rl.checkpoint import Checkpoints, latest, restore
from afm_rl.config import ModelConfig
from afm_rl.parameters import init_params
from afm_rl.policy_losses import supervised
from afm_rl.recipe import OptimizerSpec
from afm_rl.training import create_state, make_train_step

folder, until, every = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
config = ModelConfig(64, 32, 64, 2, 4, 2, 8)
optimizer = OptimizerSpec("afm", 0.01, warmup_steps=2, total_steps=8, weight_decay=0.1).build(width=config.dim)
step = make_train_step(supervised(config, dropout=0.1), optimizer, seed=3)
tree = {"state": create_state(init_params(config, jax.random.key(0)), optimizer), "key": jax.random.key(9)}
found = latest(folder)
if found:
    tree = restore(found, like=tree)
losses, start = [], found.metadata["next_step"] if found else 0
with Checkpoints(folder) as checkpoints:
    for number in range(start, until):
        tree["key"], drawn = jax.random.split(tree["key"])  # a stream of randomness beside the step's own
        tokens_BT = np.asarray(jax.random.randint(drawn, (4, 16), 1, 64, dtype="int32"))
        batch = {"tokens_BT": tokens_BT, "mask_BT": np.ones((4, 16), np.float32)}
        tree["state"], metrics = step(tree["state"], {}, batch)
        losses.append(float(metrics["loss"]))
        if (number + 1) % every == 0:
            checkpoints.save(number + 1, tree, {"next_step": number + 1})
host = [np.asarray(x) for x in jax.tree.leaves((tree["state"], jax.random.key_data(tree["key"])))]
digest = hashlib.sha256(b"".join(x.tobytes() for x in host)).hexdigest()
print(json.dumps({"start": start, "losses": losses, "digest": digest}))
"""


def train(folder: Path, *, until: int, every: int) -> dict[str, Any]:
    command = [sys.executable, "-c", TRAIN, str(folder), str(until), str(every)]
    return json.loads(subprocess.run(command, check=True, timeout=120, capture_output=True, text=True).stdout)


@pytest.mark.slow
def test_2n_steps_equal_n_and_n_in_another_process(tmp_path: Path) -> None:
    """Guards parameters, optimizer state and both streams of randomness, to the bit; saving does not disturb training."""
    whole = train(tmp_path / "whole", until=2 * N, every=100)
    first = train(tmp_path / "cut", until=N, every=2)
    second = train(tmp_path / "cut", until=2 * N, every=2)
    assert (first["start"], second["start"]) == (0, N)
    assert first["losses"] + second["losses"] == whole["losses"]
    assert second["digest"] == whole["digest"] != first["digest"]
    assert len(set(whole["losses"])) == 2 * N
