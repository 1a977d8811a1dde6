"""The `reward` of a stage: which components count how much, and what length and truncation do to their sum.

    reward: {model: 0.3, verifier: 1.0}
    reward:
      math: 1.0
      format: {tags: [think, answer], weight: 0.2}
      function: my_package.my_module:reward
      length: {buffer_tokens: 16, weight: 0.5}
      truncated: invalid

The learned reward model counts 1 where no component is named (4.3.1), and not at all where others are and it is not.
"""

# ruff: noqa: RUF012 (pydantic copies a mutable default for every instance)

from __future__ import annotations

import os
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from afm_rl.errors import UserError
from afm_rl.rewards import format_rules
from afm_rl.rewards.limits import PerToken, SoftOverlong, Truncation
from afm_rl.rewards.spec import BUILT_IN, FunctionSpec, RewardSpec
from afm_rl.workers.pool import Task, WorkerPool, WorkerStartError
from topologies.strict import Count, CountOrZero, Positive, PositiveOrZero, Strict, problem

_MIB = 2**20


class Worked(Strict):
    """A component that worker processes compute: what one response may take, and how many work side by side."""

    weight: PositiveOrZero = 1.0
    timeout_s: Positive = 5.0
    memory_mib: Count = 1024
    workers: Count = 1

    def function(self, name: str, path: str, options: dict[str, Any], *, search_path: tuple[str, ...] = ()) -> FunctionSpec:
        """As the reward actor takes it."""
        task = Task(path, options, memory_bytes=self.memory_mib * _MIB, search_path=search_path)
        return FunctionSpec(name, task, limit_s=self.timeout_s, workers=self.workers)


class MathReward(Worked):
    """1 where the response's answer equals the prompt's `answer` check as mathematics (`math-verify`), else 0."""


class FormatReward(Worked):
    """The share of these rules that the response keeps (`afm_rl/rewards/format_rules.py`)."""

    regex: str | None = None
    contains: list[str] = []
    excludes: list[str] = []
    tags: list[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]] = []
    parses_json: bool = False
    min_words: CountOrZero | None = None
    max_words: CountOrZero | None = None
    min_chars: CountOrZero | None = None
    max_chars: CountOrZero | None = None

    def rules(self) -> dict[str, Any]:
        """The arguments of `format_rules.make_reward`."""
        return self.model_dump(exclude=set(Worked.model_fields), exclude_none=True)

    @model_validator(mode="after")
    def _check(self) -> FormatReward:
        try:
            format_rules.make_reward(**self.rules())
        except ValueError as error:
            raise problem(f"{error}; the rules are {', '.join(self.rule_names())}") from error
        except re.error as error:
            raise problem(f"not a regular expression: {error}", at=("regex",)) from error
        return self

    @classmethod
    def rule_names(cls) -> list[str]:
        """The keys that are rules."""
        return [name for name in cls.model_fields if name not in Worked.model_fields]


class UserReward(Worked):
    """A function of the user's by import path (`afm_rl/rewards/functions.py` says how it is called).

    With `options` the path names a factory that takes them and returns the function. `name` is the component's, in metrics.
    """

    path: str
    options: dict[str, Any] = {}
    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None

    @property
    def component(self) -> str:
        """The component's name: the function's own unless given."""
        return self.name or self.path.rpartition(":")[2].rpartition(".")[2]

    @property
    def spec(self) -> FunctionSpec:
        """As the reward actor takes it; modules in the folder where the command was started are found."""
        return self.function(self.component, self.path, self.options, search_path=(os.getcwd(),))

    @model_validator(mode="after")
    def _can_be_loaded(self, info: ValidationInfo) -> UserReward:
        if (info.context or {}).get("check_files"):
            pool = WorkerPool(self.spec.task)
            try:
                pool.start()
            except WorkerStartError as error:
                raise problem(str(error), at=("path",)) from error
            finally:
                pool.close()
        return self


