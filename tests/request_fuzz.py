"""Malformed requests: made from the schema, hostile images, broken JSON, broken HTTP, and what the demo page asks for.

    python tests/request_fuzz.py --count=10000 --seed=1                       # a server of its own, tiny and random
    python tests/request_fuzz.py --count=10000 --server=127.0.0.1:PORT --model=NAME  # one that is running with --demo

Every request goes over a socket of its own. Prints how many of each kind were answered with which status.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import logging
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from hostile_images import hostile_files
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from serving import KEY, Running, data_url
from tiny_assistant import SMALL

from uhd_jax.serving.protocol import ChatRequest

# What a server may say to these; it is neither stopping nor slow, so no 5xx is among them.
STATUSES = {200, 400, 404, 405, 408, 413, 415, 429}
CLOSED = "closed"  # without an answer: a head that never ended, or a closed half
SHARES = {"fields": 0.5, "images": 0.25, "json": 0.1, "http": 0.1, "views": 0.05}

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 2**31, 2**32, 2**63, 1e308, -0.0, 0.5, 1e-300, ""]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=20),
    st.sampled_from(
        ["\ud800", "\x00", "a\r\nb", "<image>", "<|image_pad|>", "<|im_end|>", "\ufffd" * 3, "{{ messages }}"]
    ),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
urls = st.one_of(
    st.just(data_url(SMALL)),
    st.sampled_from(["", "data:", "data:,", "data:;base64,", "http://127.0.0.1/", "file:///a", "javascript:1"]),
    st.text(max_size=30).map(lambda text: "data:image/png;base64," + text),
    scalars,
)
parts = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, scalars),
    st.builds(lambda url: {"type": "image_url", "image_url": {"url": url}}, urls),
    st.builds(lambda url, detail: {"type": "image_url", "image_url": {"url": url, "detail": detail}}, urls, scalars),
    st.builds(lambda url: {"type": "image_url", "image_url": url}, urls),
    st.builds(lambda kind: {"type": kind, "text": ""}, scalars),
    values,
)
messages = st.one_of(
    st.lists(
        st.builds(
            lambda role, content: {"role": role, "content": content},
            st.sampled_from(["user", "system", "assistant", "developer"]) | scalars,
            st.text(max_size=30) | st.lists(parts, max_size=4) | values,
        ),
        max_size=4,
    ),
    values,
)
OPTIONS = sorted(set(ChatRequest.model_fields) - {"model", "messages"})
VALID = {
    "temperature": st.sampled_from([0, 0.5, 2, 100]),
    "top_p": st.sampled_from([1, 0.1, 1e-300]),
    "n": st.integers(1, 9),
    "stop": st.lists(st.text(max_size=3), max_size=3),
    "seed": st.integers(-(2**64), 2**64),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 21),
    "beams": st.integers(1, 6),
    "max_slices": st.integers(0, 10),
    "mode": st.sampled_from(["16x", "4x"]),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "top_k": st.integers(0, 10),
    "thinking": st.booleans(),
    "metadata": st.dictionaries(st.text(max_size=8), values, max_size=3),
}
GOOD = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]


@st.composite
def objects(draw) -> Any:
    """What a body holds, mostly an object with mostly the right fields."""
    body: dict[str, Any] = {"model": draw(scalars) if draw(st.integers(0, 9)) == 0 else "tiny"}
    body["messages"] = draw(messages) if draw(st.booleans()) else GOOD
    body["max_tokens"] = draw(values) if draw(st.integers(0, 5)) == 0 else 2
    for name in draw(st.lists(st.sampled_from(OPTIONS), max_size=4, unique=True)):
        body[name] = draw(VALID.get(name, values) if draw(st.booleans()) else values)
    if draw(st.integers(0, 9)) == 0:
        body[draw(st.text(max_size=10))] = draw(values)
    if draw(st.integers(0, 9)) == 0:
        body.pop(draw(st.sampled_from(sorted(set(body) - {"max_tokens"}))))  # without it answers would be long
    return draw(values) if draw(st.integers(0, 19)) == 0 else body


@st.composite
def pictures(draw) -> bytes:
    """A sound request that shows files, none of which is what it seems."""
    shown = [
        {"type": "image_url", "image_url": {"url": draw(_as_url())}}
        for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3])))
    ]
    content = draw(st.permutations([*shown, {"type": "text", "text": "What?"}]))
    body = {"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": content}]}
    for name in draw(st.lists(st.sampled_from(["max_slices", "mode", "stream"]), max_size=1)):
        body[name] = draw(VALID[name])
    return json.dumps(body).encode()


@st.composite
def _as_url(draw) -> str:
    content = base64.b64encode(draw(hostile_files())).decode()
    kind = draw(st.sampled_from(["image/png", "image/jpeg", "image/svg+xml", "text/html", "", "image/png;charset=x"]))
    if draw(st.integers(0, 19)) == 0:
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.text(max_size=3)) + content[at + draw(st.integers(0, 3)) :]
    return f"data:{kind};base64,{content}"


@st.composite
def texts(draw) -> bytes:
    """JSON that is damaged, or sound and strange."""
    kind = draw(st.integers(0, 4))
    body = {"model": "tiny", "messages": GOOD, "max_tokens": 2}
    if kind == 0:  # nested deeply
        depth = draw(st.sampled_from([10, 100, 300, 800, 900, 960, 990, 1000, 2000, 5000, 100_000]))
        opening, closing = draw(st.sampled_from([("[", "]"), ('{"a":', "}")]))
        whole = opening * depth + "1" + (closing * depth if draw(st.booleans()) else "")
        place = draw(st.sampled_from(["metadata", "messages", "tools", "new"]))
        inner = f'{{"a": {whole}}}' if place == "metadata" else whole
        return f'{json.dumps(body)[:-1]}, "{place}": {inner}}}'.encode()
    if kind == 1:  # huge numbers, constants, and a name twice
        numbers = ["9" * 5000, "9" * 400, "1e999", "-1e999", "NaN", "Infinity", "0x1", "01", "1.", "-"]
        number = draw(st.sampled_from(numbers))
        name = draw(st.sampled_from(["temperature", "max_tokens", "seed", "model", "metadata", "top_p"]))
        return f'{json.dumps(body)[:-1]}, "{name}": {number}}}'.encode()
    content = json.dumps(body | draw(st.dictionaries(st.sampled_from(OPTIONS), values, max_size=2))).encode()
    if kind == 2:
        text = content.decode()
        return text.encode(draw(st.sampled_from(["utf-16", "utf-32", "utf-8-sig", "utf-16-le", "cp037"])))
    if kind == 3:
        return draw(st.binary(max_size=60))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.binary(max_size=4)) + content[at + draw(st.integers(0, 4)) :]
    return content


HEADERS = [
    ("Content-Type", ["application/json", "application/json; charset=utf-16", "text/plain", "", "multipart/form-data"]),
    ("Content-Length", ["-1", "0", "5", "1e3", "٣", "99999999999999999999", "1000000000", "4, 4"]),
    ("Transfer-Encoding", ["chunked", "gzip", "chunked, chunked", "identity", ""]),
    ("Expect", ["100-continue", "200-ok"]),
    ("Connection", ["close", "keep-alive", "upgrade", "\x0b"]),
    ("Upgrade", ["websocket", "h2c", "TLS/1.0"]),
    ("Host", ["x", "", "a b", "[::1", "x" * 5000, "x:99999999"]),
    ("Authorization", [f"Bearer {KEY}", f"bearer   {KEY}", "Bearer", "Basic YTpi", "Bearer \xff", "x" * 9000]),
    ("Accept-Encoding", ["gzip", "*;q=0", "\x01"]),
    ("X-Forwarded-For", ["127.0.0.1", "x" * 70_000]),
    ("Cookie", ["a=b; " * 100]),
    ("a b", ["c"]),
    ("", ["c"]),
]


METHODS = ["POST", "POST", "GET", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "post", "A" * 100, ""]
PATHS = ["/v1/chat/completions"] * 4
PATHS += ["/", "*", "/v1/models", "/v1/models/%00", "/v1/models/../../etc/passwd", "/health", "/metrics", "//", "/%ff"]
PATHS += ["http://x/v1/models", "/v1/chat/completions?" + "a=b&" * 50, "/" + "x" * 70_000, "/é", "/\x00", ""]
PATHS += ["/demo/views"]


@st.composite
def streams(draw) -> bytes:
    """What stands on the wire: a request whose head or body is broken, mostly."""
    method = draw(st.sampled_from(METHODS))
    path = draw(st.sampled_from(PATHS))
    version = draw(st.sampled_from(["HTTP/1.1"] * 6 + ["HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/1.1.1", "x", ""]))
    lines = [f"{method} {path} {version}"]
    for name, given_values in draw(st.lists(st.sampled_from(HEADERS), max_size=5)):
        lines.append(f"{name}: {draw(st.sampled_from(given_values))}")
    if draw(st.integers(0, 4)):
        lines += ["Host: x", f"Authorization: Bearer {KEY}", "Content-Type: application/json"]
    body = json.dumps({"model": "tiny", "messages": GOOD, "max_tokens": 2}).encode()
    form = draw(st.integers(0, 4))
    if form == 0:
        lines.append(f"Content-Length: {len(body) + draw(st.integers(-40, 40))}")
    elif form == 1:
        lines.append("Transfer-Encoding: chunked")
        size = draw(st.sampled_from([f"{len(body):x}", "-1", "fffffffffff", "zz", "", f"{len(body):x};a=b", "5"]))
        body = size.encode() + b"\r\n" + body + draw(st.sampled_from([b"\r\n0\r\n\r\n", b"", b"\r\n0\r\nA: b\r\n\r\n"]))
    elif form == 2:
        lines.append(f"Content-Length: {len(body)}")
    end = draw(st.sampled_from(["\r\n"] * 5 + ["\n", "\r", "\r\n ", "\x00\r\n"]))
    whole = end.join([*lines, "", ""]).encode("utf-8", "surrogatepass") + body
    for _ in range(draw(st.sampled_from([0, 0, 1, 3]))):
        at = draw(st.integers(0, min(len(whole), 400)))
        whole = whole[:at] + draw(st.binary(max_size=3)) + whole[at + draw(st.integers(0, 3)) :]
    return whole[: draw(st.integers(0, len(whole)))] if draw(st.integers(0, 5)) == 0 else whole


queries = st.sampled_from(
    ["", "?mode=4x", "?mode=2x", "?max_slices=1", "?max_slices=-1", "?max_slices=٣", "?mode=%00", "?" + "a=b&" * 99]
)


class Fuzz:
    """Sends, checks each answer, and counts.

    Args:
      server: that is running.
      model: its name there; "tiny" stands for it in what is made here.
      seconds: in which every connection must have ended.
    """

    def __init__(self, server: Running, model: str = "tiny", seconds: float = 60.0):
        self.server, self.model, self.seconds = server, json.dumps(model).encode(), seconds
        self.counts: Counter[tuple[str, int | str]] = Counter()

    def run(self, count: int, number: int | None = None) -> None:
        """So many requests, the kinds by their shares; the same ones for the same number."""
        kinds: dict[str, tuple[Any, Callable[[Any], tuple[int | str, bytes]]]] = {
            "fields": (objects(), lambda value: self._chat(json.dumps(value).encode())),
            "images": (pictures(), self._chat),
            "json": (texts(), self._chat),
            "http": (streams(), self._stream),
            "views": (st.tuples(queries, hostile_files()), self._views),
        }
        for kind, (made, send) in kinds.items():

            @settings(
                max_examples=max(1, round(count * SHARES[kind])),
                deadline=None,
                suppress_health_check=list(HealthCheck),
                database=None,
            )
            @given(made)
            def one(value: Any) -> None:
                self._one(kind, send, value)  # noqa: B023

            (one if number is None else seed(number)(one))()

    def _one(self, kind: str, send: Callable[[Any], tuple[int | str, bytes]], value: Any) -> None:
        status, content = send(value)
        self.counts[kind, status] += 1
        self._check(kind, status, content)

    def _check(self, kind: str, status: int | str, content: bytes) -> None:
        assert status in STATUSES or (kind == "http" and status in (CLOSED, 401)), (status, content[:500])
        assert b"Traceback" not in content and b"uhd_jax/" not in content, content[:2000]
        if status in (200, CLOSED):
            return
        error = json.loads(content)["error"]
        assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"], error
        assert len(content) < 2000, content[:2000]

    def _chat(self, body: bytes) -> tuple[int, bytes]:
        return self._send("/v1/chat/completions", body.replace(b'"tiny"', self.model))

    def _views(self, value: tuple[str, bytes]) -> tuple[int, bytes]:
        return self._send("/demo/views" + value[0].replace("٣", "%d9%a3"), value[1])

    def _send(self, path: str, body: bytes) -> tuple[int, bytes]:
        client = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=self.seconds)
        with contextlib.closing(client):
            headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
            client.request("POST", path, body, headers)
            answer = client.getresponse()
            return answer.status, answer.read()

    def _stream(self, content: bytes) -> tuple[int | str, bytes]:
        """The first answer to what stands on the wire; the connection must end, or be answered."""
        with contextlib.closing(socket.create_connection(("127.0.0.1", self.server.port), self.seconds)) as connection:
            answer = http.client.HTTPResponse(connection)
            try:
                connection.sendall(content)
                answer.begin()
                return answer.status, answer.read()
            except (ConnectionError, http.client.HTTPException):
                return CLOSED, b""

    def table(self) -> dict[str, dict[str, int]]:
        """Counts by kind and status."""
        kinds = {kind: {} for kind in SHARES}
        for (kind, status), count in sorted(self.counts.items(), key=str):
            kinds[kind][str(status)] = count
        return kinds


@contextlib.contextmanager
def tiny_server(**options: Any):
    """A server with a tiny random model, whose engine must be as before at the end."""
    from serving import running
    from tiny_assistant import make_assistant

    from uhd_jax.generation.engine import Engine
    from uhd_jax.generation.shapes import Shapes

    engine = Engine(make_assistant(), Shapes(3, 1, (128, 300), (4,), (128, 1408)), modes=("16x", "4x"))
    engine.start()
    limits = {"max_new_tokens": 8, "default_new_tokens": 2, "max_pixels": 2_000_000, "body_seconds": 0.5, "demo": True}
    with running(engine, **limits | options) as server:
        yield server
    engine.close()
    assert engine.running == engine.waiting == 0 and engine.broken is None


class Faults(logging.Handler):
    """Keeps what is logged as an error, but for Pillow's words about damaged files."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if not record.name.startswith("PIL"):
            self.found.append(self.format(record))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="of requests (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--server", help="HOST:PORT of one that is running; its key is asked for by none")
    parser.add_argument("--model", default="tiny", help="its model's name")
    arguments = parser.parse_args()
    faults = Faults()
    for name in ("", "uvicorn.error"):
        logging.getLogger(name).addHandler(faults)
    with contextlib.ExitStack() as stack:
        if arguments.server:
            server = Running(None, int(arguments.server.rsplit(":", 1)[1]), None)
        else:
            server = stack.enter_context(tiny_server())
        before = server.chat(model=arguments.model)
        began = time.monotonic(), time.process_time()
        fuzz = Fuzz(server, arguments.model)
        try:
            fuzz.run(arguments.count, arguments.seed)
        finally:
            print(json.dumps(fuzz.table(), indent=2))
        seconds = time.monotonic() - began[0], time.process_time() - began[1]
        same = server.chat(model=arguments.model)[1]["choices"] == before[1]["choices"]
    print(f"{sum(fuzz.counts.values())} requests; seconds: {seconds[0]:.0f}, of processor {seconds[1]:.0f}")
    print(f"the first question is answered as before: {same}; errors in the log: {len(faults.found)}")
    print(*faults.found[:3], sep="\n")
    if not same or faults.found:
        sys.exit(1)


if __name__ == "__main__":
    main()
