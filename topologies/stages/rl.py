"""Online RL on its own (4.3.3): one policy from the SFT policy or the base model, by MDLOO or one of its comparisons."""

from __future__ import annotations

from topologies.online.curves import online_curves
from topologies.online.loop import train_online
from topologies.report_data import Figure, StageResult
from topologies.stage_options import RlStage
from topologies.stages.context import Context, Policy
from topologies.stages.measure import measure, percent
from topologies.stages.tables import accuracy_by_kind

#: The policy that the stage trains.
POLICY = "rl"


def start_policy(ctx: Context, options: RlStage) -> Policy:
    """What training starts from, and stays close to."""
    return ctx.policy("sft") if options.start == "sft" or (options.start is None and ctx.has("sft")) else ctx.base


def run(ctx: Context, options: RlStage) -> StageResult:
    """Train and measure, before and after, on the held-out prompts."""
    start, policy = start_policy(ctx, options), ctx.policy(POLICY)
    before = measure(ctx, start, max_tokens=options.max_tokens)
    reward_model = ctx.policy("reward") if ctx.has("reward_model") else None
    train_online(ctx, options, stage=options.name, start=start, reward_model=reward_model, policy=policy)
    after = measure(ctx, policy, max_tokens=options.max_tokens)
    return StageResult(
        name=options.name,
        title=f"Online RL: {options.algorithm}",
        paper="4.3.3, E.2",
        figures=[
            _accuracy("greedy accuracy", before.greedy, after.greedy),
            _accuracy("sampled accuracy", before.sampled, after.sampled),
        ],
        tables=[accuracy_by_kind([before, after])],
        curves=online_curves(options.algorithm, [policy.name]),
    )


def _accuracy(label: str, before: float | None, after: float | None) -> Figure:
    return Figure(label=label, value=percent(after), unit="%", note=f"held-out prompts; {percent(before)} % before")
