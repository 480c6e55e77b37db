"""Datasets on disk and ArrayRecord shards that lie in a bucket: the same samples as from the disk."""

import http.server
import logging
import pickle
import re
import shutil
import threading
import urllib.parse
from types import SimpleNamespace

import pytest
from test_source_formats import llava, opened  # noqa: F401 (llava is a fixture)

from uhd_jax.config import DataConfig
from uhd_jax.data.sources import SourceError, make_source
from uhd_jax.data.sources.local_copy import local_copy

fsspec = pytest.importorskip("fsspec")
SAMPLES = 8


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "uhd_jax" / "files"


def copies(cache):
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def same(source, other):
    return all(
        source.messages(index) == other.messages(index) and source.files(index) == other.files(index)
        for index in range(SAMPLES)
    )


@pytest.mark.parametrize(("name", "kind"), [("datasets on disk", "arrow"), ("ArrayRecord", "array_record")])
def test_a_bucket_is_copied_once(llava, tmp_path, cache, caplog, name, kind):  # noqa: F811
    """`memory://` stands for a bucket that is read through fsspec."""
    caplog.set_level(logging.INFO, "uhd_jax")
    local = opened(tmp_path / "local", name)
    folder = local.where(0).rpartition(":")[0] if kind == "arrow" else str(tmp_path / "local")
    address = f"memory://copied/{kind}"
    fsspec.filesystem("memory").put(folder, f"/copied/{kind}", recursive=True)
    source = make_source(DataConfig(kind, {"path": address}))
    assert same(source, llava) and source.where(0).startswith("memory://")
    made = copies(cache)
    assert len(made) == caplog.text.count("MiB to") >= 1
    assert same(pickle.loads(pickle.dumps(source)), llava)  # as a worker opens it
    assert copies(cache) == made and len(made) == caplog.text.count("MiB to")


def test_a_changed_file_is_copied_anew_and_a_damaged_copy_too(cache):
    system = fsspec.filesystem("memory")
    system.pipe("/changing/a", b"first")
    copy = local_copy("memory://changing/a")
    assert open(copy, "rb").read() == b"first" and local_copy("memory://changing/a") == copy
    with open(copy, "wb") as file:
        file.write(b"fi")
    assert open(local_copy("memory://changing/a"), "rb").read() == b"first"
    system.pipe("/changing/a", b"second")
    assert open(local_copy("memory://changing/a"), "rb").read() == b"second"
    assert len(copies(cache)) == 1


@pytest.mark.parametrize("key", [None, "ETag", "LastModified", "generation", "mtime"])
def test_a_file_that_changed_but_not_in_size_is_copied_anew(cache, monkeypatch, key):
    """What tells its states apart has another name in every file system; in memory it is the time it was made."""
    system, state = fsspec.filesystem("memory"), [1]
    if key:
        monkeypatch.setattr(
            type(system), "info", lambda self, path, **_: {"size": 5, "type": "file", key: f"{state[0]}"}
        )
    for number, content in enumerate((b"first", b"again"), 1):
        state[0] = number
        system.pipe("/same-size/a", content)
        assert open(local_copy("memory://same-size/a"), "rb").read() == content
        assert len(copies(cache)) == 1


def test_what_cannot_be_copied_is_named_and_leaves_nothing(cache, monkeypatch):
    fsspec.filesystem("memory").pipe("/full/a", b"12345")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4))
    with pytest.raises(SourceError, match=r"^memory://full/a: .*GiB left; set XDG_CACHE_HOME to a larger disk"):
        local_copy("memory://full/a")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))
    monkeypatch.setattr("uhd_jax.data.sources.files.DataFile.chunks", lambda self: [b"123"])
    with pytest.raises(SourceError, match=r"^memory://full/a: cannot be read \(3 of 5 bytes came\)"):
        local_copy("memory://full/a")
    assert copies(cache) == []
    with pytest.raises(SourceError, match="memory://full/b: cannot be read"):
        local_copy("memory://full/b")
    cache.joinpath("x").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "x"))
    with pytest.raises(SourceError, match=r"^memory://full/a: cannot be copied to .*Not a directory"):
        local_copy("memory://full/a")


class Bucket(http.server.BaseHTTPRequestHandler):
    """What Google's storage answers to those who read parts of an object."""

    protocol_version = "HTTP/1.1"
    asked: list[str] = []

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        name = next(
            name for name in fsspec.filesystem("memory").find("/in-place") if path.endswith(name.strip("/")[9:])
        )
        content = fsspec.filesystem("memory").cat_file(name)
        self.asked.append(asked := self.headers.get("Range", ""))
        first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or "bytes=0-").groups()
        start = int(first) if first else max(0, len(content) - int(last))
        part = content[start : int(last) + 1 if first and last else None]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_):
        pass


def test_array_record_is_read_in_place_from_google(llava, tmp_path, cache, monkeypatch):  # noqa: F811
    """The library's own reader asks a server that stands for Google's; fsspec lists what is there."""
    from fsspec.implementations.memory import MemoryFileSystem

    class Listed(MemoryFileSystem):
        """What gcsfs lists."""

        @classmethod
        def _strip_protocol(cls, path):
            return MemoryFileSystem._strip_protocol(path.replace("gs://", "memory://"))

        def unstrip_protocol(self, name):
            return "gs://" + name.lstrip("/")

    monkeypatch.setattr(
        fsspec, "filesystem", lambda name, real=fsspec.filesystem: Listed() if name == "gs" else real(name)
    )
    opened(tmp_path / "local", "ArrayRecord")
    fsspec.filesystem("memory").put(str(tmp_path / "local"), "/in-place/packed", recursive=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        source = make_source(DataConfig("array_record", {"path": "gs://in-place/packed"}))
        assert len(source) == SAMPLES and same(source, llava)
        assert source.where(0).startswith("gs://in-place/packed/")
    finally:
        server.shutdown()
        server.server_close()
    assert Bucket.asked and not cache.exists()
