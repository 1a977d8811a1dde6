"""The reward model (4.3.1, E.1): trained on preferences, with its held-out pair and grading accuracies.

`train_reward_model` serves the stage of that name and every iTeC round, which refreshes the model on all preferences so far.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actors.jobs import TrainingJob
from actors.reward import RewardSpec
from afm_rl.data.split import conversation_key, is_held_out
from afm_rl.errors import UserError
from afm_rl.recipe import OptimizerSpec
from afm_rl.types import GRADINGS, LEVELS, Preference
from topologies.report_data import Curve, Figure, StageResult, Table
from topologies.stage_options import RewardModelStage, RewardTraining
from topologies.stages.context import Context, Policy
from topologies.stages.examples import pair_batches, preference_rows
from topologies.stages.measure import percent

#: Share of the annotated prompts that are kept out of the reward model's training, to measure it on.
HELD_OUT_FRACTION = 0.15


def split(preferences: Sequence[Preference]) -> tuple[list[Preference], list[Preference]]:
    """(training, held out) by a hash of the conversation: all pairs of a prompt fall on one side."""
    held = [is_held_out(conversation_key(p.prompt), fraction=HELD_OUT_FRACTION, salt="preferences") for p in preferences]
    training = [p for p, out in zip(preferences, held, strict=True) if not out]
    return training, [p for p, out in zip(preferences, held, strict=True) if out]


def train_reward_model(
    ctx: Context,
    options: RewardTraining,
    preferences: Sequence[Preference],
    *,
    stage: str,
    start: Policy,
    policy: Policy,
) -> None:
    """Train `policy` on preference pairs, from the trunk of a language model or from an earlier reward model."""
    if not preferences:
        raise UserError(f"{policy.name}: no preferences to train a reward model on; raise itec.prompts_per_round")
    job = TrainingJob(
        task=policy.name,
        objective="reward",
        optimizer=OptimizerSpec(
            "adamw",
            options.learning_rate,
            warmup_steps=options.warmup_steps,
            total_steps=options.steps,
            end_fraction=0.1,
        ),
        checkpoint_folder=str(ctx.checkpoints(policy.name)),
        init=str(start.folder),
        options={"grading_weight": options.grading_weight},
        part="reward",
        checkpoint_every=ctx.topology.checkpoints.steps,
        seed=ctx.seed,
    )
    rows = preference_rows(ctx.tokenizer, preferences, length=options.sequence_length)
    batch = min(options.batch, len(preferences))
    ctx.train(job, stage=stage, policy=policy, steps=options.steps, batches=pair_batches(rows, batch=batch, seed=ctx.seed))


def reward_figures(ctx: Context, policy: Policy, held_out: Sequence[Preference], *, length: int) -> dict[str, float | None]:
    """Held-out accuracies: "pairs" (chosen above rejected), pairs by level, and each grading's class. None where no data."""

    def work() -> dict[str, float | None]:
        if not held_out:
            return {"pairs": None, **dict.fromkeys(GRADINGS)}
        ctx.rewards.load(RewardSpec(str(ctx.tokenizer_folder), str(policy.folder), {"model": 1.0}))
        rows = preference_rows(ctx.tokenizer, held_out, length=length)
        sequences = [t[:n] for t, n in zip(rows["tokens_BT"], rows["length_B"], strict=True)]
        scores = ctx.rewards.sequence_scores(sequences)
        right = scores.reward_B[: len(held_out)] > scores.reward_B[len(held_out) :]
        levels = rows["level_B"]
        by_level = {name: float(right[levels == i].mean()) for i, name in enumerate(LEVELS) if (levels == i).any()}
        grades = (scores.grades_B4 == rows["grades"]).mean(0)
        majority = [np.bincount(rows["grades"][:, i]).max() / len(rows["grades"]) for i in range(len(GRADINGS))]
        return {
            "pairs": float(right.mean()),
            **{f"level {name}": share for name, share in by_level.items()},
            **{name: float(share) for name, share in zip(GRADINGS, grades, strict=True)},
            **{f"{name} majority": float(share) for name, share in zip(GRADINGS, majority, strict=True)},
        }

    return ctx.once(f"reward figures/{policy.name}", work)


def reward_table(figures: dict[str, dict[str, float | None]]) -> Table:
    """One row per reward model: pair accuracy, then each grading's accuracy."""
    columns = ["reward model", "pairs", *(name.replace("_", " ") for name in GRADINGS)]
    rows = [[name, *(percent(f[key]) for key in ("pairs", *GRADINGS))] for name, f in figures.items()]
    measured = [f for f in figures.values() if f"{GRADINGS[0]} majority" in f]
    if measured:
        last = measured[-1]
        rows.append(["always the most frequent class", 50.0, *(percent(last[f"{name} majority"]) for name in GRADINGS)])
    return Table(title="Held-out accuracy of the five heads", columns=columns, rows=rows, note="percent")


def run(ctx: Context, options: RewardModelStage) -> StageResult:
    """A first reward model from the preferences in `data`."""
    policy = ctx.policy("reward")
    training, held_out = split(ctx.data.preferences)
    train_reward_model(
        ctx,
        options,
        training,
        stage="reward_model",
        start=ctx.policy("sft") if ctx.has("sft") else ctx.base,
        policy=policy,
    )
    figures = reward_figures(ctx, policy, held_out, length=options.sequence_length)
    return StageResult(
        name="reward_model",
        title="Reward model",
        paper="4.3.1, E.1",
        figures=[
            Figure(label="held-out pair accuracy", value=percent(figures["pairs"]), unit="%"),
            Figure(label="training pairs", value=len(training)),
            Figure(label="held-out pairs", value=len(held_out)),
        ],
        tables=[reward_table({"reward": figures})],
        curves=[Curve(title="Loss", y=["loss"]), Curve(title="Pair accuracy on training batches", y=["accuracy"])],
    )
