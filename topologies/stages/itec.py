"""The iterative teaching committee (4.3.2): sample from the committee, annotate, refresh the reward model, train, again.

    committee -> responses -> pairs -> annotator -> preferences -> reward model -> RS, DPO, IPO, MDLOO (and SFT) -> committee

Where the paper is silent (stated in docs/decisions.md): a member of round r starts from the same member of round r - 1 (from
the SFT policy in round 1); the SFT member is taught from round 2 on, by demonstrations and reranked committee responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from afm_rl.data.preference_store import PreferenceStore
from afm_rl.types import Pair, Preference, Prompt
from topologies.online.curves import online_curves
from topologies.report_data import Curve, Figure, StageResult, Table
from topologies.stage_options import ItecStage
from topologies.stages.committee import (
    Answers,
    best_answers,
    best_by_prompt,
    distinct_pairs,
    lessons,
    sample_committee,
)
from topologies.stages.context import Context, Policy
from topologies.stages.examples import num_tokens
from topologies.stages.itec_members import Round, train_member
from topologies.stages.measure import Measured, mean_reward, measure, percent, share_right, win_rate
from topologies.stages.reward_model import reward_figures, reward_table, split, train_reward_model
from topologies.stages.tables import accuracy_by_kind

STAGE = "itec"


@dataclass(frozen=True)
class MemberScore:
    """What the report says of one member in one round; `reward` is the round's own reward model's mean."""

    round: int
    member: str
    policy: Policy
    measured: Measured
    reward: float
    win: dict[str, float]


def run(ctx: Context, options: ItecStage) -> StageResult:
    """All rounds; the final committee and reward model are what `distill_committee` works with."""
    sft = ctx.policy("sft")
    baseline = measure(ctx, sft, max_tokens=options.max_tokens)
    scores: list[MemberScore] = []
    reward_models: dict[str, dict[str, float | None]] = {}
    committee, previous = [sft], dict.fromkeys(options.members, sft)
    for number in range(1, options.rounds + 1):
        ctx.progress.say(f"iTeC round {number}: committee {', '.join(p.name for p in committee)}")
        this = _collect(ctx, options, number, committee)
        reward_models[this.reward_model.name] = reward_figures(
            ctx, this.reward_model, split(_preferences(ctx, number))[1], length=options.reward.sequence_length
        )
        trained = {member: train_member(ctx, options, this, member, start=previous[member]) for member in options.members}
        scores += [_score(ctx, options, number, m, p, this.reward_model, baseline) for m, p in trained.items()]
        committee, previous = _next_committee(number, trained, scores), trained
    remember_committee(ctx, committee, this.reward_model)
    best_mdloo = next((s for s in reversed(scores) if s.member == "mdloo"), None)
    figures = [Figure(label="SFT greedy accuracy", value=percent(baseline.greedy), unit="%", note="before iTeC")]
    if best_mdloo is not None:
        figures += _mdloo_figures(baseline, scores)
    return StageResult(
        name=STAGE,
        title="Iterative teaching committee",
        paper="4.3.2, 4.3.3, E.2",
        figures=figures,
        tables=[
            _members_table(baseline, scores),
            rerank_table(ctx, options, committee, this.reward_model),
            reward_table(reward_models),
            accuracy_by_kind([baseline, *(s.measured for s in scores if s.policy.name != sft.name)]),
        ],
        curves=_curves(options),
    )


def final_committee(ctx: Context) -> tuple[list[Policy], Policy]:
    """(members, reward model) that the itec stage ended with."""
    record = ctx.once("itec/committee", _not_run)
    return [ctx.policy(name) for name in record["members"]], ctx.policy(record["reward_model"])


def remember_committee(ctx: Context, committee: Sequence[Policy], reward_model: Policy) -> None:
    """Journal what the stage ended with."""
    ctx.once("itec/committee", lambda: {"members": [p.name for p in committee], "reward_model": reward_model.name})


def _not_run() -> dict[str, list[str]]:
    raise RuntimeError("the itec stage has not finished, so there is no committee yet")


def _collect(ctx: Context, options: ItecStage, number: int, committee: Sequence[Policy]) -> Round:
    """Committee responses, preferences on them, and the refreshed reward model of one round."""
    prompts = _round_prompts(ctx, options, number)
    answers = sample_committee(
        ctx,
        committee,
        prompts,
        purpose=f"itec-{number}",
        per_prompt=options.responses_per_prompt,
        temperature=options.temperature,
        max_tokens=options.max_tokens,
    )
    _annotate(ctx, options, number, prompts, answers)
    reward_model = ctx.policy(f"itec-{number}-reward")
    start = (
        ctx.policy(f"itec-{number - 1}-reward")
        if number > 1
        else ctx.policy("reward")
        if ctx.has("reward_model")
        else ctx.policy("sft")
    )
    everything = [*ctx.data.preferences, *(p for r in range(1, number + 1) for p in _preferences(ctx, r))]
    train_reward_model(ctx, options.reward, split(everything)[0], stage=STAGE, start=start, policy=reward_model)
    best = ctx.once(f"itec/{number}/best", lambda: best_answers(ctx, reward_model, answers, prompts, weights=options.rerank))
    return Round(
        number=number,
        reward_model=reward_model,
        preferences=split(_preferences(ctx, number))[0] or split(ctx.data.preferences)[0],
        best=lessons(ctx, prompts, best, limit=min(options.sft.sequence_length, options.rs.sequence_length)),
    )


def _round_prompts(ctx: Context, options: ItecStage, number: int) -> list[Prompt]:
    """A round's own slice of the prompts; it wraps around when the rounds ask for more than there are."""
    count, available = options.prompts_per_round, ctx.data.prompts
    first = (number - 1) * count
    return [available[i % len(available)] for i in range(first, first + min(count, len(available)))]


