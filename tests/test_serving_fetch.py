"""Images by URL: what is known to get around lists of allowed hosts."""

from __future__ import annotations

import http.server
import threading
import time

import pytest

from uhd_jax.serving import fetch as fetching
from uhd_jax.serving.errors import ApiError
from uhd_jax.serving.fetch import fetch, resolve
from uhd_jax.serving.settings import Settings

pytest.importorskip("pydantic")


class Pages(http.server.BaseHTTPRequestHandler):
    asked: list[tuple[str, str]] = []

    def do_GET(self):  # noqa: N802
        self.asked.append((self.path, self.headers["Host"]))
        status = 302 if self.path == "/redirect" else 404 if self.path == "/nothing" else 200
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1/secret")
        if self.path != "/slow-head":
            self.end_headers()
        if self.path == "/large":
            self.wfile.write(b"x" * 2000)
        elif self.path == "/slow-head":
            self.flush_headers()
            for _ in range(20):
                self.wfile.write(b"X-Slow: x\r\n")
                self.wfile.flush()
                time.sleep(0.05)
        elif self.path == "/slow":
            for _ in range(20):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)
        else:
            self.wfile.write(b"content")

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def port():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


@pytest.fixture
def settings(port):
    hosts = ("images.example", f"images.example:{port}")
    return Settings("tiny", fetch_hosts=hosts, fetch_bytes=1000, fetch_seconds=0.4)


@pytest.fixture
def public(monkeypatch):
    """The page server passes for a public one."""
    monkeypatch.setattr(fetching, "resolve", lambda host, port: "127.0.0.1")
    Pages.asked.clear()


def test_an_allowed_image(public, port, settings):
    assert fetch(f"HTTP://Images.Example:{port}/a.png?x=1#part", settings) == b"content"
    assert Pages.asked == [("/a.png?x=1", f"images.example:{port}")]


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("redirect", "status 302; redirects are not followed"),
        ("nothing", "status 404"),
        ("large", "more than 1000 bytes"),
        ("slow", "longer than 0.4 seconds"),
        ("slow-head", "longer than 0.4 seconds"),
    ],
)
def test_what_an_allowed_host_may_not_do(public, port, settings, path, part):
    with pytest.raises(ApiError, match=part) as error:
        fetch(f"http://images.example:{port}/{path}", settings)
    assert error.value.status == 400 and len(Pages.asked) == 1


@pytest.mark.parametrize(
    "url",
    [
        "http://images.example@127.0.0.1/",
        "http://127.0.0.1#@images.example/",
        "http://127.0.0.1\\@images.example/",
        "http://images.example\\@127.0.0.1/",
        "http://images.example.evil.example/",
        "http://evil.example/images.example",
        "http://images.example:22/",
        "http://images.example:99999999/",
        "http://127.0.0.1/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://0177.0.0.1/",
        "http://127.1/",
        "http://user:word@images.example/",
        "http://images.example:80@127.0.0.1/",
        "http://images.example%2e127.0.0.1/",
        "http://localhost/",
        "http://images.example。evil.example/",
        "http://ｉmages.example/",
        "http://images.example\t/",
        "http://images.example/a b",
        "http://images.example/a\r\nHost: x",
        "http:///images.example/",
        "http:images.example/",
        "ftp://images.example/",
        "file:///etc/passwd",
        "gopher://images.example/",
        "https://images.example:80/",
        "http://images.example./",
        "",
    ],
)
def test_urls_that_lead_elsewhere(public, settings, url):
    with pytest.raises(ApiError):
        fetch(url, settings)
    assert Pages.asked == []


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["93.184.216.34", "10.0.0.1"],
        ["169.254.169.254"],
        ["192.168.1.1"],
        ["100.64.0.1"],
        ["0.0.0.0"],
        ["224.0.0.1"],
        ["::1"],
        ["fe80::1%eth0"],
        ["fd00::1"],
        ["::ffff:169.254.169.254"],
        ["::127.0.0.1"],
        ["64:ff9b::10.0.0.1"],
        ["64:ff9b:1::10.0.0.1"],
        ["2002:7f00:1::1"],
        ["2001:0:5ef5:79fd::1"],
        ["fec0::1"],
        ["ff02::1"],
        ["::"],
        ["240.0.0.1"],
    ],
    ids=str,
)
def test_names_of_private_addresses(monkeypatch, addresses):
    found = [(None, None, None, None, (address, 80)) for address in addresses]
    monkeypatch.setattr(fetching.socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(ApiError, match="an address that is not a public one"):
        resolve("images.example", 80)


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:93.184.216.34"])
def test_public_addresses(monkeypatch, address):
    monkeypatch.setattr(fetching.socket, "getaddrinfo", lambda *_, **__: [(None, None, None, None, (address, 80))])
    assert resolve("images.example", 80) == address


def test_the_address_that_was_checked_is_connected_to(monkeypatch, settings):
    """A name that is resolved again would lead to a private address the second time."""
    asked = []

    def lookup(*arguments, **_):
        asked.append(arguments)
        address = "93.184.216.34" if len(asked) == 1 else "127.0.0.1"
        return [(None, None, None, None, (address, 80))]

    def connect(address, timeout):
        assert address == ("93.184.216.34", 80)
        raise ConnectionRefusedError

    monkeypatch.setattr(fetching.socket, "getaddrinfo", lookup)
    monkeypatch.setattr(fetching.socket, "create_connection", connect)
    with pytest.raises(ApiError, match="could not be read .ConnectionRefusedError"):
        fetch("http://images.example/a.png", settings)
    assert len(asked) == 1
