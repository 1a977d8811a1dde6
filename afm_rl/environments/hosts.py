"""Where the environments of a batch of episodes run: in this process (ours), or in worker processes (the user's).

An episode is asked for by what happened in it so far: prompt, seed and the policy's turns. A host plays what it has not played
yet, so that an episode whose worker process was killed goes on in another one, from the start. What one episode does
wrong (it raises, hangs, kills its process) costs that episode alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from afm_rl.environments.calculator import Calculator
from afm_rl.environments.interface import Environment, StepResult
from afm_rl.types import Message, Prompt
from afm_rl.workers.child import load_callable
from afm_rl.workers.pool import Task, WorkerPool

#: Environments of this project, by the name that a topology calls them.
KINDS: Mapping[str, Callable[..., Environment]] = {"calculator": Calculator}


@dataclass(frozen=True)
class Episode:
    """`key` tells the episodes of a batch apart; `actions` are the policy's turns so far, none before the first."""

    key: str
    prompt: Prompt
    seed: int
    actions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Played:
    """What the last action led to; before the first one, the conversation. `problem` (cause, detail): why there is nothing."""

    messages: tuple[Message, ...] = ()
    result: StepResult = StepResult()
    problem: tuple[str, str] | None = None


class EnvironmentHost(Protocol):
    """Plays one step of each of several episodes."""

    def play(self, episodes: Sequence[Episode]) -> list[Played]:
        """What became of each, in order."""

    def close(self) -> None:
        """Let go of every episode."""


class LocalHost:
    """Environments in this process: for code that is known to end."""

    def __init__(self, make: Callable[[], Environment]) -> None:
        self._make = make
        self._open: dict[str, tuple[Environment, int]] = {}

    def play(self, episodes: Sequence[Episode]) -> list[Played]:
        return [self._play(episode) for episode in episodes]

    def close(self) -> None:
        self._open = {}

    def _play(self, episode: Episode) -> Played:
        try:
            return self.step(episode)
        except Exception as error:  # of one episode, which is left out; the others go on
            self._open.pop(episode.key, None)
            return Played(problem=("raised", f"{type(error).__name__}: {error}"))

    def step(self, episode: Episode) -> Played:
        """As `play`, of one episode; raises what the environment does, or ValueError for what it may not return."""
        environment, done = self._open.get(episode.key, (None, 0))
        if environment is None or done + 1 != len(episode.actions):
            environment = self._make()
            messages = tuple(environment.reset(episode.prompt, episode.seed))
            for action in episode.actions[:-1]:
                environment.step(action)
            if not episode.actions:
                self._open[episode.key] = (environment, 0)
                return Played(_checked_messages(messages))
        result = _checked_result(environment.step(episode.actions[-1]))
        if result.done:
            self._open.pop(episode.key, None)
        else:
            self._open[episode.key] = (environment, len(episode.actions))
        return Played(result=result)


class WorkerHost:
    """Environments in worker processes: `limit_s` seconds a step; `task` is the environment's class and options."""

    def __init__(self, task: Task, *, limit_s: float, workers: int = 1) -> None:
        """Raises WorkerStartError when the environment cannot be loaded."""
        inside = Task(
            "afm_rl.environments.hosts:in_worker",
            {"path": task.path, "options": dict(task.options)},
            memory_bytes=task.memory_bytes,
            search_path=task.search_path,
        )
        self._limit_s = limit_s
        self._pool = WorkerPool(inside, workers=workers)
        self._pool.start()

    def play(self, episodes: Sequence[Episode]) -> list[Played]:
        calls = [[_to_plain(episode)] for episode in episodes]
        # A replayed episode has as many steps to make as it has actions.
        limits_s = [self._limit_s * max(1, len(episode.actions)) for episode in episodes]
        outcomes = self._pool.run(calls, limits_s=limits_s)
        return [
            Played(problem=(outcome.cause, outcome.problem)) if outcome.cause is not None else _from_plain(outcome.value)
            for outcome in outcomes
        ]

    def close(self) -> None:
        self._pool.close()


def in_worker(*, path: str, options: Mapping[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What a worker process runs: a step of an episode, as plain data."""
    make = environment_maker(path, options)
    host = LocalHost(make)

    def step(episode: dict[str, Any]) -> dict[str, Any]:
        messages = tuple(Message(**message) for message in episode["prompt"].pop("messages"))
        prompt = Prompt(messages=messages, **episode["prompt"])
        played = host.step(Episode(episode["key"], prompt, episode["seed"], tuple(episode["actions"])))
        return {"messages": [vars(message) for message in played.messages], "result": vars(played.result)}

    return step


def environment_maker(path: str, options: Mapping[str, Any]) -> Callable[[], Environment]:
    """Constructs the environment class at an import path. Raises ValueError where there is none, or it is no environment."""
    found = load_callable(path, {})
    for method in ("reset", "step"):
        if not callable(getattr(found, method, None)):
            raise ValueError(f"{path!r} has no method {method!r}: an environment has reset(prompt, seed) and step(action)")
    return lambda: found(**options)


def _checked_messages(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if not messages or not all(isinstance(message, Message) for message in messages):
        raise ValueError(f"reset must return the conversation as afm_rl.types.Message, got {messages!r}")
    return messages


def _checked_result(result: StepResult) -> StepResult:
    if not isinstance(result, StepResult):
        raise ValueError(f"step must return a StepResult, got a {type(result).__name__}")
    if not math.isfinite(result.reward):
        raise ValueError(f"step returned the reward {result.reward}")
    return result


def _to_plain(episode: Episode) -> dict[str, Any]:
    prompt = episode.prompt
    return {
        "key": episode.key,
        "seed": episode.seed,
        "actions": list(episode.actions),
        "prompt": {
            "id": prompt.id,
            "kind": prompt.kind,
            "messages": [vars(message) for message in prompt.messages],
            "checks": [dict(check) for check in prompt.checks],
        },
    }


def _from_plain(value: Mapping[str, Any]) -> Played:
    return Played(tuple(Message(**message) for message in value["messages"]), StepResult(**value["result"]))
