"""Supervised fine-tuning (4.2): a constant learning rate after a short warm-up, dropout 0.1, on demonstrations."""

from __future__ import annotations

from collections.abc import Sequence

from actors.jobs import TrainingJob
from afm_rl.recipe import OptimizerSpec
from afm_rl.types import Demonstration
from topologies.report_data import Curve, Figure, StageResult
from topologies.stage_options import FineTuning, SftStage
from topologies.stages.context import Context, Policy
from topologies.stages.examples import supervised_batches
from topologies.stages.measure import measure, percent
from topologies.stages.tables import accuracy_by_kind


def fine_tune(
    ctx: Context,
    options: FineTuning,
    demonstrations: Sequence[Demonstration],
    *,
    stage: str,
    start: Policy,
    policy: Policy,
) -> None:
    """Train `policy` from `start` on demonstrations: SFT, rejection sampling and committee distillation alike."""
    job = TrainingJob(
        task=policy.name,
        objective="supervised",
        optimizer=OptimizerSpec(
            "adamw",
            options.learning_rate,
            warmup_steps=options.warmup_steps,
            total_steps=options.steps,
            end_fraction=options.end_fraction,
        ),
        checkpoint_folder=str(ctx.checkpoints(policy.name)),
        init=str(start.folder),
        options={"dropout": options.dropout},
        checkpoint_every=ctx.topology.checkpoints.steps,
        seed=ctx.seed,
    )
    batches = supervised_batches(
        ctx.tokenizer, demonstrations, length=options.sequence_length, batch=options.batch, seed=ctx.seed
    )
    ctx.train(job, stage=stage, policy=policy, steps=options.steps, batches=batches)


def run(ctx: Context, options: SftStage) -> StageResult:
    """Fine-tune the base model on the demonstrations and measure it on the held-out prompts."""
    policy = ctx.policy("sft")
    fine_tune(ctx, options, ctx.data.demonstrations, stage="sft", start=ctx.base, policy=policy)
    measured = measure(ctx, policy, max_tokens=ctx.max_tokens, environment=ctx.environment)
    return StageResult(
        name="sft",
        title="Supervised fine-tuning",
        paper="4.2",
        figures=[
            Figure(label="greedy accuracy", value=percent(measured.greedy), unit="%", note="held-out prompts"),
            Figure(label="sampled accuracy", value=percent(measured.sampled), unit="%", note="temperature 1"),
        ],
        tables=[accuracy_by_kind([measured])],
        curves=[Curve(title="Loss", y=["nll"], unit="nats/token")],
    )
