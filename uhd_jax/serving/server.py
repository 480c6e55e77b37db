"""Running the application: where it listens, and how it stops."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable

import uvicorn

from uhd_jax.serving.app import Server

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


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
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="off",
    )
    listening = _Uvicorn(config, server, ready)
    made(listening)
    listening.run()
