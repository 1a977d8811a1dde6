"""A feature adapter (5.1): summaries, started from the recovery adapter of its rank, beside one started from zero."""

from __future__ import annotations

from topologies.report_data import Curve, Figure, StageResult
from topologies.stage_options import AdaptersStage
from topologies.stages.adapter_training import merged_policy, publish_adapter, train_adapter
from topologies.stages.context import Context
from topologies.stages.examples import supervised_batches
from topologies.stages.measure import Measured, measure, percent
from topologies.stages.quantize import package_folder
from topologies.stages.recover import adapter_folder
from topologies.stages.tables import accuracy_by_kind

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
            Figure(label=f"started from {start}, greedy accuracy", value=percent(m.greedy), unit="%")
            for start, m in scores.items()
        ],
        tables=[accuracy_by_kind(list(scores.values()), title="Held-out accuracy on the feature (greedy / sampled)")],
        curves=[Curve(title="Loss", y=["nll"], unit="nats/token")],
    )
