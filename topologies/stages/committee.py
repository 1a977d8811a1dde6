"""What a committee of policies answers, and which answer the reward model likes best, prompt by prompt (4.3.2)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgpack
import numpy as np

from afm_rl.types import Demonstration, Pair, Prompt
from topologies.stage_options import RewardWeights
from topologies.stages.context import Context, Policy
from topologies.stages.examples import num_tokens
from topologies.stages.measure import answer_example

#: The reward by which answers to held-out prompts are chosen: a verifier would be the evaluation itself.
LEARNED_ALONE = RewardWeights(model=1.0, verifier=0.0)
#: What every member answered to one prompt: policy name -> response texts.
Answers = Mapping[str, Sequence[str]]


def sample_committee(
    ctx: Context,
    committee: Sequence[Policy],
    prompts: Sequence[Prompt],
    *,
    purpose: str,
    per_prompt: int,
    temperature: float,
    max_tokens: int,
) -> list[Answers]:
    """At least `per_prompt` responses to every prompt, shared evenly by the members; kept in rollouts/PURPOSE.msgpack."""
    path = ctx.run.rollouts / f"{purpose}.msgpack"
    each = max(1, -(-per_prompt // len(committee)))

    def work() -> str:
        answers: list[dict[str, list[str]]] = [{} for _ in prompts]
        with ctx.progress.task(f"{purpose} responses", total=len(committee)) as bar:
            for member in committee:
                ctx.deploy(member, ctx.committee, beside=committee)
                requests = ctx.requests(
                    prompts,
                    purpose=(purpose, member.name),
                    responses=each,
                    temperature=temperature,
                    max_tokens=max_tokens,
                )
                for found, group in zip(answers, ctx.committee.answer(member.name, requests), strict=True):
                    found[member.name] = ctx.texts(group)
                bar.advance(1)
        ctx.committee.free()
        _write(path, {"prompts": [p.id for p in prompts], "answers": answers})
        return str(path.name)

    ctx.once(f"responses/{purpose}", work)
    return msgpack.unpackb(path.read_bytes())["answers"]


def distinct_pairs(
    prompts: Sequence[Prompt], answers: Sequence[Answers], *, per_prompt: int, seed: Sequence[int]
) -> list[Pair]:
    """Up to `per_prompt` random pairs of different, non-empty responses for each prompt."""
    rng = np.random.default_rng(list(seed))
    pairs = []
    for prompt, by_member in zip(prompts, answers, strict=True):
        texts: dict[str, str] = {}  # response -> the first member that gave it
        for member, responses in by_member.items():
            for text in filter(str.strip, responses):
                texts.setdefault(text, member)
        combinations = list(itertools.combinations(texts, 2))
        for index in rng.permutation(len(combinations))[:per_prompt]:
            a, b = combinations[index] if rng.random() < 0.5 else combinations[index][::-1]
            pairs.append(Pair(prompt, a, b, texts[a], texts[b]))
    return pairs


def best_answers(
    ctx: Context, reward_model: Policy, answers: Sequence[Answers], prompts: Sequence[Prompt], *, weights: RewardWeights
) -> list[str]:
    """The response with the highest reward for each prompt, over all members."""
    candidates = [[text for texts in by_member.values() for text in texts] for by_member in answers]
    _load(ctx, reward_model, weights)
    picked = ctx.rewards.rerank(prompts, candidates)
    return [texts[i] for texts, i in zip(candidates, picked, strict=True)]


def lessons(ctx: Context, prompts: Sequence[Prompt], answers: Sequence[str], *, limit: int) -> list[Demonstration]:
    """The chosen answers as demonstrations, without those that re-encode to more than `limit` tokens."""
    shown = [Demonstration(prompt, text) for prompt, text in zip(prompts, answers, strict=True)]
    return [d for d in shown if num_tokens(ctx.tokenizer, d.prompt, d.response) <= limit]


def best_by_prompt(
    ctx: Context, reward_model: Policy, answers: Sequence[Answers], prompts: Sequence[Prompt]
) -> dict[str, list[str]]:
    """Chosen answers under three teachers: every member's first response, the globally best member, the prompt's best.

    "Globally best" is the member whose responses have the highest mean reward; its own best response is taken for each
    prompt, so that both sides choose with the same reward model.
    """
    members = list(answers[0])
    rewards = {m: _rewards(ctx, reward_model, [a[m] for a in answers], prompts) for m in members}
    best_member = max(members, key=lambda m: np.concatenate(rewards[m]).mean())
    chosen = {f"{m}, one response": [a[m][0] for a in answers] for m in members}
    chosen[f"best single member ({best_member}), reranked"] = [
        a[best_member][int(np.argmax(r))] for a, r in zip(answers, rewards[best_member], strict=True)
    ]
    chosen["prompt-level rerank over the committee"] = [
        max(((float(r), text) for m in members for r, text in zip(rewards[m][i], a[m], strict=True)), key=lambda x: x[0])[1]
        for i, a in enumerate(answers)
    ]
    return chosen


def _rewards(
    ctx: Context, reward_model: Policy, texts: Sequence[Sequence[str]], prompts: Sequence[Prompt]
) -> list[np.ndarray]:
    flat = [_tokens(ctx, p, t) for p, ts in zip(prompts, texts, strict=True) for t in ts]
    _load(ctx, reward_model)
    return np.split(ctx.rewards.sequence_scores(flat).reward_B, np.cumsum([len(ts) for ts in texts])[:-1])


def _load(ctx: Context, reward_model: Policy, weights: RewardWeights = LEARNED_ALONE) -> None:
    spec = weights.spec(tokenizer_folder=str(ctx.tokenizer_folder), model_folder=str(reward_model.folder))
    ctx.rewards.load(spec)


def _tokens(ctx: Context, prompt: Prompt, text: str) -> np.ndarray:
    return np.asarray(answer_example(ctx, prompt, text).tokens, np.int32)


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(msgpack.packb(content))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
