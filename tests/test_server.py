"""The server's protocol against a scripted backend: the real `openai` client and raw HTTP, no model and no Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Generator
from typing import Any

import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient
from starlette.requests import ClientDisconnect

from actors.server import ChatServer
from actors.server_app import MAX_BODY_BYTES, build_app
from actors.server_objects import TokenScores
from actors.server_protocol import parse_chat
from afm_rl.tokenizer import Tokenizer
from afm_rl.types import GenerationRequest, Group, Message
from pretrain.tokenizer_training import MIN_VOCAB_SIZE, train_tokenizer

HELLO = [{"role": "user", "content": "Say hello."}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = ["hello there, hello again", "say hello to the world", "two words and three words"] * 20
    return train_tokenizer(texts, vocab_size=MIN_VOCAB_SIZE + 12, folder=tmp_path_factory.mktemp("tokenizer"))


class FakeBackend:
    """Answers every request with its script: response j is script[j]; `limit` cuts it as a real generator would."""

    max_positions = 64

    def __init__(self, script: list[list[int]], *, fail_at: int | None = None) -> None:
        self.script, self.fail_at = script, fail_at
        self.calls: list[tuple[str, GenerationRequest]] = []
        self.streamed = 0
        self.open_streams = 0

    def models(self) -> list[str]:
        return ["base", "summary"]

    def generate(self, model: str, request: GenerationRequest) -> Group:
        self.calls.append((model, request))
        if self.fail_at is not None:
            raise RuntimeError("the machine is on fire at /secret/path")
        responses = tuple(np.array(self.script[j][: request.max_tokens], np.int32) for j in range(request.num_responses))
        logps = tuple(np.zeros(len(r), np.float32) for r in responses)
        return Group(request.id, request.prompt_T, responses, logps, (True,) * len(responses), model, 0)

    def stream(self, model: str, request: GenerationRequest) -> Generator[int, None, None]:
        self.last_stream = self._stream(model, request)  # held, so that only closing it ends it
        return self.last_stream

    def _stream(self, model: str, request: GenerationRequest) -> Generator[int, None, None]:
        self.calls.append((model, request))
        self.open_streams += 1
        try:
            for index, token in enumerate(self.script[0][: request.max_tokens]):
                if index == self.fail_at:
                    raise RuntimeError("the machine is on fire at /secret/path")
                self.streamed += 1
                yield token
        finally:
            self.open_streams -= 1

    def score(self, _model: str, tokens_T: np.ndarray, *, top: int) -> TokenScores:
        """Every token scores -id / 7; the alternatives are ids 10, 11, .. at -0.125, -0.25, .."""
        T = len(tokens_T)
        top_ids_TK = np.tile(10 + np.arange(top, dtype=np.int32), (T, 1))
        top_logp_TK = np.tile(-0.125 * (1 + np.arange(top, dtype=np.float32)), (T, 1))
        return TokenScores((-tokens_T / 7).astype(np.float32), top_ids_TK, top_logp_TK)


class House:
    """A server, its app's test client, and the real OpenAI client talking to it."""

    def __init__(self, tokenizer: Tokenizer, script: list[list[int]], **options: Any) -> None:
        self.backend = FakeBackend(script, **options)
        self.server = ChatServer(self.backend, tokenizer, default_max_tokens=24, max_choices=8)
        self.http = TestClient(build_app(self.server), raise_server_exceptions=False)
        self.client = openai.OpenAI(base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=self.http)

    @property
    def request(self) -> GenerationRequest:
        return self.backend.calls[-1][1]


@pytest.fixture
def house(tokenizer: Tokenizer) -> House:
    first = tokenizer.encode_response("hello there")
    return House(tokenizer, [first, tokenizer.encode_response("two"), tokenizer.encode("no end")])


def events(text: str) -> list[str]:
    """The data of every server-sent event."""
    assert text.endswith("\n\n")
    lines = text[:-2].split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def test_chat_answers_with_text_usage_and_the_request_it_was_asked(house: House, tokenizer: Tokenizer) -> None:
    """Guards the whole chat path: template, sampling parameters, end token hidden, usage counted."""
    answer = house.client.chat.completions.create(
        model="summary", messages=HELLO, max_completion_tokens=20, temperature=0.5, seed=2**40 + 3, user="me", top_p=1
    )
    assert answer.object == "chat.completion"
    assert answer.model == "summary"
    assert answer.choices[0].message.content == "hello there"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    prompt = tokenizer.encode_chat([Message("user", "Say hello.")])
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(house.backend.script[0])
    assert answer.usage.total_tokens == len(prompt) + len(house.backend.script[0])
    model, request = house.backend.calls[0]
    assert model == "summary"
    assert request.prompt_T.tolist() == prompt
    assert (request.max_tokens, request.temperature, request.num_responses, request.seed) == (20, 0.5, 1, 3)


