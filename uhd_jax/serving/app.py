"""The routes of the server."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from uhd_jax import __version__
from uhd_jax.generation.engine import Engine
from uhd_jax.serving.completions import Completion, Completions, Piece, logprobs_json
from uhd_jax.serving.errors import ApiError
from uhd_jax.serving.metrics import CONTENT_TYPE, Metrics
from uhd_jax.serving.protocol import parse_request
from uhd_jax.serving.settings import Settings

_log = logging.getLogger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]


class Server:
    """The application around an engine.

    Args:
      engine: started.
      settings: limits.
    """

    def __init__(self, engine: Engine, settings: Settings):
        self.engine, self.settings = engine, settings
        self.metrics = Metrics(engine)
        self.completions = Completions(engine, settings, self.metrics)
        self.stopping = False
        self.open = 0  # requests for completions that are not answered to the end
        self._started = int(time.time())
        routes = [
            Route("/health", self.guarded(self._health, key=False)),
            Route("/metrics", self.guarded(self._metrics, key=False)),
            Route("/v1/models", self.guarded(self._models)),
            Route("/v1/models/{name:path}", self.guarded(self._model)),
            Route("/v1/chat/completions", self.guarded(self._chat), methods=["POST"]),
        ]
        if settings.demo:
            from uhd_jax.serving.demo import demo_routes

            routes += demo_routes(self)
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: _no_such_page, Exception: _fault})

    def guarded(self, endpoint: Endpoint, key: bool = True) -> Endpoint:
        """An endpoint behind the checks that all have, whose errors have OpenAI's shape."""

        async def run(request: Request) -> Response:
            try:
                self._check_host(request)
                if key:
                    self._check_key(request)
                return await endpoint(request)
            except ApiError as error:
                return JSONResponse(error.to_json(), error.status, error.headers)
            except ClientDisconnect:
                return Response(status_code=400)  # which nobody reads

        return run

    async def body(self, request: Request) -> bytes:
        """The body of a request, as far as the limits let it come.

        Raises:
          ApiError: 413 or 408.
        """
        most = self.settings.max_body_bytes
        too_large = ApiError(413, f"the body has more than {most} bytes", "body_too_large")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > most:
            raise too_large
        content = bytearray()
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                async for piece in request.stream():
                    content += piece
                    if len(content) > most:
                        raise too_large
        except TimeoutError:
            message = f"the request took longer than {self.settings.body_seconds:g} seconds to arrive"
            raise ApiError(408, message, "body_too_slow") from None
        return bytes(content)

    def _check_host(self, request: Request) -> None:
        """A page elsewhere that has its name resolved to this machine would send that name."""
        host = request.headers.get("host", "").lower()
        name = host if host.endswith("]") else host.rsplit(":", 1)[0]
        if self.settings.hosts and name not in self.settings.hosts:
            raise ApiError(421, "this server does not answer to the name in the Host header", "wrong_host")

    def _check_key(self, request: Request) -> None:
        if not self.settings.api_key:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), self.settings.api_key.encode())
        if kind.lower() != "bearer" or not right:
            raise ApiError(401, "no API key, or not the right one: send Authorization: Bearer KEY", "invalid_api_key")

    async def _health(self, request: Request) -> Response:
        status = "failed" if self.engine.broken else "stopping" if self.stopping else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._description]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["name"] != self.settings.name:
            raise ApiError(404, f"there is no such model; this server has {self.settings.name!r}", "model_not_found")
        return JSONResponse(self._description)

    @property
    def _description(self) -> dict[str, Any]:
        return {
            "id": self.settings.name,
            "object": "model",
            "created": self._started,
            "owned_by": "uhd_jax",
            "max_model_len": self.engine.shapes.length,
        }

    async def _chat(self, request: Request) -> Response:
        self.open += 1
        completion, streams = None, False
        try:
            if self.stopping:
                raise ApiError(503, "the server is stopping", "stopping")
            if self.open > self.engine.max_waiting + self.engine.shapes.rows + self.settings.prepare_threads:
                raise ApiError(429, "too many requests are waiting; try again in a moment", "queue_full")
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise ApiError(415, "send the request as Content-Type: application/json", "not_json")
            asked = parse_request(await self.body(request))
            completion = await self.completions.start(asked)
            if asked.stream:
                pieces = completion.pieces()
                response = self._stream(completion, await _or_gone(request, anext(pieces)), pieces)
                streams = True
            else:
                response = await _or_gone(request, self._whole(completion))
            self.metrics.requests.labels(response.status_code).inc()
            return response
        except Exception as error:
            gone = 499 if isinstance(error, ClientDisconnect) else 500
            self.metrics.requests.labels(getattr(error, "status", gone)).inc()
            raise
        finally:
            if not streams:
                self._close(completion)

    def _close(self, completion: Completion | None) -> None:
        self.open -= 1
        if completion is not None:
            completion.close()

    async def _whole(self, completion: Completion) -> Response:
        """The answer in one piece."""
        asked, requests = completion.asked, completion.requests
        likely: list[list[Any]] = [[] for _ in requests]
        async for piece in completion.pieces():
            likely[piece.index] += piece.likely
        tokenizer = self.engine.assistant.tokenizer
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": request.text, "refusal": None},
                "logprobs": logprobs_json(tuple(likely[index]), asked.top_logprobs or 0, tokenizer)
                if asked.logprobs
                else None,
                "finish_reason": request.reason,
            }
            for index, request in enumerate(requests)
        ]
        return JSONResponse(
            self._envelope(completion, "chat.completion") | {"choices": choices, "usage": completion.usage}
        )

    def _stream(self, completion: Completion, first: Piece, pieces: AsyncIterator[Piece]) -> Response:
        """The answer in pieces. What goes wrong before the first of them still has its HTTP status."""

        async def events() -> AsyncIterator[bytes]:
            usage = completion.asked.stream_options and completion.asked.stream_options.include_usage
            envelope = self._envelope(completion, "chat.completion.chunk") | ({"usage": None} if usage else {})
            for index in range(len(completion.requests)):
                yield _event(envelope | {"choices": [_choice(index, {"role": "assistant", "content": ""})]})
            try:
                yield _event(envelope | {"choices": [self._delta(completion, first)]})
                async for piece in pieces:
                    yield _event(envelope | {"choices": [self._delta(completion, piece)]})
            except ApiError as error:
                self.metrics.broken.labels(error.code).inc()
                yield _event(error.to_json())
                return
            if usage:
                yield _event(envelope | {"choices": [], "usage": completion.usage})
            yield b"data: [DONE]\n\n"

        return _Events(events(), self.settings.send_seconds, lambda: self._close(completion))

    def _delta(self, completion: Completion, piece: Piece) -> dict[str, Any]:
        if piece.reason is not None:
            return _choice(piece.index, {}, piece.reason)
        logprobs = None
        if completion.asked.logprobs:
            count = completion.asked.top_logprobs or 0
            logprobs = logprobs_json(piece.likely, count, self.engine.assistant.tokenizer)
        return _choice(piece.index, {"content": piece.text}) | {"logprobs": logprobs}

    def _envelope(self, completion: Completion, kind: str) -> dict[str, Any]:
        return {
            "id": completion.id,
            "object": kind,
            "created": completion.created,
            "model": self.settings.name,
            "system_fingerprint": f"uhd_jax-{__version__}",
        }


