"""What a client may ask of the server: OpenAI's request bodies, checked and turned into plain dataclasses.

A parameter we cannot honour is refused by name, never ignored: a client that sends `top_p: 0.5` and silently gets
something else would measure the wrong thing. A parameter at the value that changes nothing (`top_p: 1`) is accepted, as
is null.
Errors are `ApiError`s, whose body has OpenAI's error shape, so that its clients raise their usual exceptions.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from afm_rl.types import Message, Role

#: A prompt as text, or already tokenised.
PromptInput = str | tuple[int, ...]

MAX_STOP_STRINGS = 4  # OpenAI's limit
MAX_COMPLETION_LOGPROBS = 5  # OpenAI's limit
MAX_CHAT_LOGPROBS = 20  # OpenAI's limit

#: OpenAI calls a system message "developer" for its newer models.
_ROLES: Mapping[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

_COMMON = frozenset({"model", "max_tokens", "temperature", "n", "seed", "stop", "stream", "stream_options", "logprobs"})
_COMPLETION = _COMMON | {"prompt", "echo"}
_CHAT = _COMMON | {"messages", "max_completion_tokens", "top_logprobs"}

#: Parameters of OpenAI's that we do not honour, with the values at which they change nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "min_p": (0,),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_k": (0, -1),
    "top_p": (1,),
    "verbosity": (),
    "web_search_options": (),
}
#: Labels for the caller's own books: nothing about the answer depends on them.
_LABELS = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "user"})


class ApiError(Exception):
    """A request that cannot be answered: HTTP `status`, and `body()` in OpenAI's error shape."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = "invalid_value"
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Sampling:
    """How to answer. `max_tokens` None: the server's default; `seed` None: a fresh one; `logprobs` None: not wanted."""

    max_tokens: int | None
    temperature: float
    n: int
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    logprobs: int | None


@dataclass(frozen=True)
class CompletionCall:
    """One checked /v1/completions request; `echo` repeats the prompt before the completion."""

    model: str
    prompts: tuple[PromptInput, ...]
    echo: bool
    sampling: Sampling


@dataclass(frozen=True)
class ChatCall:
    """One checked /v1/chat/completions request."""

    model: str
    messages: tuple[Message, ...]
    sampling: Sampling


def parse_completion(body: object) -> CompletionCall:
    """Check a /v1/completions body. Raises ApiError 400 naming the parameter."""
    fields = _fields(body, _COMPLETION)
    echo = _flag(fields, "echo")
    logprobs = None
    if "logprobs" in fields:
        logprobs = _integer(fields, "logprobs", low=0, high=MAX_COMPLETION_LOGPROBS)
    max_tokens = _integer(fields, "max_tokens", low=0 if echo else 1) if "max_tokens" in fields else None
    sampling = _sampling(fields, max_tokens=max_tokens, logprobs=logprobs)
    prompts = _prompts(fields)
    if sampling.stream and len(prompts) > 1:
        raise ApiError("streaming takes one prompt at a time: send one, or stream=false", param="prompt")
    return CompletionCall(_model(fields), prompts, echo, sampling)


def parse_chat(body: object) -> ChatCall:
    """Check a /v1/chat/completions body. Raises ApiError 400 naming the parameter."""
    fields = _fields(body, _CHAT)
    wanted = _flag(fields, "logprobs")
    if "top_logprobs" in fields and not wanted:
        raise ApiError("top_logprobs needs logprobs=true", param="top_logprobs")
    logprobs = _integer(fields, "top_logprobs", low=0, high=MAX_CHAT_LOGPROBS, default=0) if wanted else None
    limits = {name: _integer(fields, name, low=1) for name in ("max_tokens", "max_completion_tokens") if name in fields}
    if len(set(limits.values())) > 1:
        raise ApiError("max_tokens and max_completion_tokens differ: send one of them", param="max_completion_tokens")
    max_tokens = next(iter(limits.values()), None)
    return ChatCall(_model(fields), _messages(fields), _sampling(fields, max_tokens=max_tokens, logprobs=logprobs))


def _fields(body: object, supported: frozenset[str]) -> dict[str, Any]:
    """The parameters that are set and that we honour; nulls, labels and neutral values are dropped."""
    if not isinstance(body, dict):
        raise ApiError("the request body must be a JSON object", code="invalid_body")
    fields = {}
    for name, value in body.items():
        if value is None or name in _LABELS or (name not in supported and _is_neutral(name, value)):
            continue
        if name not in supported:
            raise _refusal(name, supported)
        if name == "logprobs" and value is False:  # chat's way of saying null, which some clients send to both
            continue
        fields[name] = value
    return fields


def _is_neutral(name: str, value: Any) -> bool:
    return any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in _NEUTRAL.get(name, ())
    )


