"""Every policy of the run on the held-out prompts, greedy and sampled, and the answers side by side for the report."""

from __future__ import annotations

from typing import Any

from afm_rl.data.checks import is_checkable, passes
from topologies.report_data import Answer, Figure, Sample, StageResult
from topologies.stage_options import EvaluateStage
from topologies.stages.context import Context, Policy
from topologies.stages.itec import final_committee
from topologies.stages.measure import Measured, measure, percent
from topologies.stages.tables import accuracy_by_kind

#: How many prompts of each kind the report shows with all answers.
SAMPLES_PER_KIND = 3


def policies(ctx: Context) -> list[Policy]:
    """The policies worth comparing, in the order they were made."""
    found = [ctx.policy("sft")] if ctx.has("sft") else [ctx.base]
    if ctx.has("rl"):
        found.append(ctx.policy("rl"))
    if ctx.has("itec"):
        found += [p for p in final_committee(ctx)[0] if p.name != "sft"]
    if ctx.has("distill_committee"):
        found += [ctx.policy("small-sft"), ctx.policy("distilled")]
    return found


def evaluated(ctx: Context, options: EvaluateStage) -> list[Measured]:
    """All of them, measured on the first `prompts` held-out prompts."""
    how: dict[str, Any] = {"max_tokens": options.max_tokens, "limit": options.prompts, "environment": ctx.environment}
    return [measure(ctx, policy, **how) for policy in policies(ctx)]


def run(ctx: Context, options: EvaluateStage) -> StageResult:
    """The comparison table."""
    measured = evaluated(ctx, options)
    best = max(measured, key=lambda m: m.greedy if m.greedy is not None else -1.0)
    return StageResult(
        name="evaluate",
        title="Evaluation on held-out prompts",
        paper="6",
        figures=[
            Figure(label="held-out prompts", value=min(options.prompts, len(ctx.data.eval_prompts))),
            Figure(label="best policy", value=best.policy, note=f"{percent(best.greedy)} % greedy"),
        ],
        tables=[accuracy_by_kind(measured)],
    )


def samples(ctx: Context, options: EvaluateStage) -> list[Sample]:
    """A few prompts of every kind with every policy's greedy answer."""
    measured = evaluated(ctx, options)
    shown: list[Sample] = []
    counts: dict[str, int] = {}
    for i, prompt in enumerate(ctx.data.eval_prompts[: options.prompts]):
        counts[prompt.kind] = counts.get(prompt.kind, 0) + 1
        if counts[prompt.kind] > SAMPLES_PER_KIND:
            continue
        answers = [
            Answer(
                policy=m.policy,
                text=m.greedy_answers[i],
                passed=passes(prompt, m.greedy_answers[i]) if is_checkable(prompt) else None,
            )
            for m in measured
        ]
        expected = next((str(c["value"]) for c in prompt.checks if c["type"] == "answer"), None)
        shown.append(Sample(prompt=prompt.messages[-1].content, kind=prompt.kind, expected=expected, answers=answers))
    return sorted(shown, key=lambda s: s.kind)
