"""A reward component that worker processes compute: the user's own function, `math`, `format`.

    def reward(prompt: str, response: str, data: Mapping) -> float

`prompt` is the text of the last message, `data` has id, kind, messages and checks of the prompt, and transcript, finished
and tokens of the response. With the attribute `reward.batch = True` the function takes all responses to one prompt at a time,
(prompt, [response, ...], [data, ...]), and returns a number for each. Whatever fails costs the responses of that call alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from afm_rl.rewards.problems import problem
from afm_rl.rewards.spec import FunctionSpec
from afm_rl.types import Prompt
from afm_rl.workers.pool import Outcome, WorkerPool

#: What a reward may be: rewards are float32.
LARGEST = float(np.finfo(np.float32).max)
#: Per response its own text and what else is told of it.
Responses = Sequence[tuple[str, Mapping[str, Any]]]


class FunctionReward:
    """A function in its worker processes, which the first construction waits for."""

    def __init__(self, spec: FunctionSpec) -> None:
        """Raises WorkerStartError when the function cannot be loaded."""
        self._spec = spec
        self._pool = WorkerPool(spec.task, workers=spec.workers)
        self._pool.start()

    def __call__(self, asked: Sequence[tuple[Prompt, Responses]], *, budget_s: float) -> list[tuple[np.ndarray, list[str]]]:
        """Per prompt the values [G] float32 of its responses, NaN where there is none, and why ("" where there is one)."""
        calls = [(i, _arguments(prompt, one)) for i, (prompt, responses) in enumerate(asked) for one in self._cut(responses)]
        limits_s = [self._spec.limit_s * (len(call[1]) if self._pool.batch else 1) for _, call in calls]
        outcomes = self._pool.run([call for _, call in calls], limits_s=limits_s, budget_s=budget_s)
        found: list[list[tuple[float, str]]] = [[] for _ in asked]
        for (i, call), outcome in zip(calls, outcomes, strict=True):
            found[i] += self._read(outcome, count=len(call[1]) if self._pool.batch else 1)
        return [(np.array([value for value, _ in of], np.float32), [text for _, text in of]) for of in found]

    def close(self) -> None:
        """End the processes."""
        self._pool.close()

    def _cut(self, responses: Responses) -> Sequence[Any]:
        return [responses] if self._pool.batch else responses

    def _read(self, outcome: Outcome, *, count: int) -> list[tuple[float, str]]:
        """(value, problem) of each response of a call."""
        name = self._spec.name
        if outcome.cause is not None:
            return [(np.nan, problem(name, outcome.cause, outcome.problem))] * count
        values = outcome.value if self._pool.batch else [outcome.value]
        if not isinstance(values, list) or len(values) != count:
            wrong = f"returned {_short(outcome.value)} for {count} responses, not as many numbers"
            return [(np.nan, problem(name, "not_a_number", wrong))] * count
        return [self._number(value) for value in values]

    def _number(self, value: Any) -> tuple[float, str]:
        if not isinstance(value, int | float):
            return np.nan, problem(self._spec.name, "not_a_number", f"returned {_short(value)}")
        if not abs(value) <= LARGEST:  # true of NaN too
            return np.nan, problem(self._spec.name, "not_finite", f"returned {_short(value)}")
        return float(value), ""


def _arguments(prompt: Prompt, responses: Any) -> tuple[str, Any, Any]:
    """What the function is called with, for one response or for all of a prompt."""
    told = {
        "id": prompt.id,
        "kind": prompt.kind,
        "messages": [{"role": message.role, "content": message.content} for message in prompt.messages],
        "checks": [dict(check) for check in prompt.checks],
    }
    text = prompt.messages[-1].content if prompt.messages else ""
    if isinstance(responses, tuple):
        response, of_response = responses
        return text, response, {**told, **of_response}
    return text, [response for response, _ in responses], [{**told, **of_response} for _, of_response in responses]


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