def _refusal(name: str, supported: frozenset[str]) -> ApiError:
    if name in _NEUTRAL or name in _COMPLETION | _CHAT:
        neutral = _NEUTRAL.get(name, ())
        instead = f", or send {neutral[0]!r}" if neutral else ""
        return ApiError(f"{name} is not supported here; leave it out{instead}", param=name, code="unsupported_parameter")
    near = difflib.get_close_matches(name, supported, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ApiError(f"unknown parameter {name!r}{hint}", param=name, code="unknown_parameter")


def _sampling(fields: Mapping[str, Any], *, max_tokens: int | None, logprobs: int | None) -> Sampling:
    stream = _flag(fields, "stream")
    options = fields.get("stream_options", {})
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise ApiError("stream_options takes {'include_usage': bool} only", param="stream_options")
    if options and not stream:
        raise ApiError("stream_options needs stream=true", param="stream_options")
    n = _integer(fields, "n", low=1, default=1)
    if stream and n > 1:
        raise ApiError("streaming gives one choice: send n=1, or stream=false", param="n")
    if stream and logprobs is not None:
        raise ApiError("log-probabilities are not streamed: leave logprobs out, or send stream=false", param="logprobs")
    return Sampling(
        max_tokens=max_tokens,
        temperature=_number(fields, "temperature", low=0.0, high=2.0, default=1.0),
        n=n,
        seed=_integer(fields, "seed") if "seed" in fields else None,
        stop=_stop(fields),
        stream=stream,
        include_usage=_flag(options, "include_usage"),
        logprobs=logprobs,
    )


def _model(fields: Mapping[str, Any]) -> str:
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise ApiError("model is required: the name of a model of /v1/models", param="model", code="missing_parameter")
    return model


def _prompts(fields: Mapping[str, Any]) -> tuple[PromptInput, ...]:
    """Text, a list of token ids, or a list of either."""
    prompt = fields.get("prompt")
    if prompt is None:
        raise ApiError("prompt is required", param="prompt", code="missing_parameter")
    many = isinstance(prompt, list) and bool(prompt) and all(isinstance(item, str | list) for item in prompt)
    prompts = tuple(_prompt(item) for item in (prompt if many else [prompt]))
    if any(len(item) == 0 for item in prompts):
        raise ApiError("prompt is empty: send at least one token", param="prompt")
    return prompts


def _prompt(item: Any) -> PromptInput:
    if isinstance(item, str):
        return _clean(item, "prompt")
    if isinstance(item, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in item):
        return tuple(item)
    raise ApiError("prompt must be a string, a list of token ids, or a list of strings or of token-id lists", param="prompt")


def _messages(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    messages = fields.get("messages")
    if messages is None:
        raise ApiError("messages is required", param="messages", code="missing_parameter")
    if not isinstance(messages, list) or not messages:
        raise ApiError("messages must be a list of at least one message", param="messages")
    return tuple(_message(message, f"messages[{i}]") for i, message in enumerate(messages))


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise ApiError(f"{where} must be an object with role and content", param=where)
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ApiError(f"{where}.role must be one of {', '.join(_ROLES)}, got {role!r}", param=f"{where}.role")
    extra = sorted(key for key, value in message.items() if key not in ("role", "content") and value not in (None, []))
    if extra:
        raise ApiError(
            f"{where}.{extra[0]} is not supported here; leave it out",
            param=f"{where}.{extra[0]}",
            code="unsupported_parameter",
        )
    return Message(_ROLES[role], _content(message.get("content"), f"{where}.content"))


def _content(content: Any, where: str) -> str:
    """A message's text: a string, or OpenAI's list of text parts."""
    if isinstance(content, str):
        return _clean(content, where)
    if not isinstance(content, list):
        raise ApiError(f"{where} must be a string or a list of text parts", param=where)
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ApiError(f"{where}[{i}] is not a text part: this model reads text only", param=f"{where}[{i}]")
    return _clean("".join(part["text"] for part in content), where)


def _clean(text: str, where: str) -> str:
    """JSON can carry half of a surrogate pair, which no tokenizer can encode."""
    if not text.isprintable() and any("\ud800" <= char <= "\udfff" for char in text):
        raise ApiError(f"{where} holds a lone surrogate: send valid Unicode", param=where)
    return text


def _stop(fields: Mapping[str, Any]) -> tuple[str, ...]:
    stop = fields.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(item, str) and item for item in stops):
        raise ApiError("stop must be a non-empty string or a list of them", param="stop")
    if len(stops) > MAX_STOP_STRINGS:
        raise ApiError(f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(stops)}", param="stop")
    return tuple(stops)


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise ApiError(f"{name} must be true or false, got {value!r}", param=name)
    return value


def _integer(
    fields: Mapping[str, Any], name: str, *, low: int | None = None, high: int | None = None, default: int = 0
) -> int:
    value = fields.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ApiError(f"{name} must be an integer, got {value!r}", param=name)
    _bounded(value, name, low, high)
    return value


def _number(fields: Mapping[str, Any], name: str, *, low: float, high: float, default: float) -> float:
    value = fields.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ApiError(f"{name} must be a number, got {value!r}", param=name)
    _bounded(value, name, low, high)
    return float(value)


def _bounded(value: float, name: str, low: float | None, high: float | None) -> None:
    if (low is not None and value < low) or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ApiError(f"{name} must be {limits}, got {value}", param=name)
