"""The tokens that stand between two turns of a policy: the end of its turn, what the environment said, its next turn's opening.

What was generated is never tokenised again: the next turn's prompt is the last one's, the policy's tokens as it chose them,
and these. They are read off the tokenizer's own chat format, as what it puts after the first turn of a stand-in conversation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from afm_rl.tokenizer import Tokenizer
from afm_rl.types import Message

#: A conversation that any chat format allows.
_STAND_IN = (Message("user", "a"), Message("assistant", "b"))


class TurnTokens:
    """Of one tokenizer. `observation` comes as a user's turn: the formats have no other that all of them know."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError for a chat format without an end of turn, or whose beginning changes with later turns."""
        self._tokenizer = tokenizer
        closed = tokenizer.encode_chat(_STAND_IN, add_generation_prompt=False)
        if tokenizer.end_of_turn_id not in closed:
            raise ValueError("the tokenizer's chat format puts no end of turn after an assistant: no turn can follow one")
        self._before = closed[: len(closed) - closed[::-1].index(tokenizer.end_of_turn_id)]
        if tokenizer.encode_chat([*_STAND_IN, Message("user", "c")])[: len(self._before)] != self._before:
            raise ValueError(
                "the tokenizer's chat format renders earlier turns anew: turns cannot be appended to each other"
            )

    def after(self, response_T: np.ndarray, observation: str) -> np.ndarray:
        """The environment's tokens after a policy's turn [T] int32; an end of turn first where another token ended that."""
        conversation = [*_STAND_IN, Message("user", observation)]
        rest = self._tokenizer.encode_chat(conversation, add_generation_prompt=True)[len(self._before) :]
        ended = len(response_T) > 0 and int(response_T[-1]) == self._tokenizer.end_of_turn_id
        return np.asarray(rest if ended else [self._tokenizer.end_of_turn_id, *rest], np.int32)

    def action(self, response_T: Sequence[int] | np.ndarray) -> str:
        """The text of a policy's turn."""
        return self._tokenizer.decode([int(token) for token in response_T])
