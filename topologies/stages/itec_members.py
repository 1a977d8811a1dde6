"""How each member of the committee is trained in a round: SFT, rejection sampling, DPO, IPO, each with its own objective.

MDLOO, the online one, is `topologies/online/`; everything here learns from what the round has collected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.jobs import TrainingJob
from afm_rl.packing import Batch
from afm_rl.recipe import OptimizerSpec
from afm_rl.types import Demonstration, Preference
from topologies.online.loop import train_online
from topologies.stage_options import ItecStage, PreferenceTraining
from topologies.stages.context import Context, Policy
from topologies.stages.examples import pair_batches, preference_rows
from topologies.stages.sft import fine_tune

#: Rows per call when the reference's log-probabilities are computed: one compiled shape.
REFERENCE_ROWS = 128


@dataclass(frozen=True)
class Round:
    """What a round hands to its members: the refreshed reward model, its preferences, the reranked best responses."""

    number: int
    reward_model: Policy
    preferences: Sequence[Preference]
    best: Sequence[Demonstration]


def train_member(ctx: Context, options: ItecStage, this: Round, member: str, *, start: Policy) -> Policy:
    """Train one member of the round from `start`; returns its policy (the SFT policy itself in round 1)."""
    policy = ctx.policy(f"itec-{this.number}-{member}")
    if member == "sft":
        if this.number == 1:
            return ctx.policy("sft")
        # Taught by the committee: its best responses beside as many demonstrations.
        shown = [*this.best, *_share(ctx.data.demonstrations, len(this.best), seed=(ctx.seed, this.number))]
        fine_tune(ctx, options.sft, shown, stage="itec", start=start, policy=policy)
    elif member == "rs":
        fine_tune(ctx, options.rs, this.best, stage="itec", start=start, policy=policy)
    elif member == "mdloo":
        train_online(ctx, options.mdloo, stage="itec", start=start, reward_model=this.reward_model, policy=policy)
    else:
        objective = options.dpo if member == "dpo" else options.ipo
        _train_on_preferences(ctx, objective, member, this.preferences, start=start, policy=policy)
    return policy


def _train_on_preferences(
    ctx: Context,
    options: PreferenceTraining,
    objective: str,
    preferences: Sequence[Preference],
    *,
    start: Policy,
    policy: Policy,
) -> None:
    """DPO or IPO against the policy it starts from."""
    job = TrainingJob(
        task=policy.name,
        objective=objective,
        optimizer=OptimizerSpec(
            "adamw",
            options.learning_rate,
            warmup_steps=options.warmup_steps,
            total_steps=options.steps,
            end_fraction=0.1,
        ),
        checkpoint_folder=str(ctx.checkpoints(policy.name)),
        init=str(start.folder),
        frozen={"reference": str(start.folder)},
        options={"beta": options.beta},
        checkpoint_every=ctx.topology.checkpoints.steps,
        seed=ctx.seed,
    )
    if ctx.journal.done(f"train/{job.task}"):
        return
    rows = preference_rows(ctx.tokenizer, preferences, length=options.sequence_length)
    rows["ref_logp_B"] = ctx.on_learner(job, lambda _: _reference_logps(ctx, rows))
    batch = min(options.batch, len(preferences))
    ctx.train(job, stage="itec", policy=policy, steps=options.steps, batches=pair_batches(rows, batch=batch, seed=ctx.seed))


def _reference_logps(ctx: Context, rows: Batch) -> np.ndarray:
    """log pi_ref of every row's response [2B], by the learner that has just begun the job."""
    sums = []
    count = len(rows["tokens_BT"])
    for first in range(0, count, REFERENCE_ROWS):
        index = np.arange(first, first + REFERENCE_ROWS) % count  # the last chunk wraps round, to keep one shape
        batch = {name: rows[name][index] for name in ("tokens_BT", "mask_BT")}
        sums.append(ctx.learner("log_probs", batch, "reference").sum(-1))
    return np.concatenate(sums)[:count].astype(np.float32)


def _share(items: Sequence[Demonstration], count: int, *, seed: Sequence[int]) -> list[Demonstration]:
    order = np.random.default_rng(list(seed)).permutation(len(items))[:count]
    return [items[i] for i in order]
