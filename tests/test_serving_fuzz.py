"""Malformed requests and hostile images: refused as documented, and afterwards all is as before."""

from __future__ import annotations

import pytest
from tiny_assistant import make_assistant

pytest.importorskip("starlette")

from request_fuzz import send_malformed
from serving import running

from uhd_jax.generation.engine import Engine
from uhd_jax.generation.shapes import Shapes

pytestmark = pytest.mark.usefixtures("unoptimised")


def test_malformed_requests():
    """Some hundred here; `tests/request_fuzz.py` sends as many as one likes to a server that is running."""
    engine = Engine(make_assistant(), Shapes(3, 1, (128, 300), (4,), (128, 1408)), modes=("16x", "4x"))
    engine.start()
    with running(engine, max_new_tokens=8, default_new_tokens=2) as server:
        before = server.chat()
        statuses = send_malformed(server, 150)
        assert sum(statuses.values()) >= 150 and statuses[400] > 50
        assert server.chat()[1]["choices"] == before[1]["choices"]
        assert server.send("GET", "/health") == (200, {"status": "ok"})
    engine.close()
    assert engine.running == engine.waiting == 0 and engine.broken is None
