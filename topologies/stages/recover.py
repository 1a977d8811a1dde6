"""Accuracy-recovery adapters (5.2, F): LoRA on the frozen palettized model, pre-training data, then post-training data.

One adapter per rank for every package; the table has the shape of the paper's Table 10, normalised to the unquantised model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from afm_rl.packing import Batch
from topologies.report_data import Curve, Figure, StageResult, Table
from topologies.stage_options import RecoverStage
from topologies.stages.adapter_training import merged_policy, publish_adapter, train_adapter
from topologies.stages.context import Context
from topologies.stages.examples import supervised_batches
from topologies.stages.measure import Measured, measure, percent
from topologies.stages.prune import domain_batches
from topologies.stages.quantize import package_folder, palettized_policy, post_training_data

STAGE = "recover"


def recovery_name(target: float, rank: int) -> str:
    """The adapter's name: recovery-3.7bpw-r16."""
    return f"recovery-{target:g}bpw-r{rank}"


def adapter_folder(ctx: Context, target: float, rank: int) -> Path:
    """Where a recovery adapter lies."""
    return ctx.run.path / "adapters" / recovery_name(target, rank)


def run(ctx: Context, options: RecoverStage) -> StageResult:
    """Train, publish and measure every recovery adapter."""
    batches = _recipe(ctx, options)
    dense = measure(ctx, ctx.device_policy, max_tokens=ctx.max_tokens)
    rows = [_row("16 (unquantised)", ctx.device_policy.name, dense, dense)]
    targets = ctx.topology.stage("quantize").bits_per_weight
    for target in targets:
        package = package_folder(ctx, target)
        rows.append(
            _row(
                f"{target:g}",
                "quantised",
                measure(ctx, palettized_policy(ctx, target), max_tokens=ctx.max_tokens),
                dense,
            )
        )
        for rank in options.ranks:
            name = recovery_name(target, rank)
            adapter = train_adapter(
                ctx,
                name=name,
                base=package,
                rank=rank,
                init=None,
                learning_rate=options.learning_rate,
                steps=options.steps_pretrain + options.steps_posttrain,
                batches=batches,
                stage=STAGE,
            )
            publish_adapter(adapter, package, f"recovery-r{rank}")
            recovered = merged_policy(ctx, name=name, base=package, adapter=adapter)
            rows.append(
                _row(f"{target:g}", f"recovered (rank {rank})", measure(ctx, recovered, max_tokens=ctx.max_tokens), dense)
            )
    kinds = list(dense.greedy_by_kind)
    return StageResult(
        name=STAGE,
        title="Accuracy-recovery adapters",
        paper="5.2, F (Table 10)",
        figures=[Figure(label="ranks", value=", ".join(map(str, options.ranks)))],
        tables=[
            Table(
                title="Quantised and recovered, normalised to the unquantised model",
                columns=["bits/weight", "model", "all", *kinds, "greedy %"],
                rows=rows,  # type: ignore[arg-type]
                note="greedy accuracy on held-out prompts, percent of the unquantised model's",
            )
        ],
        curves=[
            Curve(
                title=f"Loss at {t:g} bits/weight",
                y=["nll"],
                tasks=[recovery_name(t, r) for r in options.ranks],
                unit="nats/token",
            )
            for t in targets
        ],
    )


def _recipe(ctx: Context, options: RecoverStage) -> Callable[[int], Batch]:
    """Core-mixture batches for `steps_pretrain` steps, then what the model was post-trained on."""
    mixture = ctx.topology.stage("prune").mixture if ctx.has("prune") else ctx.topology.stage("pretrain").core.mixture
    first = domain_batches(ctx, dict(mixture), length=options.sequence_length, batch=options.batch)
    then = supervised_batches(
        ctx.tokenizer, post_training_data(ctx), length=options.sequence_length, batch=options.batch, seed=ctx.seed
    )
    return lambda step: first(step) if step < options.steps_pretrain else then(step - options.steps_pretrain)


def _row(bits: str, model: str, measured: Measured, dense: Measured) -> list[object]:
    return [
        bits,
        model,
        _relative(measured.greedy, dense.greedy),
        *(_relative(measured.greedy_by_kind.get(k), dense.greedy_by_kind[k]) for k in dense.greedy_by_kind),
        percent(measured.greedy),
    ]


def _relative(value: float | None, reference: float | None) -> float | None:
    """Percent of the reference; None where there is nothing to compare with."""
    return None if value is None or not reference else round(100 * value / reference, 1)
