"""How an engine is built, as plain data: batch, memory, chunking, determinism, weight updates, adapters, speculation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: What becomes of running requests when weights arrive: they finish on the old ones (new requests wait for them), start
#: again on the new ones, or go on with the new ones from their next token.
OnUpdate = Literal["finish", "restart", "continue"]


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """Guess `tokens` tokens a step, from what the sequence repeats (ngram) or by a small model (draft), and verify them.

    An n-gram has `max_ngram` tokens at most. `draft` is the small model's folder, for whoever loads it.
    """

    kind: Literal["ngram", "draft"]
    tokens: int = 4
    max_ngram: int = 3
    draft: str | None = None


@dataclass(frozen=True, kw_only=True)
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
    speculative: Speculation | None = None

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("max_batch", "page_size", "prefill_chunk", "decode_steps")}
        if small := [f"{name} {count}" for name, count in counts.items() if count < 1]:
            raise ValueError(f"an engine needs at least 1 of each: {', '.join(small)}")
        if self.page_size % 8:
            raise ValueError(f"page_size must be a multiple of 8, got {self.page_size}")
        if self.deterministic and self.speculative is not None:
            raise ValueError("deterministic and speculative exclude each other: speculation verifies in shapes of its own")
