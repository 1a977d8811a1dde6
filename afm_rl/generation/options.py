"""How an engine is built, as plain data: batch, memory, chunking, determinism, weight updates, adapters, speculation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: What weights that arrive while requests run do: wait for them, start them over, or change them in flight.
OnUpdate = Literal["finish", "restart", "continue"]


@dataclass(frozen=True)
class Speculation:
    """Guess `tokens` tokens ahead, from earlier occurrences of the last n-gram or by a draft model; verify them at once."""

    kind: Literal["ngram", "draft"]
    tokens: int = 4
    max_ngram: int = 3


@dataclass(frozen=True)
class EngineOptions:
    """Options of one engine.

    At most `max_batch` responses decode at once, over a key-value cache of `kv_cache_bytes` in pages of `page_size`
    positions; prompts are filled in `prefill_chunk` tokens at a time, and up to `decode_steps` decoding steps run without a
    look at the queue unless a response ends. A prompt and its response together have at most `max_context` positions (the
    model's own limit if None). `deterministic` fixes every shape: a request's tokens then depend on its seed alone.
    `max_adapters` LoRA adapters of rank up to `max_adapter_rank` can be held beside the policy.
    """

    max_batch: int = 256
    kv_cache_bytes: int = 2**28
    page_size: int = 16
    prefill_chunk: int = 512
    decode_steps: int = 16
    max_context: int | None = None
    deterministic: bool = False
    compute_dtype: str = "float32"
    on_update: OnUpdate = "finish"
    max_adapters: int = 0
    max_adapter_rank: int = 16
    prefix_cache: bool = True
    speculation: Speculation | None = None
