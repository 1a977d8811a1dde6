"""Tickets: the order in which an online job asks its prompts, as a pure function of the seed.

Ticket t is the t-th prompt of endless shuffled epochs, and iteration i trains on tickets [i n, (i + 1) n): who has finished
first decides nothing, no prompt is skipped or asked twice in an epoch, and "tickets below T" says what has been consumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from afm_rl.packing import epoch_rows
from afm_rl.types import Prompt


@dataclass(frozen=True)
class Ticket:
    """One prompt's turn."""

    number: int
    prompt: Prompt

    @property
    def id(self) -> str:
        """The id of its request and group: a prompt has another turn in every epoch."""
        return f"{self.prompt.id}@{self.number}"


def tickets_of(iteration: int, prompts: Sequence[Prompt], *, count: int, seed: int) -> list[Ticket]:
    """The `count` tickets of an iteration."""
    rows = epoch_rows(iteration, batch=count, rows=len(prompts), seed=seed)
    return [Ticket(iteration * count + i, prompts[row]) for i, row in enumerate(rows.tolist())]
