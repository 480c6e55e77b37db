"""Malformed requests, made from the schema of requests: fields left out, of other types, at their limits."""

from __future__ import annotations

import base64
import io
import json
import sys
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from serving import Running, data_url

from uhd_jax.serving.protocol import ChatRequest

SMALL = np.full((40, 60, 3), 90, np.uint8)
STATUSES = {200, 400, 404, 413, 415, 429, 504}

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 2**31, 2**32, 2**63, 1e308, -0.0, 0.5, 1e-300, ""]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=20),
    st.sampled_from(["\ud800", "\x00", "<image>", "<|image_pad|>", "<|im_end|>", "\ufffd" * 3, "{{ messages }}"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def _files() -> list[bytes]:
    """Small images in all formats, and what is none."""
    made = []
    for form in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        file = io.BytesIO()
        Image.fromarray(SMALL).save(file, form)
        made.append(file.getvalue())
    header = made[0][:16] + (60_000).to_bytes(4, "big") * 2 + made[0][24:]  # a PNG that says it is huge
    return [*made, header, b"", b"%PDF-1.4", b"<svg xmlns='http://www.w3.org/2000/svg'/>"]


FILES = _files()


@st.composite
def hostile_files(draw) -> bytes:
    """A file with bytes changed, cut off, or put in."""
    content = bytearray(draw(st.sampled_from(FILES)))
    for _ in range(draw(st.integers(0, 6))):
        if content:
            content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    cut = draw(st.integers(0, len(content)))
    return bytes(content[:cut] if draw(st.booleans()) else content)


urls = st.one_of(
    hostile_files().map(lambda content: "data:image/png;base64," + base64.b64encode(content).decode()),
    st.just(data_url(SMALL)),
    st.sampled_from(["", "data:", "data:,", "data:;base64,", "http://127.0.0.1/", "file:///a", "javascript:1"]),
    st.text(max_size=30).map(lambda text: "data:image/png;base64," + text),
    scalars,
)
parts = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, scalars),
    st.builds(lambda url: {"type": "image_url", "image_url": {"url": url}}, urls),
    st.builds(lambda url: {"type": "image_url", "image_url": url}, urls),
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
    "top_k": st.integers(0, 10),
    "thinking": st.booleans(),
}


@st.composite
def bodies(draw) -> bytes:
    """The body of a request, mostly JSON and mostly with the right fields."""
    body: dict[str, Any] = {"model": draw(st.just("tiny") | scalars) if draw(st.integers(0, 9)) == 0 else "tiny"}
    good = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    body["messages"] = draw(messages) if draw(st.booleans()) else good
    body["max_tokens"] = draw(values) if draw(st.integers(0, 5)) == 0 else 2
    for name in draw(st.lists(st.sampled_from(OPTIONS), max_size=4, unique=True)):
        body[name] = draw(VALID.get(name, values) if draw(st.booleans()) else values)
    if draw(st.integers(0, 9)) == 0:
        body[draw(st.text(max_size=10))] = draw(values)
    if draw(st.integers(0, 9)) == 0:
        body.pop(draw(st.sampled_from(sorted(set(body) - {"max_tokens"}))))  # without it answers would be long
    whole = draw(values) if draw(st.integers(0, 19)) == 0 else body
    content = json.dumps(whole).encode()
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.binary(max_size=4)) + content[at + draw(st.integers(0, 4)) :]
    return content


def send_malformed(server: Running, count: int) -> dict[int, int]:
    """Sends so many requests; each must be answered or refused as documented. Returns how many by status."""
    statuses: dict[int, int] = {}

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(bodies())
    def send(body: bytes) -> None:
        status, answer = server.send("POST", "/v1/chat/completions", body)
        statuses[status] = statuses.get(status, 0) + 1
        assert status in STATUSES, (status, answer, body)
        text = json.dumps(answer) if isinstance(answer, dict) else answer.decode()
        assert "Traceback" not in text and "uhd_jax/" not in text, text
        if status != 200:
            assert set(answer["error"]) == {"message", "type", "param", "code"}, answer
            assert "\n" not in answer["error"]["message"], answer

    send()
    return statuses


def main(url: str, count: str) -> None:
    """Against a server that is running: python tests/request_fuzz.py 127.0.0.1:PORT COUNT"""
    print(send_malformed(Running(None, int(url.rsplit(":", 1)[1]), None), int(count)))


if __name__ == "__main__":
    main(*sys.argv[1:])
