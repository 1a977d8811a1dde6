"""A feature adapter (5.1): summaries, started from the recovery adapter of its rank, beside one started from zero."""

from __future__ import annotations

from afm_rl.data.checks import token_f1
from topologies.report_data import Curve, Figure, StageResult, Table
from topologies.stage_options import AdaptersStage
from topologies.stages.adapter_training import merged_policy, publish_adapter, train_adapter
from topologies.stages.context import Context
from topologies.stages.examples import supervised_batches
from topologies.stages.measure import Measured, measure, percent
from topologies.stages.quantize import package_folder
from topologies.stages.recover import adapter_folder

STAGE = "adapters"


def run(ctx: Context, options: AdaptersStage) -> StageResult:
    """Train both, publish the one started from recovery under the feature's name."""
    target = ctx.topology.stage("quantize").bits_per_weight[0]
    package = package_folder(ctx, target)
    starts = {"recovery": adapter_folder(ctx, target, options.rank), "zero": None}
    batches = supervised_batches(
        ctx.tokenizer,
        ctx.data.feature_demonstrations,
        length=options.sequence_length,
        batch=options.batch,
        seed=ctx.seed,
    )
    scores: dict[str, Measured] = {}
    for start, init in starts.items():
        name = f"{options.feature}-from-{start}"
        adapter = train_adapter(
            ctx,
            name=name,
            base=package,
            rank=options.rank,
            init=init,
            learning_rate=options.learning_rate,
            steps=options.steps,
            batches=batches,
            stage=STAGE,
        )
        policy = merged_policy(ctx, name=name, base=package, adapter=adapter)
        scores[start] = measure(ctx, policy, max_tokens=ctx.max_tokens, prompts=ctx.data.feature_eval_prompts)
        if start == "recovery":
            publish_adapter(adapter, package, options.feature)
    return StageResult(
        name=STAGE,
        title=f"Feature adapter: {options.feature}",
        paper="5.1",
        figures=[
            Figure(label=f"started from {start}, token F1", value=percent(overlap(ctx, m)), unit="%", note="greedy")
            for start, m in scores.items()
        ],
        tables=[
            Table(
                title="The feature on held-out prompts, greedy",
                columns=["adapter", "token F1 %", "accuracy %"],
                rows=[[m.policy, percent(overlap(ctx, m)), percent(m.greedy)] for m in scores.values()],
                note="token F1: words shared with the prompt's reference; accuracy: every check of the prompt passes",
            )
        ],
        curves=[Curve(title="Loss", y=["nll"], unit="nats/token")],
    )


def overlap(ctx: Context, measured: Measured) -> float | None:
    """Mean token F1 of the greedy answers with the references of the feature's prompts; None where none has one."""
    scores = [
        token_f1(answer, check["text"])
        for prompt, answer in zip(ctx.data.feature_eval_prompts, measured.greedy_answers, strict=True)
        for check in prompt.checks
        if check["type"] == "reference"
    ]
    return sum(scores) / len(scores) if scores else None
