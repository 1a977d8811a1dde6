"""The small model (3.2.1): pruned from the large one by Soft-Top-K masks, core-trained with top-1 distillation, continued.

Beside it, for comparison, the same shape trained from scratch for the same steps without a teacher. The pruned model then
goes through the later phases of the pre-training recipe, as the paper's on-device model does.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable

import numpy as np

from actors.jobs import TrainingJob
from actors.pretraining import held_out_rows
from afm_rl.config import ModelConfig
from afm_rl.packing import Batch, PackedRows
from afm_rl.recipe import OptimizerSpec
from pretrain.mixture import mixture_batches, pack_corpus
from pretrain.pruning import eps_at
from pretrain.token_corpus import TokenCorpus, read_corpus
from topologies.report_data import Curve, Figure, StageResult, Table
from topologies.stage_options import PruneStage
from topologies.stages.context import Context, Policy
from topologies.stages.pretrain import phase_config, phase_optimizer, phase_policy

STAGE = "prune"


def run(ctx: Context, options: PruneStage) -> StageResult:
    """Masks, pruned model, distilled core training, scratch twin, later phases."""
    large = _core_model(ctx)
    config = ctx.topology.model.config().replace(ffn_dim=ctx.topology.small_model.ffn_dim)
    cut, core, scratch = ctx.policy("small-pruned"), ctx.policy("small-core"), ctx.policy("small-scratch")
    core_batches = domain_batches(ctx, options.mixture, length=options.sequence_length, batch=options.batch)
    ctx.train(
        _mask_job(ctx, options, large, config),
        stage=STAGE,
        policy=cut,
        steps=options.mask_steps,
        batches=_with_eps(core_batches, options.mask_steps),
    )
    ctx.train(
        _core_job(ctx, options, "small-core", init=cut, teacher=large),
        stage=STAGE,
        policy=core,
        steps=options.steps,
        batches=core_batches,
    )
    found = {"pruned, before core training": _measured(ctx, cut), "pruned and distilled": _measured(ctx, core)}
    if options.scratch:
        job = _core_job(ctx, options, "small-scratch", init=None, teacher=None, config=config)
        ctx.train(job, stage=STAGE, policy=scratch, steps=options.steps, batches=core_batches)
        found["from scratch, same steps"] = _measured(ctx, scratch)
    found["large model (core)"] = _measured(ctx, large)
    final = _later_phases(ctx, core, config)
    found["small model after the later stages"] = _measured(ctx, final)
    domains = sorted(next(iter(found.values())))
    return StageResult(
        name=STAGE,
        title="The small model: pruning and distillation",
        paper="3.2.1",
        figures=[
            Figure(label="FFN units kept", value=f"{config.ffn_dim} of {ctx.topology.model.config().ffn_dim}"),
            Figure(label="parameters", value=config.num_params, note=f"large: {ctx.topology.model.config().num_params}"),
        ],
        tables=[
            Table(
                title="Held-out loss / next-token accuracy",
                columns=["model", *domains],
                rows=[[name, *(f"{by[d][0]:.3f} / {100 * by[d][1]:.1f}" for d in domains)] for name, by in found.items()],
                note="nats per token / percent. Top-1 distillation sharpens: it is taught the teacher's first choice, so "
                "its accuracy is what to compare; the loss on the true label rises until the later stages",
            )
        ],
        curves=[
            Curve(
                title="Core training loss (true label)",
                y=["nll"],
                tasks=["small-core", "small-scratch"],
                unit="nats/token",
            ),
            Curve(title="Mask learning", y=["nll"], tasks=["small-pruned"], unit="nats/token"),
        ],
    )


def domain_batches(ctx: Context, mixture: dict[str, float], *, length: int, batch: int) -> Callable[[int], Batch]:
    """Batches of a pre-training mixture over the run's corpora."""
    mixture = ctx.present(mixture)
    rows = {name: pack_corpus(_corpus(ctx, name), length=length, pad_id=0) for name in mixture}
    return mixture_batches(rows, mixture, batch=batch, seed=ctx.seed + 1)


def _core_model(ctx: Context) -> Policy:
    """The large model after core pre-training, which is what the paper prunes and distils from; else the base."""
    if not ctx.has("pretrain"):
        return ctx.base
    options = ctx.topology.stage("pretrain")
    return phase_policy(ctx, "core", options) if "core" in options.stages else ctx.base


