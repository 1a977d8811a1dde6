"""A world of questions that need a tool: products and sums over several digits, answered through a calculator's calls.

    user: What is 37*12?             assistant: <call>37*12</call>    user: <result>444</result>    assistant: answer 444
    user: Take 37*12, then add 58.   two calls, the second over the first one's result

The policy has to copy, not to calculate. The weak teacher answers `bias_rate` of the questions off the top of its head, and
wrongly: what SFT then imitates and RL has to take out. Every turn of a conversation is a demonstration of its own.
Held-out operands are in no demonstration and no document. Ours: the paper's tools (4.1) are not public.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from afm_rl.data.dataset import Dataset
from afm_rl.types import Demonstration, Message, Prompt
from afm_rl.worlds.task import Task, make_task

OPERANDS = range(11, 100)
#: Conversations in one document.
CONVERSATIONS_PER_DOCUMENT = 4
#: Share of the questions that take two calls.
TWO_CALLS = 0.3


@dataclass(frozen=True)
class Question:
    """a*b, and then + c where there is a c."""

    a: int
    b: int
    c: int | None = None

    @property
    def text(self) -> str:
        """The user's turn."""
        return f"What is {self.a}*{self.b}?" if self.c is None else f"Take {self.a}*{self.b}, then add {self.c}."

    @property
    def answer(self) -> int:
        return self.a * self.b + (self.c or 0)

    @property
    def turns(self) -> list[tuple[str, str]]:
        """What the policy should say, turn by turn, each with what the calculator then answers ("" after the last)."""
        product = self.a * self.b
        calls = [(f"{self.a}*{self.b}", product)]
        if self.c is not None:
            calls.append((f"{product}+{self.c}", self.answer))
        said = [(f"<call>{text}</call>", f"<result>{value}</result>") for text, value in calls]
        return [*said, (f"answer {self.answer}", "")]

    @property
    def guess(self) -> str:
        """The weak teacher's answer without a call: the product of the tens."""
        return f"answer {self.a // 10 * (self.b // 10) * 100 + (self.c or 0)}"

    @property
    def task(self) -> Task:
        """The prompt, with its answer as check; the sides of the split differ in the pair of factors."""
        kind = "one call" if self.c is None else "two calls"
        low, high = sorted((self.a, self.b))
        checks = ({"type": "answer", "value": str(self.answer)},)
        return make_task(kind, self.text, right=self.turns[-1][0], checks=checks, split_key=f"{low}*{high}")

    @property
    def held_out(self) -> bool:
        """By the factors, whatever is added."""
        return Question(min(self.a, self.b), max(self.a, self.b)).task.held_out


def build_calculator_world(
    *,
    seed: int = 0,
    demonstrations: int = 3000,
    prompts: int = 1000,
    eval_prompts: int = 200,
    math_documents: int = 3000,
    bias_rate: float = 0.5,
) -> Dataset:
    """Documents (domain math), `demonstrations` conversations as one record a turn, and prompts; a function of `seed`."""
    shown = [_draw(_rng(seed, "sft", i), held_out=False) for i in range(demonstrations)]
    written = _rng(seed, "documents")
    return Dataset(
        source=f"calculator_world (seed {seed})",
        documents={"math": [_document(written, held_out=False) for _ in range(math_documents)]},
        heldout_documents={"math": [_document(written, held_out=True) for _ in range(-(-math_documents // 20))]},
        demonstrations=[
            turn for i, q in enumerate(shown) for turn in _demonstrations(q, guesses=_rng(seed, i).random() < bias_rate)
        ],
        prompts=_prompts(prompts, _rng(seed, "prompts"), held_out=False),
        eval_prompts=_prompts(eval_prompts, _rng(seed, "eval"), held_out=True),
    )


def _rng(seed: int, *purpose: object) -> random.Random:
    return random.Random(f"calculator_world-{seed}-{purpose}")


def _draw(rng: random.Random, *, held_out: bool) -> Question:
    while True:
        c = rng.choice(OPERANDS) if rng.random() < TWO_CALLS else None
        question = Question(rng.choice(OPERANDS), rng.choice(OPERANDS), c)
        if question.held_out == held_out:
            return question


def _prompts(count: int, rng: random.Random, *, held_out: bool) -> list[Prompt]:
    """`count` different ones."""
    found: dict[str, Prompt] = {}
    while len(found) < count:
        prompt = _draw(rng, held_out=held_out).task.prompt
        found[prompt.id] = prompt
    return list(found.values())


def _demonstrations(question: Question, *, guesses: bool) -> Sequence[Demonstration]:
    """Every turn of the right conversation with what came before it, or the one turn of a guess."""
    prompt = question.task.prompt
    if guesses:
        return [Demonstration(prompt, question.guess)]
    shown, messages = [], prompt.messages
    for said, answered in question.turns:
        shown.append(Demonstration(Prompt(prompt.id, messages, prompt.kind, prompt.checks), said))
        messages = (*messages, Message("assistant", said), Message("user", answered))
    return shown


def _document(rng: random.Random, *, held_out: bool) -> str:
    questions = [_draw(rng, held_out=held_out) for _ in range(CONVERSATIONS_PER_DOCUMENT)]
    return "\n".join(" ".join([q.text, *(part for turn in q.turns for part in turn if part)]) for q in questions)
