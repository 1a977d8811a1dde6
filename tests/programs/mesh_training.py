"""Run by tests/test_mesh.py with 8 virtual devices: trains one model on every mesh and writes what came out.

Usage: mesh_training.py OUTPUT_FOLDER. Writes MESH.npz for each mesh (losses, gradients, weights after two steps) and
layout.json (how the parameters, gradients and moments lie).
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from afm_rl.compute import Compute
from afm_rl.config import ModelConfig
from afm_rl.optimizer import afm_optimizer
from afm_rl.packing import Example, microbatches, pack
from afm_rl.parameters import init_params, param_shardings
from afm_rl.policy_losses import supervised
from afm_rl.schedules import constant
from afm_rl.sharding import MeshShape, make_mesh, shard_batch, to_host
from afm_rl.training import create_state, gradient, make_accumulated_step, make_train_step

CONFIG = ModelConfig(64, 16, 32, 2, 4, 2, 8)
MESHES = {
    "1x1x1x1": MeshShape(),
    "8x1x1x1": MeshShape(data=8),
    "1x8x1x1": MeshShape(fsdp=8),
    "1x1x8x1": MeshShape(seq=8),
    "1x1x1x8": MeshShape(tensor=8),
    "2x2x2x1": MeshShape(2, 2, 2, 1),
    "1x2x2x2": MeshShape(1, 2, 2, 2),
    "2x1x2x2": MeshShape(2, 1, 2, 2),
}


def batches(count: int) -> list[dict[str, np.ndarray]]:
    """Packed documents of 3 to 14 tokens, 8 rows of 16: several to a row, borders everywhere, some padding."""
    rng = np.random.default_rng(0)
    rows = pack((Example(rng.integers(1, 64, n)) for n in rng.integers(3, 15, 400)), length=16, pad_id=0)
    return [rows.take(np.arange(8 * i, 8 * (i + 1))) for i in range(count)]


def run(shape: MeshShape, compute: Compute) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Two AFM steps, the second by two microbatches, and the gradient of the third batch."""
    loss = supervised(CONFIG, z_loss=1e-2, dropout=0.1, compute=compute)
    optimizer = afm_optimizer(peak_lr=0.01, schedule=constant(), weight_decay=1e-3, width=16)
    mesh = make_mesh(shape) if shape.size > 1 else None
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        params = jax.jit(lambda seed: init_params(CONFIG, jax.random.key(seed)))(np.uint32(3))
        state = create_state(params, optimizer)
        first, second, third = batches(3)
        state, metrics = make_train_step(loss, optimizer)(state, {}, shard_batch(first, mesh))
        parts = [shard_batch(part, mesh) for part in microbatches(second, max_tokens=64)]
        state, _ = make_accumulated_step(supervised(CONFIG, compute=compute), optimizer)(state, {}, parts)
        grads, last = jax.jit(lambda p, b: gradient(loss, p, {}, b, jax.random.key(1)))(
            state.params, shard_batch(third, mesh)
        )
        layout = {} if mesh is None else layouts(state, grads, mesh)
        values = {"params": to_host(state.params), "grads": to_host(grads), "losses": [metrics["loss"], last["loss"]]}
        return {jax.tree_util.keystr(p): np.asarray(v) for p, v in jax.tree_util.tree_leaves_with_path(values)}, layout


def layouts(state: Any, grads: Any, mesh: Any) -> dict[str, Any]:
    """Whether parameters, gradients and second moments lie as declared, and the share of a weight that a device holds."""
    declared = jax.tree.leaves(param_shardings(CONFIG, mesh))

    def as_declared(tree: Any) -> bool:
        leaves = jax.tree.leaves(tree)
        return all(leaf.sharding.is_equivalent_to(of, leaf.ndim) for leaf, of in zip(leaves, declared, strict=True))

    up = state.params["layers"]["up"]
    return {
        "params": as_declared(state.params),
        "grads": as_declared(grads),
        "moments": as_declared(state.opt_state.inner[1].nu),
        "share_of_up": max(shard.data.size for shard in up.addressable_shards) / up.size,
    }


def main(folder: Path) -> None:
    """Every mesh, and one of them with rematerialisation and with logits made in passes."""
    layout = {}
    for name, shape in MESHES.items():
        values, layout[name] = run(shape, Compute())
        np.savez(folder / f"{name}.npz", **values)
    recomputing = Compute(remat="names", logits_per_pass=64)
    np.savez(folder / "recomputing.npz", **run(MESHES["1x2x2x2"], recomputing)[0])  # type: ignore[arg-type]
    (folder / "layout.json").write_text(json.dumps(layout))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
