"""A server in this process, on a thread, and plain requests to it."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import uvicorn
from PIL import Image

from uhd_jax.generation.engine import Engine
from uhd_jax.serving import server as serving
from uhd_jax.serving.app import Server
from uhd_jax.serving.settings import Settings

KEY = "a key"


def data_url(pixels: np.ndarray) -> str:
    """An image as a data URL."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def question(text: str, *images: np.ndarray) -> list[dict[str, Any]]:
    """Messages that ask about images."""
    shown = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


class Running:
    """A server that is running."""

    def __init__(self, server: Server, port: int, uvicorn_server: uvicorn.Server):
        self.server, self.port, self.uvicorn = server, port, uvicorn_server
        self.url = f"http://127.0.0.1:{port}/v1"

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, **connection: Any
    ) -> tuple[int, Any]:
        """Status and body, read as JSON where it is; a body that is no bytes is sent as JSON."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        given = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"} | (headers or {})
        given = {name: value for name, value in given.items() if value is not None}
        try:
            client.request(method, path, body, given, **connection)
            answer = client.getresponse()
            content = answer.read()
        finally:
            client.close()
        with contextlib.suppress(ValueError):
            return answer.status, json.loads(content)
        return answer.status, content

    def chat(self, **fields: Any) -> tuple[int, Any]:
        """A request for a completion, with a small answer unless `fields` say otherwise."""
        body = {"model": "tiny", "messages": question("Hello"), "max_tokens": 4} | fields
        return self.send("POST", "/v1/chat/completions", body)


@contextlib.contextmanager
def running(engine: Engine, **settings: Any) -> Iterator[Running]:
    """Serves until the end of the context; the engine goes on."""
    server = Server(engine, Settings(**{"name": "tiny", "api_key": KEY} | settings))
    listening, urls = threading.Event(), []

    def ready(url: str) -> None:
        urls.append(url)
        listening.set()

    made: list[uvicorn.Server] = []
    thread = threading.Thread(target=serving.run, args=(server, "127.0.0.1", 0, ready, made.append), daemon=True)
    thread.start()
    assert listening.wait(30)
    try:
        yield Running(server, int(urls[0].rsplit(":", 1)[1]), made[0])
    finally:
        made[0].should_exit = True
        thread.join(30)
        server.completions.threads.shutdown()
