"""What every part of the world is made of: a prompt, its right response, and how the weak teacher gets it wrong.

The teacher's mistake is systematic (the same rule wherever it applies, in a share of the cases): that is what SFT
then imitates and what the preference and reward stages have to take out again.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from afm_rl.data.records import default_id
from afm_rl.data.split import is_held_out
from afm_rl.types import Demonstration, Message, Prompt

#: The share of prompts that is held out for evaluation: of operand pairs for arithmetic, of texts elsewhere.
HELD_OUT_FRACTION = 0.12


@dataclass(frozen=True)
class Task:
    """One prompt of the world. `biased` is the weak teacher's mistake here, None where its rule gives the right thing.

    `split_key` decides the side of the split: tasks that share it (37+25 and 25+37) are on the same one.
    """

    prompt: Prompt
    right: str
    biased: str | None
    split_key: str

    @property
    def held_out(self) -> bool:
        """Whether the task is for evaluation only; the same for every seed, so that runs compare."""
        return is_held_out(self.split_key, fraction=HELD_OUT_FRACTION, salt="python_world")


def make_task(
    kind: str,
    text: str,
    *,
    right: str,
    checks: tuple[Mapping[str, Any], ...],
    biased: str | None = None,
    split_key: str | None = None,
) -> Task:
    """A task of one user turn. `split_key` is the text itself unless given."""
    prompt = Prompt("", (Message("user", text),), kind=kind, checks=checks)
    prompt = Prompt(default_id(prompt), prompt.messages, kind=kind, checks=checks)
    return Task(prompt, right=right, biased=biased, split_key=f"{kind}:{split_key or text}")


def weak_teacher(task: Task, *, bias_rate: float, rng: random.Random) -> Demonstration:
    """The teacher's response: its systematic mistake in `bias_rate` of the tasks where it makes one."""
    wrong = task.biased is not None and rng.random() < bias_rate
    return Demonstration(task.prompt, response=task.biased if wrong and task.biased is not None else task.right)
