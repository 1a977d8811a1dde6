"""What an engine refuses at once: requests that could never run. A refusal names the request, the numbers and a remedy."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from afm_rl.generation.sampling_rows import MAX_STOP_IDS, check_options
from afm_rl.types import GenerationRequest


@dataclass(frozen=True)
class Limits:
    """What fits an engine: token ids below `vocab_size`, `max_context` positions, `pages` of `page_bytes` each."""

    vocab_size: int
    max_context: int
    max_positions: int
    pages: int
    page_size: int
    page_bytes: int


def check_request(
    request: GenerationRequest, limits: Limits, *, stop_ids: Collection[int], adapters: Collection[str], has_text: bool
) -> None:
    """Raises ValueError for a request that can never run. `has_text`: whether tokens can be turned into text here."""
    try:
        _check_numbers(request)
        _check_size(request, limits)
        if request.adapter and request.adapter not in adapters:
            raise ValueError(f"unknown adapter {request.adapter!r}; held: {', '.join(adapters) or 'none'}")
        if request.options.stop and not has_text:
            raise ValueError("stop strings need a tokenizer, which this engine was not given; use stop_ids")
        if len(stop_ids) > MAX_STOP_IDS:
            raise ValueError(f"{len(stop_ids)} tokens end a response; at most {MAX_STOP_IDS} may")
        check_options(request.options, vocab_size=limits.vocab_size, temperature=request.temperature)
    except ValueError as error:
        raise ValueError(f"request {request.id!r}: {error}") from error


def page_need(prompt: int, max_tokens: int, page_size: int) -> int:
    """Pages that one response needs to run to its end alone, the prompt's own copy of a page that is not full included."""
    written = prompt + max(max_tokens, 1) - 1
    return -(-written // page_size) + (1 if (prompt - 1) % page_size else 0)


def _check_numbers(request: GenerationRequest) -> None:
    if len(request.prompt_T) == 0:
        raise ValueError("empty prompt")
    least = 1 if request.options.prompt_logprobs is None else 0
    if request.num_responses < 1 or request.max_tokens < least or not 0 <= request.temperature < float("inf"):
        raise ValueError(
            "num_responses and max_tokens must be at least 1 and temperature not negative, got "
            f"{request.num_responses}, {request.max_tokens}, {request.temperature}"
        )


def _check_size(request: GenerationRequest, limits: Limits) -> None:
    tokens, length = np.asarray(request.prompt_T), len(request.prompt_T)
    if tokens.min() < 0 or tokens.max() >= limits.vocab_size:
        raise ValueError(f"the prompt has token ids outside 0..{limits.vocab_size - 1}")
    asked = f"prompt of {length} tokens + {request.max_tokens} new ones"
    if length + request.max_tokens > limits.max_context:
        remedy = "" if limits.max_context == limits.max_positions else f"; max_context may go up to {limits.max_positions}"
        raise ValueError(f"{asked} exceeds the {limits.max_context} positions of a context{remedy}")
    needed = page_need(length, request.max_tokens, limits.page_size)
    if needed > limits.pages:
        mib = needed * limits.page_bytes / 2**20
        raise ValueError(
            f"{asked} need {needed} pages ({mib:.1f} MiB) of the key-value cache, which has {limits.pages}; "
            "raise kv_cache or shorten the request"
        )