def _annotate(ctx: Context, options: ItecStage, number: int, prompts: Sequence[Prompt], answers: Sequence[Answers]) -> None:
    def work() -> int:
        pairs = distinct_pairs(prompts, answers, per_prompt=options.pairs_per_prompt, seed=(ctx.seed, number))
        # Without ground truth the simulated annotator has nothing to judge by.
        pairs = [pair for pair in pairs if pair.prompt.checks and _fits(ctx, options, pair)]
        preferences = [preference for part in ctx.annotator.map("annotate", pairs) for preference in part]
        PreferenceStore(ctx.run.preferences).add(f"itec-{number}", preferences)
        ctx.metrics.log(
            stage=STAGE, task="annotator", step=number, values={"pairs": len(pairs), "preferences": len(preferences)}
        )
        return len(preferences)

    ctx.once(f"itec/{number}/preferences", work)


def _fits(ctx: Context, options: ItecStage, pair: Pair) -> bool:
    """Whether both responses fit every stage that will train on them: a text may re-encode longer than it was sampled."""
    texts = (pair.response_a, pair.response_b)
    return all(num_tokens(ctx.tokenizer, pair.prompt, text) <= options.preference_length for text in texts)


def _preferences(ctx: Context, number: int) -> list[Preference]:
    return PreferenceStore(ctx.run.preferences).read([f"itec-{number}"])


def _score(
    ctx: Context,
    options: ItecStage,
    number: int,
    member: str,
    policy: Policy,
    reward_model: Policy,
    baseline: Measured,
) -> MemberScore:
    measured = measure(ctx, policy, max_tokens=options.max_tokens)
    key = f"score/{policy.name}/{number}"
    reward = ctx.once(f"{key}/reward", lambda: mean_reward(ctx, reward_model, measured))
    win = ctx.once(f"{key}/win", lambda: win_rate(ctx, measured, baseline))
    return MemberScore(number, member, policy, measured, reward, win)


def _next_committee(number: int, trained: dict[str, Policy], scores: Sequence[MemberScore]) -> list[Policy]:
    """The latest of every member, and the best of the earlier rounds by its net win rate against the SFT policy.

    Not by mean reward: every round's reward model has a scale of its own.
    """
    earlier = [s for s in scores if s.round < number and s.policy.name not in {p.name for p in trained.values()}]
    best = [max(earlier, key=lambda s: s.win["win"] - s.win["loss"]).policy] if earlier else []
    return [*trained.values(), *best]


def rerank_table(ctx: Context, options: ItecStage, committee: Sequence[Policy], reward_model: Policy) -> Table:
    """Prompt-level reranking beside the best single member, on held-out prompts, several responses from every member."""
    prompts = ctx.data.eval_prompts[: options.rerank_prompts]

    def work() -> list[list[object]]:
        answers = sample_committee(
            ctx,
            committee,
            prompts,
            purpose="itec-rerank",
            per_prompt=options.responses_per_member * len(committee),
            temperature=options.temperature,
            max_tokens=options.max_tokens,
        )
        choice = best_by_prompt(ctx, reward_model, answers, prompts)
        right = {name: share_right(prompts, texts) for name, texts in choice.items()}
        return [[name, percent(share)] for name, share in right.items()]

    return Table(
        title="Reranking: prompt level beside the best single member",
        columns=["teacher", "accuracy %"],
        rows=ctx.once("itec/rerank", work),
        note=f"{len(prompts)} held-out prompts, {options.responses_per_member} responses from every member; the "
        "latest reward model chooses",
    )


def _members_table(baseline: Measured, scores: Sequence[MemberScore]) -> Table:
    rows: list[list[object]] = [[0, "sft", percent(baseline.greedy), percent(baseline.sampled), None, None, None]]
    rows += [
        [
            s.round,
            s.member,
            percent(s.measured.greedy),
            percent(s.measured.sampled),
            round(s.reward, 3),
            percent(s.win["win"]),
            percent(s.win["loss"]),
        ]
        for s in scores
    ]
    return Table(
        title="Members by round",
        columns=["round", "member", "greedy %", "sampled %", "mean reward", "win % vs SFT", "loss % vs SFT"],
        rows=rows,  # type: ignore[arg-type]
        note="held-out prompts; mean reward by the round's own reward model; the rest of win and loss are ties",
    )


def _mdloo_figures(baseline: Measured, scores: Sequence[MemberScore]) -> list[Figure]:
    last = [s for s in scores if s.member == "mdloo"][-1]
    figures = [
        Figure(label="MDLOO greedy accuracy", value=percent(last.measured.greedy), unit="%", note=f"round {last.round}")
    ]
    kind = "arithmetic"
    before, after = baseline.greedy_by_kind.get(kind), last.measured.greedy_by_kind.get(kind)
    if before is not None and after is not None:
        figures.append(
            Figure(
                label="MDLOO gain on held-out operands",
                value=round(100 * (after - before), 1),
                unit="points",
                note=f"greedy, {percent(before)} % -> {percent(after)} %",
            )
        )
    return figures


def _curves(options: ItecStage) -> list[Curve]:
    rl = [f"itec-{r}-mdloo" for r in range(1, options.rounds + 1)] if "mdloo" in options.members else []
    offline = [f"itec-{r}-{m}" for r in range(1, options.rounds + 1) for m in ("dpo", "ipo") if m in options.members]
    curves = []
    if rl:
        curves += online_curves("MDLOO", rl)
    if offline:
        curves.append(Curve(title="DPO and IPO: preference accuracy", y=["accuracy"], tasks=offline))
    curves.append(
        Curve(title="Reward model loss", y=["loss"], tasks=[f"itec-{r}-reward" for r in range(1, options.rounds + 1)])
    )
    return curves
