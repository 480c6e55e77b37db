"""Malformed requests and hostile images: refused as documented, and afterwards all is as before."""

from __future__ import annotations

import pytest

pytest.importorskip("starlette")

from request_fuzz import Fuzz, tiny_server

pytestmark = pytest.mark.usefixtures("unoptimised")


def test_malformed_requests(caplog):
    """Some here; `python tests/request_fuzz.py` sends 10,000."""
    with tiny_server() as server:
        before = server.chat()
        fuzz = Fuzz(server)
        fuzz.run(100)
        kinds = fuzz.table()
        assert sum(fuzz.counts.values()) >= 100 and all(kinds.values()) and kinds["fields"]["400"] > 20
        assert server.chat()[1]["choices"] == before[1]["choices"]
        assert server.send("GET", "/health") == (200, {"status": "ok"})
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