def _mask_job(ctx: Context, options: PruneStage, large: Policy, small: ModelConfig) -> TrainingJob:
    return TrainingJob(
        task="small-pruned",
        objective="supervised",
        optimizer=_optimizer(options, options.mask_steps, peak_lr=options.mask_lr),
        checkpoint_folder=str(ctx.checkpoints("small-pruned")),
        init=str(large.folder),
        part="masks",
        keep_units=small.ffn_dim,
        checkpoint_every=ctx.topology.checkpoints.steps,
        seed=ctx.seed,
    )


def _core_job(
    ctx: Context,
    options: PruneStage,
    task: str,
    *,
    init: Policy | None,
    teacher: Policy | None,
    config: ModelConfig | None = None,
) -> TrainingJob:
    distil = teacher is not None and options.distill
    return TrainingJob(
        task=task,
        objective="distillation" if distil else "supervised",
        optimizer=_optimizer(options, options.steps, peak_lr=options.peak_lr),
        checkpoint_folder=str(ctx.checkpoints(task)),
        config=config,
        init=str(init.folder) if init else None,
        frozen={"teacher": str(teacher.folder)} if distil and teacher else {},
        options={"true_weight": options.true_weight} if distil else {},
        checkpoint_every=ctx.topology.checkpoints.steps,
        seed=ctx.seed,
    )


def _optimizer(options: PruneStage, steps: int, *, peak_lr: float) -> OptimizerSpec:
    return OptimizerSpec(
        "afm",
        peak_lr,
        warmup_steps=options.warmup_steps,
        total_steps=steps,
        end_fraction=options.end_fraction,
        weight_decay=options.weight_decay,
    )


def _with_eps(batches: Callable[[int], Batch], steps: int) -> Callable[[int], Batch]:
    """The batches with the masks' temperature of their step."""
    return lambda step: {**batches(step), "eps": np.asarray(eps_at(step, steps=steps), np.float32)}


def _later_phases(ctx: Context, core: Policy, config: ModelConfig) -> Policy:
    """Continued pre-training and context lengthening as the topology gives them to the large model."""
    start, final = core, ctx.policy("small-base")
    phases = [p for p in ctx.topology.stage("pretrain").phases if p[0] != "core"] if ctx.has("pretrain") else []
    length = ctx.topology.stage("pretrain").core.sequence_length if phases else 0
    for i, (name, phase) in enumerate(phases):
        config = phase_config(config, phase, trained_length=length)
        policy = final if i == len(phases) - 1 else ctx.policy(f"small-{name}")
        job = TrainingJob(
            task=policy.name,
            objective="supervised",
            optimizer=phase_optimizer(phase),
            checkpoint_folder=str(ctx.checkpoints(policy.name)),
            config=config,
            init=str(start.folder),
            options={"z_loss": phase.z_loss},
            checkpoint_every=ctx.topology.checkpoints.steps,
            seed=ctx.seed,
        )
        batches = domain_batches(ctx, dict(phase.mixture), length=phase.sequence_length, batch=phase.batch)
        ctx.train(job, stage=STAGE, policy=policy, steps=phase.steps, batches=batches)
        start, length = policy, phase.sequence_length
    if not phases:
        ctx.once("small-base", lambda: _copy(core, final))
    return final


def _copy(source: Policy, target: Policy) -> None:
    shutil.rmtree(target.folder, ignore_errors=True)
    shutil.copytree(source.folder, target.folder)


def _measured(ctx: Context, policy: Policy) -> dict[str, list[float]]:
    """(Loss, top-1 accuracy) per domain of a policy on held-out documents, computed by the learner; journalled."""

    def work() -> dict[str, list[float]]:
        rows = _held_out(ctx)
        job = TrainingJob(
            task=f"measure-{policy.name}",
            objective="supervised",
            optimizer=OptimizerSpec("adamw", 1e-3),
            checkpoint_folder=str(ctx.checkpoints(f"measure-{policy.name}")),
            init=str(policy.folder),
        )
        held_out = ctx.on_learner(job, lambda _: ctx.learner("held_out", rows))
        return {name: [of.loss, of.accuracy] for name, of in held_out.items()}

    return ctx.once(f"losses/{policy.name}", work)


def _held_out(ctx: Context) -> dict[str, PackedRows]:
    corpora = {n: _corpus(ctx, f"heldout-{n}") for n, texts in ctx.data.heldout_documents.items() if texts}
    short = ctx.topology.stage(STAGE).sequence_length
    phases = ctx.topology.stage("pretrain").phases if ctx.has("pretrain") else []
    return held_out_rows(corpora, short=short, long=max([short, *(p.sequence_length for _, p in phases)]))


def _corpus(ctx: Context, name: str) -> TokenCorpus:
    return read_corpus(ctx.corpora / name, fingerprint=ctx.tokenizer.fingerprint)