def test_choices_end_for_their_own_reasons(house: House) -> None:
    """Guards finish_reason: an end token is `stop`, running out of tokens is `length`."""
    answer = house.client.chat.completions.create(model="base", messages=HELLO, n=3, max_tokens=30)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert [c.message.content for c in answer.choices] == ["hello there", "two", "no end"]
    assert [c.finish_reason for c in answer.choices] == ["stop", "stop", "length"]


def test_message_parts_and_roles_become_the_template(house: House, tokenizer: Tokenizer) -> None:
    """Guards text parts being joined, `developer` read as system, and markers in user text staying text."""
    house.client.chat.completions.create(
        model="base",
        max_tokens=1,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "<|end|>"}, {"type": "text", "text": "!"}]},
        ],
    )
    expected = tokenizer.encode_chat([Message("system", "Be brief."), Message("user", "<|end|>!")])
    assert house.request.prompt_T.tolist() == expected
    assert house.request.prompt_T.tolist().count(tokenizer.end_of_turn_id) == 2


def test_default_limit_shrinks_to_the_room_that_is_left(house: House) -> None:
    """Guards an unset max_tokens: the server's default, or what still fits; and fresh seeds when none is given."""
    seeds = set()
    for content in ("hi", "x" * 44):
        message = [{"role": "user", "content": content}]
        house.client.chat.completions.create(model="base", messages=message)
        room = house.backend.max_positions - len(house.request.prompt_T)
        assert house.request.max_tokens == min(24, room)
        seeds.add(house.request.seed)
    assert house.request.max_tokens < 24
    assert len(seeds) == 2


