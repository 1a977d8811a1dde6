"""The server's answers (paper 5.1: adapters are chosen at run time): OpenAI-compatible completions and conversations.

`ChatServer` turns a checked call into tokens, asks a `Backend` to generate, and builds OpenAI's response objects, whole
or as the chunks of a stream. A model name is the base or one of its adapters. Log-probabilities are the model's own
(temperature 1), all taken from one pass over prompt and response, so that a token's own figure and the best alternative
can be compared by equality. Around this: `server_protocol.py` checks requests, `server_app.py` speaks HTTP,
`server_backend.py` generates.
"""

from __future__ import annotations

import contextlib
import secrets
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from actors.server_objects import TokenScores, chat_logprobs, choice, completion_logprobs, header, usage
from actors.server_protocol import ApiError, ChatCall, CompletionCall, PromptInput, Sampling
from actors.server_text import ResponseText
from afm_rl.tokenizer import Tokenizer
from afm_rl.types import GenerationRequest, Group

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions

Chunk = dict[str, Any]


class Backend(Protocol):
    """What generates: thread safe, one policy per model name. `server_backend.AdapterBackend` is the real one."""

    @property
    def max_positions(self) -> int:
        """The longest prompt + response, in tokens."""

    def models(self) -> list[str]:
        """The base model's name first, then its adapters'."""

    def generate(self, model: str, request: GenerationRequest) -> Group:
        """All responses of one request."""

    def stream(self, model: str, request: GenerationRequest) -> Generator[int, None, None]:
        """The tokens of one response as they are decoded, the end token included; closing it abandons the rest."""

    def score(self, model: str, tokens_T: np.ndarray, *, top: int) -> TokenScores:
        """Log-probability of every token of a sequence, and its `top` most likely alternatives."""


@dataclass(frozen=True)
class _Answer:
    """One response: every token that was generated, the text up to a stop, and why it ended."""

    tokens: list[int]
    text: str
    finish_reason: str


