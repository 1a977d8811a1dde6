"""The engine that a sampler generates with, as the YAML writes it: its cache, its chunks, new weights, speculation."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from afm_rl.generation.options import EngineOptions, OnUpdate, Speculation
from topologies.strict import Count, Strict, problem

_UNITS = {
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*")


def _bytes(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    found = _AMOUNT.fullmatch(value)
    if found is None or found[2] not in _UNITS:
        raise problem(f"'{value}' is no amount of memory; write bytes, or a number with one of {', '.join(_UNITS)}")
    return round(float(found[1]) * _UNITS[found[2]])


#: Bytes, or text like "1.5GiB".
Bytes = Annotated[int, Field(ge=1), BeforeValidator(_bytes)]


class Speculative(Strict):
    """Tokens guessed ahead and checked in one step; what is sampled keeps its distribution."""

    kind: Literal["off", "ngram", "draft"] = "off"
    tokens: Count = 4
    max_ngram: Count = 3
    draft: Annotated[str, AfterValidator(os.path.abspath)] | None = None  # a policy folder with the same tokenizer

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Speculative:
        if (self.kind == "draft") != (self.draft is not None):
            raise problem("the folder of a small policy goes with kind: draft, and kind: draft with a folder", at=("draft",))
        if (
            self.draft is not None
            and (info.context or {}).get("check_files")
            and not Path(self.draft, "config.json").exists()
        ):
            raise problem(f"{self.draft} is no policy folder: it has no config.json", at=("draft",))
        return self

    def options(self) -> Speculation | None:
        """As the engine takes it."""
        return (
            None
            if self.kind == "off"
            else Speculation(kind=self.kind, tokens=self.tokens, max_ngram=self.max_ngram, draft=self.draft)
        )


def _kind_alone(value: Any) -> Any:
    """`speculative: ngram` for `speculative: {kind: ngram}`."""
    return {"kind": value} if isinstance(value, str) else value


class Engine(Strict):
    """One engine. What does not fit its cache waits, or is computed again: see `preemptions` among the metrics."""

    kv_cache: Bytes = 256 * 2**20  # keys and values of everything that is generating, and prefixes to use again
    page_size: Annotated[int, Field(ge=8, multiple_of=8)] = 16  # positions of a page
    prefill_chunk: Count = 512  # prompt tokens in one step
    max_context: Count | None = None  # prompt and response together; None: the model's positions
    on_update: OnUpdate = "finish"  # requests running when weights arrive: finish | restart | continue
    speculative: Annotated[Speculative, BeforeValidator(_kind_alone)] = Speculative()

    def options(self, *, max_batch: int, compute_dtype: str, deterministic: bool) -> EngineOptions:
        """As the engine takes it."""
        return EngineOptions(
            max_batch=max_batch,
            kv_cache_bytes=self.kv_cache,
            page_size=self.page_size,
            prefill_chunk=self.prefill_chunk,
            max_context=self.max_context,
            compute_dtype=compute_dtype,
            deterministic=deterministic,
            on_update=self.on_update,
            speculative=self.speculative.options(),
        )
