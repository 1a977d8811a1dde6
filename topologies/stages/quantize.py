"""Compression (5.2, F): palettize the device model on the quantizer actors, at each target of bits per weight.

Fisher information from the learner says which operations suffer; `allocate` gives each 2 or 4 bits under the target; the
first target's package is the one that recovery, adapters and serving build on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from actors.artifacts import load_artifact, save_artifact
from actors.jobs import TrainingJob
from actors.quantizer import PalettizeRequest
from afm_rl.quantized import dequantize_params
from afm_rl.recipe import OptimizerSpec
from afm_rl.types import Demonstration
from quant.allocate import Allocation, allocate
from quant.operations import operations
from quant.package import Package, read_package, write_package
from quant.palettize import Palettized
from quant.recovery import quantize_params
from quant.sensitivity import error_table
from topologies.report_data import Figure, StageResult, Table
from topologies.stage_options import SENSITIVITY_BATCH, QuantizeStage
from topologies.stages.committee import lessons
from topologies.stages.context import Context, Policy
from topologies.stages.examples import supervised_batches
from topologies.stages.measure import measure, percent

STAGE = "quantize"
#: Bit widths an operation may have (5.2: 4 bits, "pushed to 2" where that costs little).
BIT_WIDTHS = (2, 4)


def package_folder(ctx: Context, target: float) -> Path:
    """Where the package of a target lies."""
    return ctx.run.packages / f"{target:g}bpw"


def palettized_policy(ctx: Context, target: float) -> Policy:
    """The package's values as a dense policy: what the samplers measure, exactly the numbers the package computes with."""
    return ctx.policy(f"palettized-{target:g}bpw")


def post_training_data(ctx: Context) -> Sequence[Demonstration]:
    """What the device model was post-trained on: the committee's best responses, else the demonstrations."""
    if not ctx.has("distill_committee"):
        return ctx.data.demonstrations
    prompts = ctx.data.prompts[: ctx.topology.stage("distill_committee").prompts]
    best = ctx.once("distill_committee/best", _not_distilled)
    return lessons(ctx, prompts, best, limit=ctx.topology.stage("distill_committee").sequence_length)


def _not_distilled() -> list[str]:
    raise RuntimeError("the distill_committee stage has not finished")


def run(ctx: Context, options: QuantizeStage) -> StageResult:
    """Sensitivities, candidates on the quantizers, one package per target, accuracy of each."""
    source = ctx.device_policy
    made: dict[str, Any] = ctx.once("quantize/packages", lambda: _palettize(ctx, options, source))
    dense = measure(ctx, source, max_tokens=ctx.max_tokens)
    rows: list[list[Any]] = [[source.name, 32, None, percent(dense.greedy), percent(dense.sampled), None]]
    for target in options.bits_per_weight:
        row = made[f"{target:g}"]
        m = measure(ctx, palettized_policy(ctx, target), max_tokens=ctx.max_tokens)
        file_bits = round(row["file_bits_per_weight"], 3)
        rows.append(
            [
                f"palettized to {target:g}",
                round(row["bits_per_weight"], 3),
                file_bits,
                percent(m.greedy),
                percent(m.sampled),
                row["two_bit"],
            ]
        )
    first = made[f"{options.bits_per_weight[0]:g}"]
    return StageResult(
        name=STAGE,
        title="Palettization",
        paper="5.2, F",
        figures=[
            Figure(
                label="bits per weight",
                value=round(first["bits_per_weight"], 3),
                note="projections, lookup tables included",
            ),
            Figure(label="operations", value=first["operations"]),
        ],
        tables=[
            Table(
                title="Palettized models",
                columns=[
                    "model",
                    "bits/weight",
                    "bits/weight, whole file",
                    "greedy %",
                    "sampled %",
                    "operations at 2 bits",
                ],
                rows=rows,
                note=f"every {options.group_size} rows share a table; the embedding is int8 per channel",
            )
        ],
    )


def _palettize(ctx: Context, options: QuantizeStage, source: Policy) -> dict[str, Any]:
    artifact = load_artifact(source.folder)
    assert artifact.config is not None
    weights = operations(artifact.params)
    fisher = _fisher(ctx, options, source)
    candidates = _candidates(ctx, weights, fisher)
    errors = error_table(weights, candidates, fisher)
    storage = {name: {bits: p.storage_bits for bits, p in by.items()} for name, by in candidates.items()}
    made = {}
    for target in options.bits_per_weight:
        chosen = allocate(errors, storage, num_weights=sum(w.size for w in weights.values()), target_bits_per_weight=target)
        palettized = {name: candidates[name][bits] for name, bits in chosen.bits.items()}
        folder = package_folder(ctx, target)
        quantized = quantize_params(artifact.params, palettized)
        write_package(
            folder,
            params=quantized,
            config=artifact.config,
            bits=chosen.bits,
            tokenizer=ctx.tokenizer,
            details={"target_bits_per_weight": target, "errors": _jsonable(errors)},
        )
        package = read_package(folder)
        dense = jax.tree.map(np.asarray, dequantize_params(package.params))
        policy = palettized_policy(ctx, target)
        save_artifact(policy.folder, dense, artifact.config, tokenizer_folder=str(ctx.tokenizer_folder))
        made[f"{target:g}"] = _facts(chosen, package)
        ctx.metrics.log(
            stage=STAGE,
            task=f"{target:g}",
            step=0,
            values={"bits_per_weight": chosen.bits_per_weight, "error": chosen.error},
        )
    return made


def _facts(chosen: Allocation, package: Package) -> dict[str, Any]:
    return {
        "bits_per_weight": package.bits_per_weight,
        "file_bits_per_weight": package.file_bits_per_weight,
        "two_bit": sum(bits == min(BIT_WIDTHS) for bits in chosen.bits.values()),
        "operations": len(chosen.bits),
        "error": chosen.error,
    }


def _fisher(ctx: Context, options: QuantizeStage, source: Policy) -> dict[str, np.ndarray]:
    """Mean squared gradient of the post-training loss, per weight, by the learner."""
    job = TrainingJob(
        task="fisher",
        objective="supervised",
        optimizer=OptimizerSpec("adamw", 1e-3),
        checkpoint_folder=str(ctx.checkpoints("fisher")),
        init=str(source.folder),
        seed=ctx.seed,
    )
    length = ctx.topology.stage("sft").sequence_length
    batches = supervised_batches(
        ctx.tokenizer, post_training_data(ctx), length=length, batch=SENSITIVITY_BATCH, seed=ctx.seed
    )
    measured_on = [batches(step) for step in range(options.sensitivity_batches)]
    return ctx.on_learner(job, lambda _: ctx.learner("fisher", measured_on))


def _candidates(
    ctx: Context, weights: Mapping[str, np.ndarray], fisher: Mapping[str, np.ndarray]
) -> dict[str, dict[int, Palettized]]:
    """Every operation at every width, shared out among the quantizer actors."""
    requests = [PalettizeRequest(name, w, bits, fisher[name]) for name, w in weights.items() for bits in BIT_WIDTHS]
    with ctx.progress.task("palettize", total=len(requests)) as bar:
        done = [palettized for part in ctx.quantizers.map("palettize", requests) for palettized in part]
        bar.advance(len(requests))
    found: dict[str, dict[int, Palettized]] = {}
    for request, palettized in zip(requests, done, strict=True):
        found.setdefault(request.operation, {})[request.bits] = palettized
    return found


def _jsonable(errors: Mapping[str, Mapping[int, float]]) -> dict[str, dict[str, float]]:
    return {name: {str(bits): error for bits, error in by.items()} for name, by in errors.items()}
