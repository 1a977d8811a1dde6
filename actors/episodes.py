"""Rollouts over several turns: G episodes a prompt, all episodes' turns generated together, turn by turn.

    prompts -> reset -> ask (turn 1, G responses a prompt) -> step -> ask (turn 2, one an episode) -> ... -> ScoredGroups

An episode becomes one response: the policy's tokens of every turn and between them the environment's, exactly as the engine
read them; `Group.actions` is True on the policy's, and the environment's carry log-probability 0 and are not trained on.
It ends when the environment is done, after `max_turns` turns, or cut: at `max_tokens` tokens (both kinds), at the context's
end, or by a turn that no stop token ends. Seeds follow from (seed, prompt, response, turn): what else is played changes
nothing. Not in the paper, whose responses are one turn.

Shapes: G responses (episodes) of a prompt, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np

from actors.turn_tokens import TurnTokens
from afm_rl.environments.hosts import EnvironmentHost, Episode
from afm_rl.generate import request_seed
from afm_rl.rewards.problems import problem
from afm_rl.tokenizer import Tokenizer
from afm_rl.types import GenerationRequest, Group, Prompt, ScoredGroup

#: Answers requests, in order: the samplers, as a stage has them.
Ask = Callable[[Sequence[GenerationRequest]], Sequence[Group]]


@dataclass(frozen=True, kw_only=True)
class EpisodeOptions:
    """How episodes are played; `turn_tokens` bounds a turn of the policy (None: `max_tokens` alone does)."""

    responses: int
    max_turns: int
    max_tokens: int
    max_context: int
    temperature: float = 1.0
    seed: int = 0
    turn_tokens: int | None = None


@dataclass
class _Playing:
    """One episode so far: `number` is j of G; parts of its response by turn, `mine` where the policy chose the tokens."""

    prompt: Prompt
    number: int
    seed: int  # of the environment
    prompt_T: np.ndarray
    actions: tuple[str, ...] = ()
    tokens: list[np.ndarray] = field(default_factory=list)
    logps: list[np.ndarray] = field(default_factory=list)
    mine: list[np.ndarray] = field(default_factory=list)
    versions: list[np.ndarray] = field(default_factory=list)
    policy: str = ""
    reward: float = 0.0
    finished: bool = False  # the last turn, by a stop token
    over: bool = False
    problem: str = ""

    @property
    def length(self) -> int:
        return sum(len(part) for part in self.tokens)

    @property
    def key(self) -> str:
        return f"{self.prompt.id}/{self.number}"

    def add(self, tokens_T: np.ndarray, *, logps_T: np.ndarray, versions_T: np.ndarray, mine: bool) -> None:
        self.tokens.append(tokens_T.astype(np.int32))
        self.logps.append(logps_T.astype(np.float32))
        self.versions.append(versions_T.astype(np.int32))
        self.mine.append(np.full(len(tokens_T), mine))

    def take_turn(self, group: Group, row: int, text: str) -> None:
        """The policy's turn: response `row` of a group."""
        tokens_T = group.responses[row]
        versions_T = group.versions[row] if group.versions else np.full(len(tokens_T), group.version)
        self.add(tokens_T, logps_T=group.logps[row], versions_T=versions_T, mine=True)
        self.policy, self.finished = group.policy, group.finished[row]
        self.actions += (text,)

    def take_observation(self, tokens_T: np.ndarray) -> None:
        """The environment's words, stamped with the version of the turn before them."""
        before = self.versions[-1][-1:] if len(self.versions[-1]) else np.zeros(1)
        zeros_T = np.zeros(len(tokens_T))
        self.add(tokens_T, logps_T=zeros_T, versions_T=np.repeat(before, len(tokens_T)), mine=False)

    def fail(self, cause: tuple[str, str]) -> None:
        self.problem, self.over = problem("environment", *cause), True


def play(
    ask: Ask, prompts: Sequence[Prompt], *, host: EnvironmentHost, tokenizer: Tokenizer, options: EpisodeOptions
) -> list[ScoredGroup]:
    """The episodes of every prompt as one group each, in order, with what the environment paid as component "environment".

    An episode whose environment fails is not valid and says why; where `reset` fails, so are all of the prompt's. Raises
    what `ask` raises, and ValueError for a chat format in which turns cannot be appended.
    """
    rollout = _Rollout(ask, host, TurnTokens(tokenizer), options)
    with closing(host):
        episodes = rollout.open(prompts, tokenizer)
        for turn in range(options.max_turns):
            if active := [one for of_prompt in episodes for one in of_prompt if not one.over]:
                rollout.generate(active, turn)
                rollout.step(active, last=turn == options.max_turns - 1)
    return [_as_group(prompt, played) for prompt, played in zip(prompts, episodes, strict=True)]


