"""The environment interface (not in the paper, whose bandit is one turn): `reset` opens an episode, `step` answers a turn.

    messages = environment.reset(prompt, seed)        what the policy reads first
    result = environment.step(action)                 its turn's text -> what it reads next, what it is paid, whether that is all

One object plays one episode at a time. The responses to one prompt share prompt and seed, so that they differ by what the
policy does alone and can be each other's baseline. An environment must be a function of prompt, seed and actions: after a
crash an episode is played again from the start. A single-turn verifier is the simplest case (`SingleTurn`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from afm_rl.types import Message, Prompt


@dataclass(frozen=True)
class StepResult:
    """`observation`: what the policy reads before its next turn (unused when `done`); `reward`: what this turn is paid."""

    observation: str = ""
    reward: float = 0.0
    done: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)


class Environment(Protocol):
    """What an episode is played in."""

    def reset(self, prompt: Prompt, seed: int) -> Sequence[Message]:
        """Open an episode; the conversation whose next turn is the policy's."""

    def step(self, action: str) -> StepResult:
        """Take the text of the policy's turn, without markers."""


class SingleTurn:
    """A verifier as an environment: the conversation is the prompt's own, one turn, paid what the function says of it."""

    def __init__(self, reward: Callable[[Prompt, str], float]) -> None:
        self._reward = reward
        self._prompt: Prompt | None = None

    def reset(self, prompt: Prompt, seed: int) -> Sequence[Message]:
        del seed
        self._prompt = prompt
        return prompt.messages

    def step(self, action: str) -> StepResult:
        if self._prompt is None:
            raise RuntimeError("reset the environment before its first step")
        return StepResult(reward=float(self._reward(self._prompt, action)), done=True)