class _Events(StreamingResponse):
    """Server-sent events. A client that leaves them unread for too long is given up; `closed` is called in any case."""

    def __init__(self, events: AsyncIterator[bytes], seconds: float, closed: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._seconds, self._closed = seconds, closed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends everything."""

        async def patient(message: Any) -> None:
            async with asyncio.timeout(self._seconds):
                await send(message)

        try:
            await super().__call__(scope, receive, patient)
        except* TimeoutError:
            _log.warning("a client left its answer unread for %g seconds and was given up", self._seconds)
        except* ClientDisconnect:
            pass
        finally:
            self._closed()


async def _or_gone(request: Request, answer: Awaitable[Any]) -> Any:
    """What is awaited, or ClientDisconnect as soon as nobody waits for it any more."""
    task = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await one


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _choice(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


async def _no_such_page(request: Request, error: HTTPException) -> Response:
    words = {404: "there is no such page", 405: "this page does not take that method"}
    refused = ApiError(error.status_code, words.get(error.status_code, error.detail), "not_found")
    return JSONResponse(refused.to_json(), refused.status, dict(error.headers or {}))


async def _fault(request: Request, error: Exception) -> Response:
    """What nobody foresaw: the log has it, the client learns only that it was not its fault."""
    refused = ApiError(500, "the server has a fault; its log says more", "internal_error")
    return JSONResponse(refused.to_json(), 500)
