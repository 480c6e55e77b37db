"""Running the application: where it listens, and how it stops."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http
import json
import signal
import sys
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from uhd_jax.serving.app import Server
from uhd_jax.serving.errors import ApiError

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class _Connection(H11Protocol):
    """A connection that has to ask for something within `seconds`; what is no HTTP is refused in OpenAI's shape."""

    def __init__(self, *arguments: Any, seconds: float, **options: Any):
        super().__init__(*arguments, **options)
        self._seconds, self._late = seconds, None

    def connection_made(self, transport: Any) -> None:
        """A client is there."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Part of a request, or several."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """What was asked last is answered."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        super().connection_lost(exc)
        self._rest()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP."""
        self._refuse(ApiError(400, "this is not a request of HTTP/1.1", "invalid_http"))

    def _watch(self) -> None:
        """Waits for a head only where no request is being answered."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._rest()
        elif self._late is None and not self.transport.is_closing():
            self._late = self.loop.call_later(self._seconds, self._give_up)

    def _rest(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        if self.conn.trailing_data[0]:
            message = f"the head of the request took longer than {self._seconds:g} seconds to arrive"
            self._refuse(ApiError(408, message, "head_too_slow"))
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        body = json.dumps(error.to_json()).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        reason = http.HTTPStatus(error.status).phrase
        head = h11.Response(status_code=error.status, headers=headers, reason=reason.encode())
        with contextlib.suppress(h11.LocalProtocolError):  # where an answer was already begun it is cut off
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        if self.cycle is not None:  # the request whose body broke off has nobody who waits for its answer
            self.cycle.disconnected = True
            self.cycle.message_event.set()


class _Uvicorn(uvicorn.Server):
    """Drains before it closes: what came so far is answered or refused, new requests are refused.

    A second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, server: Server, ready: Callable[[str], None]):
        super().__init__(config)
        self._server, self._ready = server, ready
        self._draining: asyncio.Task | None = None

    async def startup(self, sockets=None) -> None:
        """Listens, and says where."""
        await super().startup(sockets=sockets)
        self._loop = asyncio.get_running_loop()
        for listening in self.servers:
            for opened in listening.sockets:
                host, port = opened.getsockname()[:2]
                self._ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    def handle_exit(self, sig: int, frame: object) -> None:
        """Called by the signals SIGTERM and SIGINT."""
        if self._server.stopping:
            self.should_exit = self.force_exit = True
            return
        self._server.stopping = True
        name = signal.Signals(sig).name
        print(f"{name}: no more requests are taken, those running end first", file=sys.stderr, flush=True)
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        async def drain() -> None:
            await asyncio.to_thread(self._server.engine.close, self._server.settings.drain_seconds)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._server.settings.send_seconds):
                    while self._server.open:
                        await asyncio.sleep(0.01)
            self.should_exit = True

        self._draining = asyncio.ensure_future(drain())


def run(
    server: Server,
    host: str,
    port: int,
    ready: Callable[[str], None],
    made: Callable[[uvicorn.Server], None] = lambda _: None,
) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
      server: its engine is started.
      host: address to listen on.
      port: 0 for a free one.
      ready: called with the URL once it listens.
      made: called with what can end it from another thread.
    """
    config = uvicorn.Config(
        server.app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(server.settings.send_seconds) + 1,
        h11_max_incomplete_event_size=65_536,
        http=functools.partial(_Connection, seconds=server.settings.body_seconds),
        loop="asyncio",
        ws="none",
        lifespan="off",
    )
    listening = _Uvicorn(config, server, ready)
    made(listening)
    listening.run()