class ChatServer:
    """Answers checked calls. Raises ApiError for one that does not fit the model, before anything is generated."""

    def __init__(
        self, backend: Backend, tokenizer: Tokenizer, *, default_max_tokens: int = 256, max_choices: int = 64
    ) -> None:
        """`default_max_tokens` is for conversations that set no limit; `max_choices` bounds prompts x n of one call."""
        self.backend = backend
        self._tokenizer = tokenizer
        self._default_max_tokens = default_max_tokens
        self._max_choices = max_choices
        self._end_ids = frozenset(tokenizer.stop_ids)
        self._created = int(time.time())

    def models(self) -> dict[str, Any]:
        """The body of /v1/models."""
        return {"object": "list", "data": [self.model(name) for name in self.backend.models()]}

    def model(self, name: str) -> dict[str, Any]:
        """The body of /v1/models/NAME; `parent` is the base model of an adapter. Raises ApiError 404."""
        self._require_model(name)
        base = self.backend.models()[0]
        parent = None if name == base else base
        return {"id": name, "object": "model", "created": self._created, "owned_by": "afm-rl", "parent": parent}

    def completion(self, call: CompletionCall) -> dict[str, Any]:
        """The body of an unstreamed /v1/completions answer: n choices per prompt, in the prompts' order."""
        requests = self._completion_requests(call)
        choices: list[dict[str, Any]] = []
        written = 0
        for prompt, request in zip(call.prompts, requests, strict=True):
            for answer in self._answers(call.model, request, call.sampling):
                text = (self._prompt_text(prompt) if call.echo else "") + answer.text
                start = 0 if call.echo else len(request.prompt_T)
                logprobs = self._logprobs(completion_logprobs, call.model, request, answer, call.sampling, start)
                choices.append(choice(len(choices), answer.finish_reason, text=text, logprobs=logprobs))
                written += len(answer.tokens)
        read = sum(len(request.prompt_T) for request in requests)
        return {**header("cmpl", "text_completion", call.model), "choices": choices, "usage": usage(read, written)}

    def stream_completion(self, call: CompletionCall) -> Generator[Chunk, None, None]:
        """The chunks of a streamed /v1/completions answer; checked here, generated as it is read."""
        (request,) = self._completion_requests(call)
        head = _stream_header("cmpl", "text_completion", call.model, call.sampling)

        def chunk(text: str, finish_reason: str | None) -> Chunk:
            return {**head, "choices": [choice(0, finish_reason, text=text, logprobs=None)]}

        opening = [chunk(self._prompt_text(call.prompts[0]), None)] if call.echo else []
        return self._stream(call.model, request, call.sampling, opening=opening, chunk=chunk)

    def chat(self, call: ChatCall) -> dict[str, Any]:
        """The body of an unstreamed /v1/chat/completions answer."""
        request = self._chat_request(call)
        choices, written = [], 0
        for index, answer in enumerate(self._answers(call.model, request, call.sampling)):
            message = {"role": "assistant", "content": answer.text, "refusal": None}
            start = len(request.prompt_T)
            logprobs = self._logprobs(chat_logprobs, call.model, request, answer, call.sampling, start)
            choices.append(choice(index, answer.finish_reason, message=message, logprobs=logprobs))
            written += len(answer.tokens)
        tokens = usage(len(request.prompt_T), written)
        return {**header("chatcmpl", "chat.completion", call.model), "choices": choices, "usage": tokens}

    def stream_chat(self, call: ChatCall) -> Generator[Chunk, None, None]:
        """The chunks of a streamed answer: the role, pieces of content, the finish reason; then usage if asked for."""
        request = self._chat_request(call)
        head = _stream_header("chatcmpl", "chat.completion.chunk", call.model, call.sampling)

        def chunk(text: str, finish_reason: str | None) -> Chunk:
            delta = {"content": text} if text else {}
            return {**head, "choices": [choice(0, finish_reason, delta=delta, logprobs=None)]}

        role = {"role": "assistant", "content": ""}
        opening = [{**head, "choices": [choice(0, None, delta=role, logprobs=None)]}]
        return self._stream(call.model, request, call.sampling, opening=opening, chunk=chunk)

    def _completion_requests(self, call: CompletionCall) -> list[GenerationRequest]:
        self._require_model(call.model)
        self._limit_choices(len(call.prompts) * call.sampling.n)
        return [
            self._request(self._prompt_tokens(prompt), call.sampling, default=DEFAULT_COMPLETION_TOKENS, where="prompt")
            for prompt in call.prompts
        ]

    def _chat_request(self, call: ChatCall) -> GenerationRequest:
        self._require_model(call.model)
        self._limit_choices(call.sampling.n)
        try:
            tokens = self._tokenizer.encode_chat(call.messages, add_generation_prompt=True)
        except ValueError as error:  # a chat template may refuse what the protocol allows
            raise ApiError(str(error), param="messages") from error
        return self._request(tokens, call.sampling, default=self._default_max_tokens, where="messages")

    def _request(self, tokens: Sequence[int], sampling: Sampling, *, default: int, where: str) -> GenerationRequest:
        """Raises ApiError 400 where prompt and answer do not fit the model's positions."""
        limit = self.backend.max_positions
        room = limit - len(tokens)
        max_tokens = min(default, max(room, 1)) if sampling.max_tokens is None else sampling.max_tokens
        if max_tokens > room:
            raise ApiError(
                f"the {where} of {len(tokens)} tokens and {max_tokens} new ones exceed the model's {limit} positions: "
                "shorten it or lower max_tokens",
                param=where,
                code="context_length_exceeded",
            )
        seed = secrets.randbits(32) if sampling.seed is None else sampling.seed % 2**32
        return GenerationRequest(
            id=uuid.uuid4().hex,
            prompt_T=np.asarray(tokens, np.int32),
            num_responses=sampling.n,
            max_tokens=max_tokens,
            temperature=sampling.temperature,
            seed=seed,
        )

    def _answers(self, model: str, request: GenerationRequest, sampling: Sampling) -> list[_Answer]:
        if request.max_tokens == 0:  # echo of the prompt alone, with its log-probabilities
            return [_Answer([], "", "length")] * sampling.n
        if sampling.stop and sampling.n == 1:  # decoding ends with the stop string, not at max_tokens
            with contextlib.closing(self.backend.stream(model, request)) as tokens:
                return [self._read(tokens, sampling)]
        group = self.backend.generate(model, request)
        return [self._read(tokens_T.tolist(), sampling) for tokens_T in group.responses]

    def _read(self, tokens: Iterable[int], sampling: Sampling) -> _Answer:
        """Take tokens up to an end token or a stop string."""
        reader = _Reader(self._tokenizer, self._end_ids, sampling.stop)
        text = "".join(reader.read(tokens))
        return _Answer(reader.tokens, text, reader.finish_reason)

    def _stream(
        self,
        model: str,
        request: GenerationRequest,
        sampling: Sampling,
        *,
        opening: list[Chunk],
        chunk: Callable[[str, str | None], Chunk],
    ) -> Generator[Chunk, None, None]:
        yield from opening
        reader = _Reader(self._tokenizer, self._end_ids, sampling.stop)
        if request.max_tokens > 0:
            with contextlib.closing(self.backend.stream(model, request)) as tokens:
                for text in reader.read(tokens):
                    yield chunk(text, None)
        last = chunk("", reader.finish_reason)
        yield last
        if sampling.include_usage:
            yield {**last, "choices": [], "usage": usage(len(request.prompt_T), len(reader.tokens))}

    def _logprobs(
        self,
        build: Callable[..., dict[str, Any]],
        model: str,
        request: GenerationRequest,
        answer: _Answer,
        sampling: Sampling,
        start: int,
    ) -> dict[str, Any] | None:
        if sampling.logprobs is None:
            return None
        tokens = [*request.prompt_T.tolist(), *answer.tokens]
        scores = self.backend.score(model, np.asarray(tokens, np.int32), top=max(1, sampling.logprobs))
        return build(tokens, scores, self._tokenizer, start=start, top=sampling.logprobs)

    def _require_model(self, name: str) -> None:
        if name not in (names := self.backend.models()):
            raise ApiError(
                f"there is no model {name!r}; available: {', '.join(names)}",
                status=404,
                param="model",
                code="model_not_found",
            )

    def _limit_choices(self, choices: int) -> None:
        if choices > self._max_choices:
            raise ApiError(f"{choices} choices in one request, at most {self._max_choices} are allowed", param="n")

    def _prompt_tokens(self, prompt: PromptInput) -> Sequence[int]:
        if isinstance(prompt, str):
            return self._tokenizer.encode(prompt)
        vocab_size = self._tokenizer.vocab_size
        if outside := [token for token in prompt if not 0 <= token < vocab_size]:
            raise ApiError(f"token id {outside[0]} is outside the vocabulary of {vocab_size}", param="prompt")
        return prompt

    def _prompt_text(self, prompt: PromptInput) -> str:
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)


class _Reader:
    """Reads a response's tokens as text; afterwards knows every token it took and why it stopped."""

    def __init__(self, tokenizer: Tokenizer, end_ids: frozenset[int], stop: Sequence[str]) -> None:
        self._text = ResponseText(tokenizer.byte_stream(), stop=stop)
        self._end_ids = end_ids
        self._ended = False
        self.tokens: list[int] = []

    def read(self, tokens: Iterable[int]) -> Iterator[str]:
        """Pieces of text, none of them empty, until an end token, a stop string or the last token."""
        for token in tokens:
            self.tokens.append(token)
            self._ended = token in self._end_ids
            if not self._ended and (text := self._text.push(token)):
                yield text
            if self._ended or self._text.stopped:
                break
        if text := self._text.close():
            yield text

    @property
    def finish_reason(self) -> str:
        return "stop" if self._ended or self._text.stopped else "length"


def _stream_header(prefix: str, kind: str, model: str, sampling: Sampling) -> Chunk:
    """Every chunk of one stream carries it; where usage was asked for, all but the last say null."""
    return {**header(prefix, kind, model), **({"usage": None} if sampling.include_usage else {})}
