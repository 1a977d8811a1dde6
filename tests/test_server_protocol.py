"""What the server accepts and refuses, on request bodies alone: no HTTP, no model."""

from __future__ import annotations

import math
from typing import Any

import pytest

from actors.server_protocol import ApiError, parse_chat, parse_completion

HELLO = [{"role": "user", "content": "Say hello."}]

REFUSALS = [
    ({"top_p": 0.9}, "top_p", "unsupported_parameter"),
    ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    ({"frequency_penalty": 1.0}, "frequency_penalty", "unsupported_parameter"),
    ({"store": 0}, "store", "unsupported_parameter"),
    ({"echo": True}, "echo", "unsupported_parameter"),
    ({"temprature": 0.5}, "temprature", "unknown_parameter"),
    ({"temperature": -0.1}, "temperature", "invalid_value"),
    ({"temperature": True}, "temperature", "invalid_value"),
    ({"temperature": math.nan}, "temperature", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": 1.5}, "max_tokens", "invalid_value"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 2, "stream": True}, "n", "invalid_value"),
    ({"logprobs": True, "stream": True}, "logprobs", "invalid_value"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"seed": "7"}, "seed", "invalid_value"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value"),
    ({"stop": ""}, "stop", "invalid_value"),
    ({"stream": "yes"}, "stream", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": None}, "messages", "missing_parameter"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_value"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "invalid_value"),
    ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages[0].name", "unsupported_parameter"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "invalid_value"),
    ({"model": None}, "model", "missing_parameter"),
]


@pytest.mark.parametrize(("change", "param", "code"), REFUSALS, ids=[f"{p}-{i}" for i, (_, p, _) in enumerate(REFUSALS)])
def test_refusals_name_the_parameter(change: dict[str, Any], param: str, code: str) -> None:
    """Guards that nothing we cannot honour is silently ignored, and that the error points at it."""
    with pytest.raises(ApiError) as caught:
        parse_chat({"model": "base", "messages": HELLO, **change})
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, code)
    assert param.split("[")[0].split(".")[0] in caught.value.message


def test_parameters_that_change_nothing_are_accepted() -> None:
    """Guards clients that send every parameter at its default value, or null."""
    plain = parse_chat({"model": "base", "messages": HELLO})
    neutral = {"top_p": 1.0, "presence_penalty": 0, "tools": [], "logit_bias": {}, "stop": None, "logprobs": False}
    assert parse_chat({"model": "base", "messages": HELLO, **neutral, "response_format": {"type": "text"}}) == plain


@pytest.mark.parametrize("prompt", ["", [], [[]], [1.5], [True], ["a", ["b"]], {"a": 1}])
def test_prompts_that_are_none_are_refused(prompt: Any) -> None:
    """Guards the prompt's forms: empty ones, and mixtures of types."""
    with pytest.raises(ApiError, match="prompt") as caught:
        parse_completion({"model": "base", "prompt": prompt})
    assert caught.value.param == "prompt"