@dataclass
class _Rollout:
    """What the turns of a call share."""

    ask: Ask
    host: EnvironmentHost
    turns: TurnTokens
    options: EpisodeOptions

    def open(self, prompts: Sequence[Prompt], tokenizer: Tokenizer) -> list[list[_Playing]]:
        """Every prompt's episodes; all of a prompt begin with the same conversation."""
        seeds = [request_seed(self.options.seed, prompt.id, "environment") for prompt in prompts]
        opened = self.host.play([Episode(f"{p.id}/0", p, seed) for p, seed in zip(prompts, seeds, strict=True)])
        episodes = []
        for prompt, seed, start in zip(prompts, seeds, opened, strict=True):
            prompt_T = np.asarray(tokenizer.encode_chat(start.messages or prompt.messages), np.int32)
            cause = start.problem
            if cause is None and len(prompt_T) >= self.options.max_context:
                cause = ("too_long", f"it opens with {len(prompt_T)} tokens; the context has {self.options.max_context}")
            played = [_Playing(prompt, j, seed, prompt_T) for j in range(self.options.responses)]
            for one in played if cause is not None else ():
                one.fail(cause or ("", ""))
            episodes.append(played)
        return episodes

    def generate(self, active: Sequence[_Playing], turn: int) -> None:
        """The next turn of every episode. The first is one request a prompt, whose responses share its pages."""
        if turn:
            requests = [self._request(one, f"{one.key}/{turn}", seed=(one.number, turn)) for one in active]
            rows = [(i, 0) for i in range(len(active))]
        else:
            first = {one.prompt.id: one for one in active}
            order = {prompt_id: i for i, prompt_id in enumerate(first)}
            shared = self.options.responses
            requests = [replace(self._request(one, one.prompt.id), num_responses=shared) for one in first.values()]
            rows = [(order[one.prompt.id], one.number) for one in active]
        groups = self.ask(requests)
        for one, (i, row) in zip(active, rows, strict=True):
            one.take_turn(groups[i], row, self.turns.action(groups[i].responses[row]))

    def step(self, active: Sequence[_Playing], *, last: bool) -> None:
        """Let the environment answer; an episode that goes on gets its words as tokens."""
        asked = [Episode(one.key, one.prompt, one.seed, one.actions) for one in active]
        for one, played in zip(active, self.host.play(asked), strict=True):
            if played.problem is not None:
                one.fail(played.problem)
                continue
            one.reward += played.result.reward
            one.over = played.result.done or last or not one.finished
            if not one.over:
                self._observe(one, played.result.observation)

    def _observe(self, one: _Playing, observation: str) -> None:
        try:
            tokens_T = self.turns.after(one.tokens[-1], observation)
        except (ValueError, TypeError) as error:  # no text, or one that cannot be encoded: this environment's mistake
            one.fail(("raised", f"an observation that cannot be encoded: {error}"))
            return
        if len(tokens_T) >= self._room(one):
            one.over, one.finished = True, False  # nothing could follow: the response ends with the policy's turn
        else:
            one.take_observation(tokens_T)

    def _room(self, one: _Playing) -> int:
        """Tokens that may still follow."""
        return min(self.options.max_tokens, self.options.max_context - len(one.prompt_T)) - one.length

    def _request(self, one: _Playing, name: str, *, seed: tuple[object, ...] = ()) -> GenerationRequest:
        options = self.options
        return GenerationRequest(
            id=name,
            prompt_T=np.concatenate([one.prompt_T, *one.tokens]),
            max_tokens=min(self._room(one), options.turn_tokens or options.max_tokens),
            temperature=options.temperature,
            seed=request_seed(options.seed, one.prompt.id, *seed),
        )


def _as_group(prompt: Prompt, episodes: Sequence[_Playing]) -> ScoredGroup:
    """A prompt's episodes as responses, and what the environment paid."""

    def joined(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)

    versions = tuple(joined(one.versions, np.int32) for one in episodes)
    actions = tuple(joined(one.mine, np.bool_) for one in episodes)
    begun = next((int(v[0]) for v in versions if len(v)), 0)
    group = Group(
        prompt.id,
        episodes[0].prompt_T,
        responses=tuple(joined(one.tokens, np.int32) for one in episodes),
        logps=tuple(joined(one.logps, np.float32) for one in episodes),
        finished=tuple(one.finished for one in episodes),
        policy=next((one.policy for one in episodes if one.policy), ""),
        version=begun,
        versions=versions if any((v != begun).any() for v in versions) else (),
        actions=actions if not all(a.all() for a in actions) else (),
    )
    problems = tuple(one.problem for one in episodes)
    valid_G = np.array([not text for text in problems], bool)
    reward_G = np.where(valid_G, [one.reward for one in episodes], np.nan).astype(np.float32)
    return ScoredGroup(group, reward_G, valid_G, {"environment": reward_G}, problems if any(problems) else ())
