"""Held-out measurements that several stages report: accuracy of a policy, and its win rate against another.

Greedy and sampled accuracy are always given together: RL moves them differently. Answers are kept, so that the report can
show them side by side and a comparison needs no second generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from actors.reward import RewardSpec
from actors.reward_texts import ResponseTexts
from afm_rl.data.checks import is_checkable, passes
from afm_rl.generate import request_seed
from afm_rl.packing import Example
from afm_rl.types import Pair, Prompt
from topologies.environment_options import EnvironmentOptions
from topologies.stages.context import Context, Policy
from topologies.stages.examples import example


@dataclass(frozen=True)
class Measured:
    """Accuracies in 0..1 over the prompts that have checks (None where none has), by prompt kind too, and the answers."""

    policy: str
    greedy: float | None
    sampled: float | None
    greedy_by_kind: dict[str, float]
    sampled_by_kind: dict[str, float]
    greedy_answers: list[str]
    sampled_answers: list[str]


def measure(
    ctx: Context,
    policy: Policy,
    *,
    max_tokens: int,
    limit: int | None = None,
    prompts: Sequence[Prompt] | None = None,
    environment: EnvironmentOptions | None = None,
) -> Measured:
    """Greedy and sampled (T = 1) answers of a policy to held-out prompts, journalled under the policy's name.

    `prompts` None: the first `limit` of the held-out prompts; a feature brings its own. In an `environment` the answer is
    what the policy says last.
    """
    if prompts is None:
        prompts, key = ctx.data.eval_prompts[:limit], f"measure/{policy.name}/{max_tokens}"
    else:
        key = f"measure/{policy.name}/{max_tokens}/feature"
    key += f"/{len(prompts)}" + ("/episodes" if environment is not None else "")

    def work() -> dict[str, Any]:
        answers = {}
        for mode, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            if environment is not None:
                answers[mode] = _played(ctx, policy, prompts, environment, temperature=temperature, max_tokens=max_tokens)
                continue
            requests = ctx.requests(prompts, purpose="eval", temperature=temperature, max_tokens=max_tokens)
            answers[mode] = [ctx.texts(group)[0] for group in ctx.sample(policy, requests)]
        return {
            "policy": policy.name,
            "greedy": share_right(prompts, answers["greedy"]),
            "sampled": share_right(prompts, answers["sampled"]),
            "greedy_by_kind": by_kind(prompts, answers["greedy"]),
            "sampled_by_kind": by_kind(prompts, answers["sampled"]),
            "greedy_answers": answers["greedy"],
            "sampled_answers": answers["sampled"],
        }

    return Measured(**ctx.once(key, work))


def _played(
    ctx: Context,
    policy: Policy,
    prompts: Sequence[Prompt],
    environment: EnvironmentOptions,
    *,
    temperature: float,
    max_tokens: int,
) -> list[str]:
    """The last turn of one episode to each prompt."""
    ctx.deploy(policy, ctx.samplers)
    played = environment.episodes(
        partial(ctx.samplers.answer, policy.name),
        prompts,
        host=environment.host(),
        tokenizer=ctx.tokenizer,
        responses=1,
        max_tokens=max_tokens,
        max_context=ctx.context_tokens,
        temperature=temperature,
        seed=request_seed(ctx.seed, "eval"),
    )
    return [ResponseTexts(ctx.tokenizer, one.group).last_turns[0] for one in played]


def share_right(prompts: Sequence[Prompt], answers: Sequence[str]) -> float | None:
    """Share of the checkable prompts whose answer passes; None where no prompt is checkable."""
    right = [passes(p, a) for p, a in zip(prompts, answers, strict=True) if is_checkable(p)]
    return sum(right) / len(right) if right else None


def by_kind(prompts: Sequence[Prompt], answers: Sequence[str]) -> dict[str, float]:
    """`share_right` per prompt kind."""
    shares = {}
    for kind in sorted({p.kind for p in prompts}):
        pairs = [(p, a) for p, a in zip(prompts, answers, strict=True) if p.kind == kind]
        share = share_right([p for p, _ in pairs], [a for _, a in pairs])
        if share is not None:
            shares[kind] = share
    return shares


def win_rate(ctx: Context, measured: Measured, baseline: Measured, *, limit: int | None = None) -> dict[str, float]:
    """Shares of held-out prompts on which the policy's sampled answer is preferred to the baseline's, tied, or not."""
    prompts = ctx.data.eval_prompts[:limit]
    pairs = [
        Pair(prompt, ours, theirs, measured.policy, baseline.policy)
        for prompt, ours, theirs in zip(prompts, measured.sampled_answers, baseline.sampled_answers, strict=True)
        if prompt.checks
    ]
    outcomes = [outcome for part in ctx.annotator.map("compare", pairs) for outcome in part]
    return {name: sum(o == name for o in outcomes) / max(1, len(outcomes)) for name in ("win", "tie", "loss")}


def mean_reward(ctx: Context, reward_model: Policy, measured: Measured, *, limit: int | None = None) -> float:
    """Mean learned reward of a policy's sampled answers to the held-out prompts."""
    prompts = ctx.data.eval_prompts[:limit]
    ctx.rewards.load(RewardSpec(str(ctx.tokenizer_folder), str(reward_model.folder), {"model": 1.0}))
    sequences = [
        np.asarray(answer_example(ctx, p, a).tokens, np.int32)
        for p, a in zip(prompts, measured.sampled_answers, strict=True)
    ]
    return float(ctx.rewards.sequence_scores(sequences).reward_B.mean())


def answer_example(ctx: Context, prompt: Prompt, answer: str) -> Example:
    """Prompt and decoded answer as tokens, ready for the reward model."""
    return example(ctx.tokenizer, prompt, answer, limit=ctx.topology.model.config().max_positions)


def percent(share: float | None) -> float | None:
    """0.5 -> 50.0, for tables."""
    return None if share is None else round(100 * share, 1)
