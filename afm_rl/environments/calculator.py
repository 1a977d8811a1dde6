"""A calculator over several turns: the policy writes a call, reads the result, and answers when it knows.

    What is 37*12+58?  ->  <call>37*12</call>  ->  <result>444</result>  ->  <call>444+58</call>  ->  ...  ->  answer 502

A turn with a call is paid nothing and answered; a turn without one is the answer, paid 1 where the prompt's checks hold.
A malformed call is answered `<result>error: ...</result>`, so that the policy can do better in its next turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from afm_rl.data.checks import passes
from afm_rl.environments.expressions import ExpressionError, evaluate, show
from afm_rl.environments.interface import StepResult
from afm_rl.types import Message, Prompt

_CALL = re.compile(r"<call>(.*?)</call>", re.DOTALL)


class Calculator:
    """One episode. `call_cost` is taken off for every call; `max_calls` calls are answered, later ones end the episode."""

    def __init__(self, *, max_calls: int = 8, call_cost: float = 0.0) -> None:
        self._max_calls, self._call_cost = max_calls, call_cost
        self._prompt: Prompt | None = None
        self._calls = 0

    def reset(self, prompt: Prompt, seed: int) -> Sequence[Message]:
        del seed  # nothing here is random
        self._prompt, self._calls = prompt, 0
        return prompt.messages

    def step(self, action: str) -> StepResult:
        if self._prompt is None:
            raise RuntimeError("reset the environment before its first step")
        call = _CALL.search(action)
        if call is None:
            return StepResult(reward=float(passes(self._prompt, action)), done=True, info={"calls": self._calls})
        self._calls += 1
        if self._calls > self._max_calls:
            return StepResult(reward=-self._call_cost, done=True, info={"calls": self._calls})
        return StepResult(f"<result>{_result(call[1])}</result>", reward=-self._call_cost)


def _result(expression: str) -> str:
    try:
        return show(evaluate(expression))
    except ExpressionError as error:
        return f"error: {error}"
