"""Pre-training (3.2): core, continued, context lengthening in one run, under Ray Train's JaxTrainer (directly when inline).

The phases share one function, `actors/pretraining.py`; this stage builds its plan from the topology, starts it, follows its
progress, and measures needle recall at the long length before and after the context is lengthened.
"""

from __future__ import annotations

import json
import threading
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from actors.group import GroupHandle
from actors.jobs import TrainingJob
from actors.metrics import JsonlSink, Metrics, RaySink, TensorBoardSink
from actors.pretraining import PhasePlan, PhaseResult, PretrainPlan, run_pretraining
from afm_rl.config import ModelConfig
from afm_rl.generate import request_seed
from afm_rl.recipe import OptimizerSpec
from afm_rl.schedules import rescaled_rope_base
from afm_rl.types import GenerationRequest
from afm_rl.worlds.python_world import needle_cases
from topologies.report_data import Curve, Figure, StageResult, Table
from topologies.stage_options import Phase, PretrainStage
from topologies.stages.context import Context, Policy
from topologies.stages.measure import percent
from topologies.system import group_spec, learner_setup

STAGE = "pretrain"
#: Characters of a needle case per token of the long length: leaves room for the question and the answer.
NEEDLE_CHARS_PER_TOKEN = 1.6
NEEDLE_CASES = 48


def phase_policy(ctx: Context, phase: str, options: PretrainStage) -> Policy:
    """Where a phase's model goes: `base` after the last, `base-PHASE` before."""
    return ctx.policy("base" if phase == options.stages[-1] else f"base-{phase}")


def phase_config(config: ModelConfig, phase: Phase, *, trained_length: int) -> ModelConfig:
    """The model of a phase: RoPE base as configured, or rescaled for the longer context (3.2.3)."""
    if phase.rope_base == "model":
        return config
    if phase.rope_base == "rescaled":
        base = rescaled_rope_base(config.rope_base, trained_length=trained_length, target_length=phase.sequence_length)
        return config.replace(rope_base=base)
    return config.replace(rope_base=phase.rope_base)


def build_plan(ctx: Context, options: PretrainStage) -> PretrainPlan:
    """Every phase as a job that starts from the phase before it."""
    phases, config, init, length = [], ctx.topology.model.config(), None, 0
    for name, phase in options.phases:
        config = phase_config(config, phase, trained_length=length)
        policy = phase_policy(ctx, name, options)
        job = TrainingJob(
            task=f"pretrain-{name}",
            objective="supervised",
            optimizer=phase_optimizer(phase),
            checkpoint_folder=str(ctx.checkpoints(f"pretrain-{name}")),
            config=config,
            init=init,
            options={"z_loss": phase.z_loss},
            checkpoint_every=ctx.topology.checkpoints.steps,
            seed=ctx.seed,
        )
        phases.append(
            PhasePlan(
                name,
                job,
                phase.steps,
                phase.batch,
                phase.sequence_length,
                ctx.present(phase.mixture),
                ctx.seed,
                str(policy.folder),
            )
        )
        init, length = str(policy.folder), phase.sequence_length
    return PretrainPlan(
        phases=tuple(phases),
        corpora=str(ctx.corpora),
        domains=tuple(ctx.data.documents),
        heldout_domains=tuple(name for name, texts in ctx.data.heldout_documents.items() if texts),
        fingerprint=ctx.tokenizer.fingerprint,
        tokenizer_folder=str(ctx.tokenizer_folder),
        stage=STAGE,
        learner=learner_setup(ctx.topology),
    )


def phase_optimizer(phase: Phase) -> OptimizerSpec:
    """The paper's optimizer with the phase's schedule (3.2.4, appendices A to C)."""
    return OptimizerSpec(
        "afm",
        phase.peak_lr,
        warmup_steps=phase.warmup_steps,
        total_steps=phase.steps,
        end_fraction=phase.end_fraction,
        weight_decay=phase.weight_decay,
    )


def run(ctx: Context, options: PretrainStage) -> StageResult:
    """All phases in one run; held-out loss per domain after each, needle recall around the third."""
    plan = build_plan(ctx, options)

    def work() -> list[dict[str, Any]]:
        return [{"name": r.name, "losses": r.losses, "tokens": r.tokens} for r in _train(ctx, plan)]

    results = [PhaseResult(**row) for row in ctx.once("train/pretrain", work)]
    for phase in plan.phases:
        ctx.drop_checkpoints(phase.job.checkpoint_folder)
    recall = _recall(ctx, options)
    figures = [
        Figure(label="tokens", value=sum(r.tokens for r in results)),
        *(Figure(label=f"needle recall {when}", value=percent(share), unit="%") for when, share in recall.items()),
    ]
    domains = sorted({d for r in results for d in r.losses})
    return StageResult(
        name=STAGE,
        title="Pre-training in three stages",
        paper="3.2",
        figures=figures,
        tables=[
            Table(
                title="Held-out loss after each stage",
                columns=["stage", *domains, "tokens"],
                rows=[[r.name, *(round(r.losses[d], 3) for d in domains), r.tokens] for r in results],
                note="nats per token, on documents that training does not see; long_context at the longest length",
            )
        ],
        curves=[Curve(title="Training loss", y=["nll"], tasks=[p.job.task for p in plan.phases], unit="nats/token")],
    )


