"""What rewards read of a group: the policy's own words, its own tokens, and what the environment said between them.

In a conversation of several turns a response holds both (`Group.actions` tells them apart). A response's own text is the
policy's turns, one below the other; its transcript has the environment's turns too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from afm_rl.tokenizer import Tokenizer
from afm_rl.types import Group


class ResponseTexts:
    """The texts of a group's G responses. Markers (the end of a turn) are no part of any text."""

    def __init__(self, tokenizer: Tokenizer, group: Group) -> None:
        self.group = group
        self._turns = [_turns(tokenizer, group, j) for j in range(len(group.responses))]
        self.own = ["\n".join(text for mine, text in turns if mine) for turns in self._turns]

    @property
    def last_turns(self) -> list[str]:
        """What the policy said last in each response, "" where nothing."""
        return [next((text for mine, text in reversed(turns) if mine), "") for turns in self._turns]

    @property
    def token_counts(self) -> np.ndarray:
        """How many tokens the policy chose in each response [G]."""
        group = self.group
        return np.array([actions.sum() for actions in group.actions] or [len(r) for r in group.responses], np.int64)

    def for_functions(self) -> list[tuple[str, dict[str, Any]]]:
        """Per response its own text, and what a function is told of it beside."""
        told = zip(self._turns, self.group.finished, self.token_counts.tolist(), strict=True)
        transcripts = [
            {"transcript": "\n".join(text for _, text in turns), "finished": bool(finished), "tokens": tokens}
            for turns, finished, tokens in told
        ]
        return list(zip(self.own, transcripts, strict=True))


def _turns(tokenizer: Tokenizer, group: Group, j: int) -> list[tuple[bool, str]]:
    """(whether the policy said it, the text) of every turn of response j."""
    response = group.responses[j]
    if not group.actions:
        return [(True, tokenizer.decode(response.tolist()))]
    action_T = np.asarray(group.actions[j], bool)
    cuts = np.flatnonzero(action_T[1:] != action_T[:-1]) + 1
    parts = zip(np.split(action_T, cuts), np.split(response, cuts), strict=True)
    return [(bool(mine[0]), tokenizer.decode(tokens.tolist())) for mine, tokens in parts if len(tokens)]
