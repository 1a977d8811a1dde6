"""The online loop of MDLOO (4.3.3, E.2), synchronous: what is trained on was sampled from exactly the current policy.

    prompts -> samplers -> reward -> groups -> learner -> weights (version, digest) -> samplers

| role | consumes | produces | waits for | unblocked by |
|---|---|---|---|---|
| sampler | prompts, weights of version k | groups of G responses | acknowledged weights of version k | a publish |
| reward | groups | scored groups | its share of the groups | the samplers |
| learner | all groups of an iteration | weights of version k + 1, metrics | every scored group | the reward actors |

An iteration is a function of (policy, seed, iteration): a resumed loop draws the same prompts and the same responses.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from actors.host import call, gather, spread
from actors.jobs import MdlooSettings, TrainingJob
from afm_rl.generate import request_seed
from afm_rl.packing import epoch_rows
from afm_rl.recipe import OptimizerSpec
from afm_rl.types import Group, Prompt, ScoredGroup
from topologies.stage_options import MdlooTraining
from topologies.stages.context import Context, Policy


def train_mdloo(
    ctx: Context, options: MdlooTraining, *, stage: str, start: Policy, reward_model: Policy, policy: Policy
) -> None:
    """Train `policy` from `start`, which is also the frozen reference, against the reward of the topology."""
    job = TrainingJob(
        task=policy.name,
        objective="mdloo",
        optimizer=OptimizerSpec(
            "adamw",
            options.learning_rate,
            warmup_steps=options.warmup_steps,
            total_steps=options.iterations * options.inner_steps,
            end_fraction=options.end_fraction,
        ),
        checkpoint_folder=str(ctx.checkpoints(policy.name)),
        init=str(start.folder),
        frozen={"reference": str(start.folder)},
        options={"gamma": options.gamma, "temperature": options.temperature},
        checkpoint_every=ctx.topology.checkpoints.iterations,
        seed=ctx.seed,
    )

    def from_iteration(first: int) -> None:
        call(ctx.system.store, "forget", policy.name)  # a learner built anew goes back behind what was published
        with ctx.progress.task(policy.name, total=options.iterations, done=first) as bar:
            for iteration in range(first, options.iterations):
                _iterate(ctx, options, iteration, stage=stage, start=start, policy=policy)
                bar.advance(1)
        ctx.export(job, policy)
        ctx.log_goodput(job, step=options.iterations)

    def work() -> None:
        spec = options.reward.spec(
            tokenizer_folder=str(ctx.tokenizer_folder),
            model_folder=str(reward_model.folder),
            max_tokens=options.max_tokens,
        )
        gather([handle.submit("load", spec) for handle in ctx.system.rewards])
        ctx.on_learner(job, from_iteration)

    ctx.once(f"train/{policy.name}", work)
    ctx.drop_checkpoints(ctx.checkpoints(policy.name))


def _iterate(ctx: Context, options: MdlooTraining, iteration: int, *, stage: str, start: Policy, policy: Policy) -> None:
    """One data-collection stage and one policy-update stage."""
    begin = time.perf_counter()
    published = ctx.system.learner.submit("publish", policy.name, iteration)
    digest = call(ctx.system.store, "publish", published)
    ctx.samplers.give(policy.name, iteration, ctx.spec(start), digest=digest, made_by=published)
    before = ctx.samplers.look()
    prompts = iteration_prompts(ctx.data.prompts, iteration, count=options.prompts, seed=request_seed(ctx.seed, policy.name))
    requests = ctx.requests(
        prompts,
        purpose=(policy.name, iteration),
        responses=options.responses,
        temperature=options.temperature,
        max_tokens=options.max_tokens,
    )
    groups = ctx.samplers.answer(policy.name, requests)
    generated = time.perf_counter()
    engines = ctx.samplers.log(ctx.metrics, before, task=policy.name, step=iteration)
    scored = _score(ctx, groups, prompts)
    rewarded = time.perf_counter()
    settings = MdlooSettings(
        beta=options.beta,
        inner_steps=options.inner_steps,
        temperature=options.temperature,
        microbatch=options.microbatch,
    )
    metrics = ctx.learner("update_mdloo", iteration, scored, settings)
    updated = time.perf_counter()
    tokens = sum(len(response) for group in groups for response in group.responses)
    ctx.metrics.log(
        stage=stage,
        task=policy.name,
        step=iteration,
        values={
            **metrics,
            **{f"sampler_{name}": value for name, value in engines.items()},
            **{f"reward_{name}": value for name, value in _component_means(scored).items()},
            **({"accuracy": _component_means(scored)["verifier"]} if "verifier" in scored[0].components else {}),
            "policy_version": iteration,
            "weights_in_sync": 1.0,  # `deliver` raises otherwise
            "queue_depth": len(scored),  # groups waiting for the learner: all of them, as the loop is synchronous
            "valid_fraction": float(np.mean(np.concatenate([s.valid_G for s in scored]))),
            "tokens_per_s": tokens / (generated - begin),
            "generate_s": generated - begin,
            "reward_s": rewarded - generated,
            "update_s": updated - rewarded,
        },
    )


def iteration_prompts(prompts: Sequence[Prompt], iteration: int, *, count: int, seed: int) -> list[Prompt]:
    """The prompts of an iteration, ordered by id: endless shuffled epochs, a pure function of its arguments."""
    rows = epoch_rows(iteration, batch=min(count, len(prompts)), rows=len(prompts), seed=seed)
    # An iteration that spans two epochs may draw a prompt twice; it is asked once.
    return sorted((prompts[i] for i in set(rows.tolist())), key=lambda p: p.id)


def _score(ctx: Context, groups: Sequence[Group], prompts: Sequence[Prompt]) -> list[ScoredGroup]:
    shares = zip(spread(ctx.system.rewards, groups), spread(ctx.system.rewards, prompts), strict=True)
    pending = [handle.submit("score", some, asked) for (handle, some), (_, asked) in shares]
    return [scored for part in gather(pending) for scored in part]


def _component_means(scored: Sequence[ScoredGroup]) -> dict[str, float]:
    """Mean of each reward component over the responses that have one."""
    names = scored[0].components
    return {name: float(np.nanmean(np.concatenate([s.components[name] for s in scored]))) for name in names}
