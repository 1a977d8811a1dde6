"""Committee distillation into the smaller model (4.3.2), beside SFT of the same model on as many demonstrations."""

from __future__ import annotations

from topologies.report_data import Curve, Figure, StageResult, Table
from topologies.stage_options import DistillCommitteeStage
from topologies.stages.committee import Answers, best_answers, lessons, sample_committee
from topologies.stages.context import Context
from topologies.stages.itec import final_committee
from topologies.stages.measure import measure, percent
from topologies.stages.sft import fine_tune
from topologies.stages.tables import accuracy_by_kind

STAGE = "distill_committee"


def run(ctx: Context, options: DistillCommitteeStage) -> StageResult:
    """Train the student on the committee's best responses, and its twin on demonstrations for the same prompts' number."""
    committee, reward_model = final_committee(ctx)
    prompts = ctx.data.prompts[: options.prompts]
    answers = sample_committee(
        ctx,
        committee,
        prompts,
        purpose=STAGE,
        per_prompt=options.responses_per_member * len(committee),
        temperature=options.temperature,
        max_tokens=options.max_tokens,
    )
    best = ctx.once(f"{STAGE}/best", lambda: best_answers(ctx, reward_model, answers, prompts, weights=options.rerank))
    taught = lessons(ctx, prompts, best, limit=options.sequence_length)
    student, twin = ctx.policy("distilled"), ctx.policy("small-sft")
    fine_tune(ctx, options, taught, stage=STAGE, start=ctx.small_base, policy=student)
    fine_tune(ctx, options, ctx.data.demonstrations[: len(taught)], stage=STAGE, start=ctx.small_base, policy=twin)
    distilled = measure(ctx, student, max_tokens=options.max_tokens)
    imitated = measure(ctx, twin, max_tokens=options.max_tokens)
    return StageResult(
        name=STAGE,
        title="Committee distillation into the small model",
        paper="4.3.2",
        figures=[
            Figure(label="distilled, greedy accuracy", value=percent(distilled.greedy), unit="%"),
            Figure(label="SFT on as many demonstrations", value=percent(imitated.greedy), unit="%"),
        ],
        tables=[accuracy_by_kind([distilled, imitated]), wins_table(answers, best)],
        curves=[Curve(title="Loss", y=["nll"], tasks=[student.name, twin.name], unit="nats/token")],
    )


def wins_table(answers: list[Answers], best: list[str]) -> Table:
    """How many prompts each member's response was chosen for; a text that several gave counts for each."""
    members = list(answers[0]) if answers else []
    wins = {m: sum(text in by_member[m] for by_member, text in zip(answers, best, strict=True)) for m in members}
    return Table(
        title="Who taught: share of prompts whose chosen response the member gave",
        columns=["member", "share %"],
        rows=[[m, percent(count / max(1, len(best)))] for m, count in wins.items()],
        note="shares add up to more than 100 % where members agree",
    )
