"""The reward actor: adds up a learned reward model, programmatic checks, the user's functions, what an environment paid.

Consumes `Group`s (or groups that an environment has scored) and the prompts they answer; produces `ScoredGroup`s with every
component kept apart, and reranks responses prompt by prompt (4.3.2). A response whose reward cannot be computed, whoever
failed, is marked invalid with the reason and counted; each kind of failure is logged once. A response's score is the same
bits whatever else is in the call. Functions run in worker processes (`afm_rl/workers`).

Shapes: G responses of a group.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from actors.reward_model_scores import RewardModelScorer, SequenceScores
from actors.reward_texts import ResponseTexts
from afm_rl.data.checks import is_checkable, passes
from afm_rl.rewards.functions import FunctionReward
from afm_rl.rewards.problems import kind_of, problem
from afm_rl.rewards.spec import RewardSpec
from afm_rl.tokenizer import Tokenizer
from afm_rl.types import Group, Prompt, ScoredGroup
from afm_rl.workers.child import describe

__all__ = ["Reward", "RewardSpec", "SequenceScores"]

log = logging.getLogger(__name__)

#: Why a cut response is invalid, where the topology says so.
CUT = problem(
    "truncated", "invalid", "nothing ended the response within max_tokens, and the topology says `truncated: invalid`"
)
#: Of one component: the values of a group's responses [G], and why one is missing ("" where it is not).
Component = tuple[np.ndarray, Sequence[str]]


class Reward:
    """One replica."""

    def __init__(self, *, compute_dtype: str = "float32") -> None:
        self._dtype = compute_dtype
        self._spec: RewardSpec | None = None
        self._tokenizer: Tokenizer | None = None
        self._model: tuple[str, RewardModelScorer] | None = None
        self._functions: dict[str, FunctionReward] = {}
        self._invalid: Counter[str] = Counter()

    def load(self, spec: RewardSpec) -> None:
        """Use these components from the next call on.

        Raises ValueError for a reward model that is none, WorkerStartError (a UserError) for a function that does not load.
        """
        self._tokenizer = Tokenizer.load(Path(spec.tokenizer_folder))
        if spec.model_folder is not None:
            self._model = (spec.model_folder, RewardModelScorer(spec.model_folder, compute_dtype=self._dtype))
        for function in self._functions.values():
            function.close()
        self._functions = {}
        for of in spec.functions:
            if spec.weights.get(of.name):
                self._functions[of.name] = FunctionReward(of)
        self._spec = spec

    def score(self, groups: Sequence[Group | ScoredGroup], prompts: Sequence[Prompt]) -> list[ScoredGroup]:
        """Rewards of every response, in order; prompts[i] is what groups[i] answers.

        A ScoredGroup is one that an environment has paid for: its components are kept, and "environment" has its weight.
        """
        spec = self._loaded()
        played = [one if isinstance(one, ScoredGroup) else None for one in groups]
        plain = [one.group if isinstance(one, ScoredGroup) else one for one in groups]
        texts = [ResponseTexts(self._required_tokenizer(), group) for group in plain]
        components: dict[str, list[Component]] = {}
        end_s = time.monotonic() + spec.budget_s
        for name in (name for name, weight in spec.weights.items() if weight):
            left_s = max(0.0, end_s - time.monotonic())
            components[name] = self._component(name, texts, prompts, played, budget_s=left_s)
        return [
            self._sum(spec, texts[i], played[i], {name: of[i] for name, of in components.items()})
            for i in range(len(groups))
        ]

    def sequence_scores(self, sequences: Sequence[np.ndarray]) -> SequenceScores:
        """Score whole token sequences (prompt and response) with the learned model."""
        if self._model is None:
            raise RuntimeError("this reward actor holds no reward model: load one first")
        return self._model[1](sequences)

    def rerank(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[int]:
        """Per prompt, the index of the response with the highest reward (4.3.2), by the components of the last `load`.

        The first one where no response of a prompt has a reward.
        """
        scored = self.score([self._as_group(p, texts) for p, texts in zip(prompts, responses, strict=True)], prompts)
        return [int(np.where(s.valid_G, s.reward_G, -np.inf).argmax()) for s in scored]

    def invalid_responses(self) -> int:
        """How many responses got no reward since the start."""
        return self._invalid.total()

    def invalid_causes(self) -> dict[str, int]:
        """How many responses got no reward since the start, by component and cause ("math_timeout")."""
        return dict(self._invalid)

    def _component(
        self,
        name: str,
        texts: Sequence[ResponseTexts],
        prompts: Sequence[Prompt],
        played: Sequence[ScoredGroup | None],
        *,
        budget_s: float,
    ) -> list[Component]:
        """One component of every group."""
        if name == "model":
            return self._by_model([of.group for of in texts])
        if name == "verifier":
            return [self._verify(of, prompt) for of, prompt in zip(texts, prompts, strict=True)]
        if name == "environment":
            return [_paid(of.group, by) for of, by in zip(texts, played, strict=True)]
        spec = self._loaded()
        if name == "length":
            assert spec.length is not None
            return [(spec.length(of.token_counts), ()) for of in texts]
        asked = [(prompt, of.for_functions()) for of, prompt in zip(texts, prompts, strict=True)]
        return list(self._functions[name](asked, budget_s=budget_s))

    def _by_model(self, groups: Sequence[Group]) -> list[Component]:
        flat = self.sequence_scores([np.concatenate([g.prompt_T, r]) for g in groups for r in g.responses]).reward_B
        return [(part, ()) for part in np.split(flat, np.cumsum([len(g.responses) for g in groups])[:-1])]

    def _verify(self, texts: ResponseTexts, prompt: Prompt) -> Component:
        """1 where the checks pass, 0 where not or without checks, NaN where a check failed to run."""
        count = len(texts.own)
        if not is_checkable(prompt):
            return np.zeros(count, np.float32), ()
        values, problems = np.full(count, np.nan, np.float32), [""] * count
        for j, text in enumerate(texts.own):
            try:
                values[j] = float(passes(prompt, text))
            except Exception as error:  # one response must not stop a run; the cause is kept, counted and logged
                problems[j] = problem("verifier", "raised", describe(error))
        return values, problems

    def _sum(
        self, spec: RewardSpec, texts: ResponseTexts, played: ScoredGroup | None, components: Mapping[str, Component]
    ) -> ScoredGroup:
        """The weighted sum of one group, with what length and truncation do to it."""
        group, count = texts.group, len(texts.group.responses)
        total_G = np.zeros(count)
        for name, (values_G, _) in components.items():
            total_G = total_G + spec.weights[name] * values_G.astype(np.float64)
        cut_G = spec.truncation.cut(group.finished, group.responses, end_of_turn_id=self._end_of_turn_id)
        reward_G = spec.truncation.apply(total_G, cut_G).astype(np.float32)
        problems = [_first_problem(components, j) or _environment_problem(played, j) for j in range(count)]
        for j in np.flatnonzero(~np.isfinite(reward_G)):
            if not problems[j]:
                by_cut = cut_G[j] and spec.truncation.kind == "invalid"
                problems[j] = CUT if by_cut else problem("sum", "not_finite", f"the reward is {reward_G[j]}")
        valid_G = np.array([not text for text in problems], bool)
        self._count(group, problems)
        own = {name: values_G for name, (values_G, _) in components.items()}
        kept = {**(played.components if played is not None else {}), **own}
        return ScoredGroup(group, np.where(valid_G, reward_G, np.nan).astype(np.float32), valid_G, kept, _if_any(problems))

    def _count(self, group: Group, problems: Sequence[str]) -> None:
        """Count what failed, and log the first failure of each kind."""
        for j, text in enumerate(problems):
            if text:
                if not self._invalid[kind_of(text)]:
                    log.warning(
                        "response %d to prompt %s has no reward and is left out: %s (more of this kind are only counted)",
                        j,
                        group.id,
                        text,
                    )
                self._invalid[kind_of(text)] += 1

    def _as_group(self, prompt: Prompt, texts: Sequence[str]) -> Group:
        """Texts as a group: nobody's log-probabilities, which no reward looks at."""
        tokenizer = self._required_tokenizer()
        tokens = tuple(np.asarray(tokenizer.encode_response(text), np.int32) for text in texts)
        prompt_T = np.asarray(tokenizer.encode_chat(prompt.messages), np.int32)
        no_logps = tuple(np.zeros(len(t), np.float32) for t in tokens)
        return Group(prompt.id, prompt_T, tokens, no_logps, (True,) * len(tokens), policy="", version=0)

    @property
    def _end_of_turn_id(self) -> int:
        return self._required_tokenizer().end_of_turn_id

    def _loaded(self) -> RewardSpec:
        if self._spec is None:
            raise RuntimeError("this reward actor has no components: load a RewardSpec first")
        return self._spec

    def _required_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise RuntimeError("this reward actor has no tokenizer: load a RewardSpec first")
        return self._tokenizer


def _paid(group: Group, played: ScoredGroup | None) -> Component:
    """What the environment paid. Raises ValueError for a group that no environment has played."""
    if played is None or "environment" not in played.components:
        raise ValueError(
            f"the reward gives the environment a weight, but group {group.id!r} was not played in one; "
            "give the stage an `environment`, or remove the weight"
        )
    return played.components["environment"], played.problems


def _first_problem(components: Mapping[str, Component], j: int) -> str:
    for name, (values_G, problems) in components.items():
        if problems and problems[j]:
            return problems[j]
        if not np.isfinite(values_G[j]):
            return problem(name, "not_finite", f"its value is {values_G[j]}")
    return ""


def _environment_problem(played: ScoredGroup | None, j: int) -> str:
    """An episode that failed is no episode, even where what the environment paid does not count."""
    return played.problems[j] if played is not None and played.problems else ""


def _if_any(problems: Sequence[str]) -> tuple[str, ...]:
    return tuple(problems) if any(problems) else ()