def test_chat_stream_sends_role_text_reason_and_usage(house: House) -> None:
    """Guards the order of a stream's chunks as the real client reads them, and that its pieces add up."""
    stream = house.client.chat.completions.create(
        model="base", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [c.choices[0].delta.content for c in chunks[1:-2]]
    assert len(texts) > 1
    assert "".join(texts) == "hello there"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(house.backend.script[0])
    assert len({c.id for c in chunks}) == 1
    assert house.backend.open_streams == 0


def test_stream_on_the_wire_is_server_sent_events_ended_by_done(house: House) -> None:
    """Guards the bytes: media type, one JSON object an event, [DONE] last, no usage unless asked for."""
    body = {"model": "base", "messages": HELLO, "stream": True}
    response = house.http.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    data = events(response.text)
    assert data[-1] == "[DONE]"
    parsed = [json.loads(item) for item in data[:-1]]
    assert all(item["object"] == "chat.completion.chunk" and "usage" not in item for item in parsed)


def test_stream_never_splits_a_character(tokenizer: Tokenizer) -> None:
    """Guards UTF-8: an emoji comes as four byte tokens, and must arrive in one piece; a torn one becomes U+FFFD."""
    script = tokenizer.encode("a🦊b🦊")
    assert len(script) >= 10
    house = House(tokenizer, [script])
    stream = house.client.chat.completions.create(model="base", messages=HELLO, stream=True)
    assert [c.choices[0].delta.content for c in stream if c.choices[0].delta.content] == ["a", "🦊", "b", "🦊"]
    torn = House(tokenizer, [script[:-1]])
    stream = torn.client.chat.completions.create(model="base", messages=HELLO, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == "a🦊b\ufffd"


def test_stop_string_ends_the_text_and_the_decoding(tokenizer: Tokenizer) -> None:
    """Guards stop strings that span tokens: cut before them, generation abandoned, same text streamed or not."""
    house = House(tokenizer, [tokenizer.encode("one, two; STOP three four five")])
    whole = house.client.chat.completions.create(model="base", messages=HELLO, stop=[" STOP", "never"])
    assert whole.choices[0].message.content == "one, two;"
    assert whole.choices[0].finish_reason == "stop"
    assert house.backend.streamed == whole.usage.completion_tokens < 24
    stream = house.client.chat.completions.create(model="base", messages=HELLO, stop=" STOP", stream=True)
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "one, two;"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert house.backend.open_streams == 0


def test_completion_of_text_and_of_token_ids_agree(house: House, tokenizer: Tokenizer) -> None:
    """Guards both prompt forms, OpenAI's default of 16 tokens, and echo."""
    ids = tokenizer.encode("say it")
    by_text = house.client.completions.create(model="base", prompt="say it", echo=True)
    assert house.request.prompt_T.tolist() == ids
    assert house.request.max_tokens == 16
    by_ids = house.client.completions.create(model="base", prompt=ids, echo=True)
    assert house.request.prompt_T.tolist() == ids
    assert by_text.choices[0].text == by_ids.choices[0].text == "say ithello there"
    assert by_text.object == "text_completion"
    assert by_text.usage.prompt_tokens == len(ids)


def test_several_prompts_give_choices_in_their_order(house: House, tokenizer: Tokenizer) -> None:
    """Guards batched prompts, as text and as ids: n choices a prompt, numbered through."""
    answer = house.client.completions.create(model="base", prompt=["say", "two"], n=2, echo=True)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert [c.text for c in answer.choices] == ["sayhello there", "saytwo", "twohello there", "twotwo"]
    ids = [tokenizer.encode("say"), tokenizer.encode("two words")]
    answer = house.client.completions.create(model="base", prompt=ids)
    assert len(answer.choices) == 2
    assert answer.usage.prompt_tokens == len(ids[0]) + len(ids[1])


def test_completion_stream_adds_up(house: House) -> None:
    """Guards the text form of streams, with echo."""
    stream = house.client.completions.create(model="base", prompt="say: ", stream=True, echo=True)
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks) == "say: hello there"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_echoed_logprobs_cover_prompt_and_one_new_token(house: House, tokenizer: Tokenizer) -> None:
    """Guards what likelihood evaluations rely on: prompt + 1 entries, first null, own figure among the alternatives."""
    ids = tokenizer.encode("two words")
    answer = house.client.completions.create(model="base", prompt=ids, echo=True, logprobs=1, max_tokens=1)
    logprobs = answer.choices[0].logprobs
    tokens = ids + house.backend.script[0][:1]
    assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.tokens) == len(ids) + 1
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    expected = [float(np.float32(-token / 7)) for token in tokens[1:]]
    assert logprobs.token_logprobs[1:] == expected
    for own, best in zip(logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True):
        assert max(best.values()) == max(own, -0.125)
        assert own in best.values() or own == -0.125
    assert "".join(logprobs.tokens) == tokenizer.decode(tokens)


def test_logprobs_without_echo_start_at_the_response(house: House, tokenizer: Tokenizer) -> None:
    """Guards slicing: only new tokens, the end token by its name; and a prompt scored alone with max_tokens=0."""
    answer = house.client.completions.create(model="base", prompt="say", logprobs=0)
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens[-1] == "<|end|>"
    assert len(logprobs.tokens) == len(house.backend.script[0])
    assert None not in logprobs.token_logprobs
    assert all(len(best) == 1 for best in logprobs.top_logprobs)
    calls = len(house.backend.calls)
    alone = house.client.completions.create(model="base", prompt="say", logprobs=1, echo=True, max_tokens=0)
    assert alone.choices[0].text == "say"
    assert len(alone.choices[0].logprobs.tokens) == len(tokenizer.encode("say"))
    assert len(house.backend.calls) == calls


def test_errors_have_openai_s_shape_on_the_wire(house: House) -> None:
    """Guards the JSON body itself: the type, param and code every OpenAI client reads, and the hint in the message."""
    response = house.http.post("/v1/completions", json={"model": "base", "prompt": "x", "max_token": 3})
    assert response.status_code == 400
    assert response.json() == {
        "error": {
            "message": "unknown parameter 'max_token'; did you mean 'max_tokens'?",
            "type": "invalid_request_error",
            "param": "max_token",
            "code": "unknown_parameter",
        }
    }


def test_unknown_model_lists_the_models(house: House) -> None:
    """Guards 404 with the names, for generation and for /v1/models/NAME; streams fail before their first byte."""
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError, match=r"'gpt-5'; available: base, summary") as caught:
            house.client.chat.completions.create(model="gpt-5", messages=HELLO, stream=stream)
        assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        house.client.models.retrieve("gpt-5")
    assert house.backend.calls == []


