"""OpenAI's response objects as plain dicts: headers, choices, usage, and the two shapes of log-probabilities.

Reference: the response types of the `openai` Python client, which the tests parse every answer with.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.server_text import ResponseText
from afm_rl.tokenizer import Tokenizer

#: What OpenAI reports for a token too unlikely to say; JSON has no infinity.
LOWEST_LOGP = -9999.0


@dataclass(frozen=True)
class TokenScores:
    """Row t is about token t of a sequence given the tokens before it; row 0 means nothing."""

    logp_T: np.ndarray  # [T] float32
    top_ids_TK: np.ndarray  # [T, K] int32, most likely first
    top_logp_TK: np.ndarray  # [T, K] float32, from the same softmax as logp_T


def header(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """What every response object begins with; `kind` is OpenAI's object name."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def choice(index: int, finish_reason: str | None, **content: Any) -> dict[str, Any]:
    """One choice; `content` is text, message or delta, and logprobs."""
    return {"index": index, "finish_reason": finish_reason, **content}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Tokens read and written; the end token counts as written."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def completion_logprobs(
    tokens: Sequence[int], scores: TokenScores, tokenizer: Tokenizer, *, start: int, top: int
) -> dict[str, Any]:
    """The logprobs of a text completion for tokens[start:]; the sequence's very first token has none (null).

    `top_logprobs` holds the `top` best alternatives and the token itself; `text_offset` counts characters of the text
    that begins with tokens[start].
    """
    positions = range(start, len(tokens))
    texts = [token_text(tokens[t], tokenizer) for t in positions]
    own = [_logp(scores.logp_T[t]) if t else None for t in positions]
    best = []
    for t, text, logp in zip(positions, texts, own, strict=True):
        # Two ids can read the same (a letter and its byte): the more likely one keeps the name.
        entries: dict[str, float] = {}
        for other, other_logp in zip(scores.top_ids_TK[t, :top], scores.top_logp_TK[t, :top], strict=True):
            entries.setdefault(token_text(int(other), tokenizer), _logp(other_logp))
        if logp is not None:
            entries.setdefault(text, logp)
        best.append(entries if t else None)
    offsets = _offsets(tokens[start:], tokenizer)
    return {"tokens": texts, "token_logprobs": own, "top_logprobs": best, "text_offset": offsets}


def chat_logprobs(
    tokens: Sequence[int], scores: TokenScores, tokenizer: Tokenizer, *, start: int, top: int
) -> dict[str, Any]:
    """The logprobs of a chat message made of tokens[start:], the end token included."""
    content = []
    for t in range(start, len(tokens)):
        others = zip(scores.top_ids_TK[t, :top], scores.top_logp_TK[t, :top], strict=True)
        content.append(
            {
                **_token(tokens[t], scores.logp_T[t], tokenizer),
                "top_logprobs": [_token(int(other), logp, tokenizer) for other, logp in others],
            }
        )
    return {"content": content, "refusal": None}


def token_text(token: int, tokenizer: Tokenizer) -> str:
    """How one token is written: its text, `bytes:\\xNN..` where it is part of a character, a marker's own name."""
    raw = tokenizer.token_bytes(token)
    if not raw:
        return tokenizer.piece(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _token(token: int, logp: float, tokenizer: Tokenizer) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token)
    return {"token": token_text(token, tokenizer), "logprob": _logp(logp), "bytes": list(raw) if raw else None}


def _logp(value: float) -> float:
    return max(float(value), LOWEST_LOGP)


def _offsets(tokens: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Characters that are certain before each token."""
    text, offsets, length = ResponseText(tokenizer.byte_stream()), [], 0
    for token in tokens:
        offsets.append(length)
        length += len(text.push(token))
    return offsets
