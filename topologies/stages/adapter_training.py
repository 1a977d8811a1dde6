"""Training a LoRA adapter over a package and measuring it: shared by recovery (5.2) and by features (5.1)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from actors.artifacts import load_artifact, save_artifact
from actors.jobs import AdapterSpec, TrainingJob
from afm_rl.lora import attach, merge
from afm_rl.packing import Batch
from afm_rl.quantized import dequantize_params
from afm_rl.recipe import OptimizerSpec
from topologies.stages.context import Context, Policy

#: LoRA's alpha per rank: a scale of 2 whatever the rank (ours; the paper gives none).
ALPHA_PER_RANK = 2.0


def train_adapter(
    ctx: Context,
    *,
    name: str,
    base: Path,
    rank: int,
    init: Path | None,
    learning_rate: float,
    steps: int,
    batches: Callable[[int], Batch],
    stage: str,
) -> Path:
    """Train adapter `name` over the frozen base; returns its folder (PEFT layout) below `adapters/` of the run."""
    folder = ctx.run.path / "adapters" / name
    spec = AdapterSpec(rank=rank, alpha=ALPHA_PER_RANK * rank, init=str(init) if init else None)
    job = TrainingJob(
        task=name,
        objective="supervised",
        optimizer=OptimizerSpec(
            "adamw", learning_rate, warmup_steps=max(1, steps // 20), total_steps=steps, end_fraction=0.1
        ),
        checkpoint_folder=str(ctx.checkpoints(name)),
        init=str(base),
        part="adapter",
        adapter=spec,
        checkpoint_every=ctx.topology.checkpoints.steps,
        seed=ctx.seed,
    )
    ctx.train(job, stage=stage, policy=Policy(name, folder), steps=steps, batches=batches)
    return folder


def merged_policy(ctx: Context, *, name: str, base: Path, adapter: Path) -> Policy:
    """Base and adapter folded into one dense policy, which the samplers can measure."""
    policy = ctx.policy(name)

    def work() -> str:
        held, added = load_artifact(base), load_artifact(adapter)
        assert held.config is not None, base
        assert added.adapter is not None, adapter
        params = merge(attach(held.params, added.params, alpha=added.adapter.alpha, rank=added.adapter.rank))
        dense = jax.tree.map(np.asarray, dequantize_params(params))
        save_artifact(policy.folder, dense, held.config, tokenizer_folder=str(ctx.tokenizer_folder))
        return policy.name

    ctx.once(f"merged/{name}", work)
    return policy


def publish_adapter(adapter: Path, package: Path, name: str) -> None:
    """Put an adapter where the server finds it: PACKAGE/adapters/NAME."""
    target = package / "adapters" / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(adapter, target)