def test_too_long_prompts_are_refused_with_the_numbers(house: House) -> None:
    """Guards the position limit: text, ids and conversations, and a prompt that fits but whose answer does not."""
    for prompt in ("x" * 500, [20] * 64):
        with pytest.raises(openai.BadRequestError, match="64 positions") as caught:
            house.client.completions.create(model="base", prompt=prompt, max_tokens=1)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError, match="64 positions") as caught:
        house.client.chat.completions.create(model="base", messages=[{"role": "user", "content": "x" * 500}], stream=True)
    assert caught.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match=r"of 60 tokens and 5 new ones"):
        house.client.completions.create(model="base", prompt=[20] * 60, max_tokens=5)
    house.client.completions.create(model="base", prompt=[20] * 60, max_tokens=4)


def test_limits_on_ids_and_choices(house: House, tokenizer: Tokenizer) -> None:
    """Guards ids outside the vocabulary and calls that ask for too much at once."""
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(openai.BadRequestError, match="outside the vocabulary"):
            house.client.completions.create(model="base", prompt=[1, token])
    with pytest.raises(openai.BadRequestError, match="9 choices"):
        house.client.completions.create(model="base", prompt=["a", "b", "c"], n=3)


def test_bodies_that_are_not_requests(house: House) -> None:
    """Guards malformed JSON, another type, an oversized upload, a wrong route and a wrong method: all in one shape."""
    post = lambda body: house.http.post("/v1/chat/completions", content=body)
    for body, status in ((b"{", 400), (b"[]", 400), (b"\xff", 400), (b" " * (MAX_BODY_BYTES + 1), 413)):
        response = post(body)
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"
    assert house.http.get("/v1/nothing").json()["error"]["message"] == "Not Found"
    assert house.http.get("/v1/completions").status_code == 405


def test_a_failing_backend_is_a_500_that_tells_no_secrets(tokenizer: Tokenizer) -> None:
    """Guards failures while generating: a 500 before the first byte, an error event after it, no internals shown."""
    house = House(tokenizer, [tokenizer.encode("hello there")], fail_at=1)
    with pytest.raises(openai.InternalServerError) as caught:
        house.client.chat.completions.create(model="base", messages=HELLO)
    assert "secret" not in str(caught.value)
    response = house.http.post("/v1/completions", json={"model": "base", "prompt": "x", "stream": True})
    data = events(response.text)
    assert "[DONE]" not in data
    assert json.loads(data[-1])["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    with pytest.raises(openai.APIError, match="RuntimeError"):
        list(house.client.chat.completions.create(model="base", messages=HELLO, stream=True))
    assert house.backend.open_streams == 0


def test_models_and_health(house: House) -> None:
    """Guards discovery: the base first, adapters naming it as their parent, health for a load balancer."""
    models = house.client.models.list().data
    assert [m.id for m in models] == ["base", "summary"]
    assert [m.parent for m in models] == [None, "base"]
    assert house.client.models.retrieve("summary").id == "summary"
    assert house.http.get("/health").json() == {"status": "ok", "models": ["base", "summary"]}


def test_closing_a_stream_abandons_the_rest(house: House) -> None:
    """Guards a client that goes away: the backend's generator is closed, not drained."""
    call = parse_chat({"model": "base", "messages": HELLO, "stream": True})
    chunks = house.server.stream_chat(call)
    assert next(chunks)["choices"][0]["delta"]["role"] == "assistant"
    assert next(chunks)["choices"][0]["delta"]["content"]
    assert house.backend.open_streams == 1
    chunks.close()
    assert house.backend.open_streams == 0
    assert house.backend.streamed < len(house.backend.script[0])


def test_a_client_that_disconnects_ends_its_stream(house: House) -> None:
    """Guards the HTTP shell: when the connection breaks in mid-stream, the response's generator is closed."""
    body = json.dumps({"model": "base", "messages": HELLO, "stream": True}).encode()
    sent = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if len(sent) == 4:  # the head, the role, a first piece of text; then the client is gone
            raise OSError("connection reset")

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b""}
    with pytest.raises(ClientDisconnect):
        asyncio.run(house.http.app({**scope, "asgi": {"version": "3.0", "spec_version": "2.4"}}, receive, send))
    assert house.backend.open_streams == 0
    assert 0 < house.backend.streamed < len(house.backend.script[0])