def _train(ctx: Context, plan: PretrainPlan) -> list[PhaseResult]:
    total = sum(phase.steps for phase in plan.phases)
    if ctx.topology.launcher == "inline":
        ctx.progress.say(f"  {total} steps in this process")
        return run_pretraining(plan, ctx.metrics)
    with ctx.progress.task("pretraining (JaxTrainer)", total=total) as bar:
        return _under_ray_train(ctx, plan, bar)


def _under_ray_train(ctx: Context, plan: PretrainPlan, bar: Any) -> list[PhaseResult]:
    """One JaxTrainer run over all phases. Its worker writes the metrics; this process follows them for the bar."""
    from actors.jax_train import fit

    stop = threading.Event()
    follower = threading.Thread(target=_follow, args=(ctx.run.metrics / f"{STAGE}.jsonl", bar, stop), daemon=True)
    follower.start()
    try:
        learner, spec = ctx.system.learner, group_spec(ctx.topology)
        # Ray Train's workers take the place of the learner, whose GPUs or TPU slices may be all there are.
        exclusive = isinstance(learner, GroupHandle) and spec.accelerator != "cpu"
        with learner.suspended() if exclusive else nullcontext():  # type: ignore[attr-defined]
            fit(
                _worker,
                {"plan": plan, "metrics": str(ctx.run.metrics)},
                spec=spec,
                name=f"{ctx.topology.name}-pretrain",
                storage_path=str(ctx.run.path / "ray_train"),
            )
    finally:
        stop.set()
        follower.join(timeout=5.0)
    done = [Path(p.job.checkpoint_folder).parent / f"{p.job.task}.done.json" for p in plan.phases]
    return [PhaseResult(**json.loads(path.read_text())) for path in done]


def _worker(config: dict[str, Any]) -> None:
    """What a Ray Train worker runs. Reports once per phase: Ray Train reads reports on a two-second poll."""
    import ray.train

    folder = Path(config["metrics"])
    with Metrics([JsonlSink(folder), TensorBoardSink(folder / "tensorboard"), RaySink()]) as metrics:
        run_pretraining(config["plan"], metrics, report=lambda result: ray.train.report({**result.losses}))


def _follow(path: Path, bar: Any, stop: threading.Event) -> None:
    """Move the bar to the number of rows the worker has written."""
    while not stop.wait(0.5):
        if path.exists():
            with path.open("rb") as file:
                rows = [json.loads(line) for line in file if line.endswith(b"\n")]
            bar.move_to(len({(row["task"], row["step"]) for row in rows}))  # a step done again after a loss has two rows


def _recall(ctx: Context, options: PretrainStage) -> dict[str, float]:
    """Share of needles recalled at the long length, by the model before context lengthening and the one after."""
    if options.stages[-1] != "context_lengthening" or len(options.stages) < 2 or not ctx.data.documents.get("long_context"):
        return {}
    before = phase_policy(ctx, options.stages[-2], options)
    recall = {}
    for when, policy in (("before lengthening", before), ("after", ctx.policy("base"))):
        work = partial(needle_recall, ctx, policy, options.context_lengthening)
        recall[when] = ctx.once(f"needles/{policy.name}", work)
    return recall


def needle_recall(ctx: Context, policy: Policy, phase: Phase) -> float:
    """Greedy key-value recall over documents of nearly the phase's length."""
    answer_tokens = 8
    cases = needle_cases(NEEDLE_CASES, length_chars=int(NEEDLE_CHARS_PER_TOKEN * phase.sequence_length), seed=ctx.seed + 1)
    room = phase.sequence_length - answer_tokens
    requests = [
        GenerationRequest(
            id=f"needle-{i}",
            # The oldest tokens are cut where a text is longer than the context; nearly all fit whole.
            prompt_T=np.asarray(ctx.tokenizer.encode(case.prompt)[-room:], np.int32),
            max_tokens=answer_tokens,
            temperature=0.0,
            seed=request_seed(ctx.seed, "needle", i),
        )
        for i, case in enumerate(cases)
    ]
    groups = ctx.sample(policy, requests)
    right = [case.passes(ctx.texts(group)[0]) for case, group in zip(cases, groups, strict=True)]
    return sum(right) / len(right)
