"""HTTP around a `ChatServer`: a FastAPI app with OpenAI's routes, its error shape, and server-sent events for streams.

Generation runs in a thread, never on the event loop, so that /health answers while the model works. A client that goes
away ends its stream: the token generator is closed, which abandons the rest of the response. There is no
authentication: the server listens on the loopback interface unless told otherwise.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Generator, Iterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from actors.server import ChatServer
from actors.server_protocol import ApiError, parse_chat, parse_completion

log = logging.getLogger(__name__)

#: Far above any prompt that fits a model; keeps a mistaken upload from being tokenised.
MAX_BODY_BYTES = 8 * 2**20


def build_app(server: ChatServer) -> FastAPI:
    """The app: /v1/models, /v1/models/NAME, /v1/completions, /v1/chat/completions and /health."""
    app = FastAPI(title="afm-rl", docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_failure)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "models": server.backend.models()}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return server.models()

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        return server.model(name)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        call = parse_completion(await _json(request))
        return await _respond(call, server.stream_completion if call.sampling.stream else server.completion)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        call = parse_chat(await _json(request))
        return await _respond(call, server.stream_chat if call.sampling.stream else server.chat)

    return app


async def _respond(call: Any, answer: Callable[[Any], dict[str, Any] | Generator[dict[str, Any], None, None]]) -> Response:
    result = await run_in_threadpool(answer, call)
    return JSONResponse(result) if isinstance(result, dict) else _EventStream(result)


async def _json(request: Request) -> Any:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(f"the request body exceeds {MAX_BODY_BYTES} bytes", status=413, code="body_too_large")
    try:
        return json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the request body is not JSON: {error}", code="invalid_body") from error


class _EventStream(StreamingResponse):
    """Chunks as server-sent events, `[DONE]` last; closes the chunks' generator however the response ends."""

    def __init__(self, chunks: Generator[dict[str, Any], None, None]) -> None:
        self._chunks = chunks
        # Proxies must pass on every event at once.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_events(chunks), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._chunks.close()


def _events(chunks: Iterator[dict[str, Any]]) -> Iterator[str]:
    """The status has been sent when generation begins: a failure then becomes an event, which clients raise."""
    try:
        for chunk in chunks:
            yield _event(chunk)
    except Exception as error:
        log.exception("a stream failed")
        yield _event(_failure(error).body())
        return
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, allow_nan=False)}\n\n"


def _failure(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    return ApiError(f"the server failed ({type(error).__name__}); its log has the reason", status=500, code="internal_error")


async def _on_api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), status_code=error.status)


async def _on_http_error(_request: Request, error: Exception) -> Response:
    """No such route, or not with this method."""
    assert isinstance(error, HTTPException)
    body = ApiError(str(error.detail), status=error.status_code, code=None).body()
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def _on_failure(_request: Request, error: Exception) -> Response:
    return JSONResponse(_failure(error).body(), status_code=500)
