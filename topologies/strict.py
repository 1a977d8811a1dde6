"""The base of every topology option: strict types, no unknown keys, and errors that name the nearest valid key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

#: Constrained numbers, so that the fields of the schema read as one line each.
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    """A frozen mapping of options; `1` is a number and `yes` is text, nothing is converted in silence."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    #: Fields that the reader fills in, which a message must not offer to the user.
    internal: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    raise problem(f"unknown key '{key}'{nearest(key, cls.keys())}", at=(key,))
        return data

    @classmethod
    def keys(cls) -> list[str]:
        """The keys a user may write."""
        return [name for name in cls.model_fields if name not in cls.internal]


def problem(message: str, *, at: tuple[str | int, ...] = ()) -> PydanticCustomError:
    """An error for a validator to raise; `at` is where below the validated value the mistake stands."""
    return PydanticCustomError("topology", "{message}", {"message": message, "at": list(at)})


def one_of(kind: str, valid: Sequence[str]) -> AfterValidator:
    """A validator of text: one of `valid`, else an error that names the nearest one."""

    def check(value: str) -> str:
        if value not in valid:
            raise problem(f"unknown {kind} '{value}'{nearest(value, valid)}")
        return value

    return AfterValidator(check)


def nearest(name: object, valid: Iterable[str]) -> str:
    """'; did you mean X?' where one is close, else '; valid: ...'."""
    valid = list(valid)
    close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else f"; valid: {', '.join(valid) or 'none'}"