class LengthPenalty(Strict):
    """Long responses cost: `overlong` (DAPO: nothing, then linear, from `max_tokens` on -1) or `per_token` (-1 a token).

    `max_tokens` of the stage unless given; `buffer_tokens` are the ones over which it falls. Times `weight`.
    """

    kind: Literal["overlong", "per_token"] = "overlong"
    weight: Positive = 1.0
    max_tokens: Count | None = None
    buffer_tokens: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> LengthPenalty:
        if self.kind == "overlong" and self.buffer_tokens is None:
            raise problem("missing; over how many tokens before max_tokens the penalty grows", at=("buffer_tokens",))
        for name in ("max_tokens", "buffer_tokens"):
            if self.kind == "per_token" and getattr(self, name) is not None:
                raise problem("belongs to kind overlong; a price per token knows no limit", at=(name,))
        if self.max_tokens is not None and self.buffer_tokens is not None and self.buffer_tokens > self.max_tokens:
            raise problem(f"more than max_tokens, {self.max_tokens}", at=("buffer_tokens",))
        return self

    def penalty(self, *, max_tokens: int | None) -> SoftOverlong | PerToken:
        """As the reward actor takes it; `max_tokens` is the stage's. Raises UserError without any."""
        if self.kind == "per_token":
            return PerToken()
        limit = self.max_tokens or max_tokens
        if limit is None or self.buffer_tokens is None:
            raise UserError(
                "reward.length: there is no max_tokens here to count from; give it: length: {max_tokens: 64, ...}"
            )
        return SoftOverlong(limit, min(self.buffer_tokens, limit))


class Penalty(Strict):
    """Taken off the reward of a cut response."""

    penalty: Positive


def _weighted(value: Any) -> Any:
    """`math: 1.0` -> `math: {weight: 1.0}`."""
    return {"weight": float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else value


def _functions(value: Any) -> Any:
    """A path, a mapping or a list of either -> a list of mappings."""
    items = value if isinstance(value, list) else [] if value is None else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


class RewardWeights(Strict):
    """R = the weighted sum of the named components, then `length` and `truncated`.

    `model`: the learned reward model; `verifier`: 1 where the prompt's checks hold, 0 where not or without checks;
    `environment`: what the stage's environment paid. A response whose reward cannot be computed is left out of its group.
    `truncated`: what a response becomes that nothing ended; `end`: whether any stop token is an end, or the turn's alone.
    `budget_s`: what all components may take together for the responses of a call.
    """

    model: PositiveOrZero = 1.0
    verifier: PositiveOrZero = 0.0
    environment: PositiveOrZero = 0.0
    math: Annotated[MathReward | None, BeforeValidator(_weighted)] = None
    format: FormatReward | None = None
    function: Annotated[list[UserReward], BeforeValidator(_functions)] = []
    length: LengthPenalty | None = None
    truncated: Literal["keep", "zero", "invalid"] | Penalty = "keep"
    end: Literal["any", "turn"] = "any"
    budget_s: Positive = 240.0
    #: What makes a reward; the rest only changes it.
    components: ClassVar[tuple[str, ...]] = ("model", "verifier", "environment", "math", "format", "function")

    @model_validator(mode="before")
    @classmethod
    def _model_unless_others(cls, data: Any) -> Any:
        if isinstance(data, dict) and "model" not in data:
            return {"model": 0.0 if any(data.get(name) is not None for name in cls.components) else 1.0, **data}
        return data

    @model_validator(mode="after")
    def _check(self) -> RewardWeights:
        names = [*BUILT_IN, "math", "format"]
        for i, function in enumerate(self.function):
            if function.component in names:
                message = f"there is a component '{function.component}' already; give this one another name"
                raise problem(message, at=("function", i, "name"))
            names.append(function.component)
        if not any(self.weights().values()):
            raise problem("every weight is 0, so that every response is worth the same")
        return self

    def weights(self) -> dict[str, float]:
        """How much each component counts, by name."""
        worked = {"math": self.math, "format": self.format, **{of.component: of for of in self.function}}
        return {
            "model": self.model,
            "verifier": self.verifier,
            "environment": self.environment,
            **{name: of.weight for name, of in worked.items() if of is not None},
            **({"length": self.length.weight} if self.length is not None else {}),
        }

    def spec(self, *, tokenizer_folder: str, model_folder: str | None, max_tokens: int | None = None) -> RewardSpec:
        """What a reward actor loads; `max_tokens` is the stage's limit. Raises UserError, or ValueError as RewardSpec."""
        functions = [of.spec for of in self.function]
        if self.math is not None:
            functions.append(self.math.function("math", "afm_rl.rewards.math_answers:reward", {}))
        if self.format is not None:
            functions.append(self.format.function("format", "afm_rl.rewards.format_rules:make_reward", self.format.rules()))
        cut = self.truncated
        return RewardSpec(
            tokenizer_folder,
            model_folder,
            self.weights(),
            functions=tuple(functions),
            length=self.length.penalty(max_tokens=max_tokens) if self.length is not None else None,
            truncation=Truncation("penalty", cut.penalty, self.end)
            if isinstance(cut, Penalty)
            else Truncation(cut, 0.0, self.end),
            budget_s=self.budget_s,
        )
