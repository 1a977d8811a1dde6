# ruff: noqa: ARG001 (the face of a reward)
"""A user's own rewards and environment, for topologies of tests: what they pay a model that knows nothing differs."""

from __future__ import annotations

from collections.abc import Sequence

from afm_rl.environments.interface import StepResult
from afm_rl.types import Message, Prompt


def short_words(prompt: str, response: str, data: object) -> float:
    """Share of characters that are letters or spaces, and less for a long text."""
    letters = sum(character.isalpha() or character == " " for character in response)
    return letters / max(1, len(response)) - 0.01 * len(response)


def broken(prompt: str, response: str, data: object) -> float:
    """A mistake of the user's."""
    raise KeyError("no such column")


def sometimes(prompt: str, response: str, data: object) -> float:
    """Fails for about half of all texts."""
    if len(response) % 2:
        raise KeyError("no such column")
    return short_words(prompt, response, data)


class Talkative:
    """An environment that has an answer to every turn."""

    def reset(self, prompt: Prompt, seed: int) -> Sequence[Message]:
        """The prompt as it is."""
        del seed
        return prompt.messages

    def step(self, action: str) -> StepResult:
        """Paid by the length of what was said."""
        return StepResult("and then?", reward=len(action) / 100)
