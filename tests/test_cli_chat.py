"""`uhd-jax chat` through a pipe, and `uhd-jax serve` as a process of its own."""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import re
import signal
import subprocess
import sys

import pytest
from command_line import assert_one_line, call
from PIL import Image
from tiny_assistant import SMALL, WIDE, make_assistant

from uhd_jax.checkpoint import save_model
from uhd_jax.cli import serve
from uhd_jax.generation import shapes

pytestmark = pytest.mark.usefixtures("unoptimised")


@pytest.fixture(scope="module")
def model():
    return make_assistant()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A saved model beside two images."""
    folder = tmp_path_factory.mktemp("chat")
    save_model(folder / "model", model.params, model.config)
    (folder / "model" / "tokenizer").mkdir()
    model.tokenizer.save(folder / "model" / "tokenizer")
    Image.fromarray(WIDE).save(folder / "wide.png")
    Image.fromarray(SMALL).save(folder / "small.png")
    return folder


def chat(capsys, monkeypatch, folder, *lines, options=()):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    checkpoint = f"--checkpoint={folder / 'model'}"
    return call(capsys, "chat", checkpoint, "--max-new-tokens=8", *options)


def turn(text, *images):
    return {
        "role": "user",
        "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}],
    }


def test_a_conversation(capsys, monkeypatch, folder, model):
    lines = ("What?", f"/image {folder / 'small.png'}", "And now?", "/reset", "What?", "/quit", "never read")
    options = (f"--image={folder / 'wide.png'}",)
    status, out, err = chat(capsys, monkeypatch, folder, *lines, options=options)
    assert (status, err) == (0, "")
    first = model.generate([turn("What?", WIDE)], max_new_tokens=8)
    second = [turn("What?", WIDE), {"role": "assistant", "content": first}, turn("And now?", SMALL)]
    again = model.generate([turn("What?")], max_new_tokens=8)
    pieces = [first, model.generate(second, max_new_tokens=8), again]
    assert "[wide.png: 100x240, " in out and "[small.png: 40x60, 1 views, 4 visual tokens]" in out
    at = 0
    for piece in pieces:
        at = out.index(piece, at) + len(piece)


def test_slices_are_told_and_drawn(capsys, monkeypatch, folder, tmp_path):
    lines = ("/slices", f"/image {folder / 'wide.png'}", "/slices", f"/image {folder / 'small.png'}")
    status, out, _ = chat(
        capsys, monkeypatch, folder, *lines, f"/slices {tmp_path / 'cut.png'}", options=["--max-slices=2"]
    )
    assert status == 0 and "error: there is no image in this conversation" in out
    assert re.search(r"1. .*wide.png: 100x240, 1x2 slices .rows x cols., \d+ visual tokens", out)
    assert Image.open(tmp_path / "cut-1.png").width == Image.open(tmp_path / "cut-2.png").width > 1000


def test_mistakes_change_nothing(capsys, monkeypatch, folder):
    lines = ("/image", "/image nothing.png", "/nonsense", "", "x" * 40_000, "/help")
    status, out, err = chat(capsys, monkeypatch, folder, *lines)
    assert (status, err) == (0, "")
    for part in (
        "/image needs the name of a file",
        "nothing.png: no such file",
        "there is no /nonsense",
        "/reset begins",
    ):
        assert part in out
    assert "max_length=32768; shorten it or lower max_slices; /reset begins anew" in out


def test_a_server_ends_what_it_began(folder, model, tmp_path):
    """As a process: started, asked, told to stop in the middle of an answer, killed and started again."""
    openai = pytest.importorskip("openai")
    command = [sys.executable, "-m", "uhd_jax", "serve", f"--checkpoint={folder / 'model'}", "--port=0"]
    command += ["--rows=2", "--max-length=300", "--name=tiny"]
    environment = os.environ | {"UHD_JAX_API_KEY": "secret", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def start():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        line = process.stdout.readline()
        match = re.fullmatch(r"serving tiny at (http://127.0.0.1:\d+/v1)\n", line)
        assert match, (line, process.stderr.read())
        return process, openai.OpenAI(base_url=match[1], api_key="secret", max_retries=0)

    def ask(client, **options):
        messages = [{"role": "user", "content": "Hello"}]
        return client.chat.completions.create(model="tiny", messages=messages, max_tokens=200, **options)

    process, client = start()
    expected = model.generate("Hello", max_new_tokens=200)
    assert ask(client).choices[0].message.content == expected
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    process, client = start()
    stream = ask(client, stream=True)
    text = next(stream).choices[0].delta.content
    process.send_signal(signal.SIGTERM)
    text += "".join(event.choices[0].delta.content or "" for event in stream)
    assert text == expected
    assert process.wait(30) == 0
    assert "Traceback" not in process.stderr.read()


def test_a_server_over_a_mesh(model, monkeypatch):
    """Eight devices give the tokens of one."""
    pytest.importorskip("starlette")
    from serving import question, running

    of_a_server = shapes.serving_shapes
    fewer = {"views": (4,), "patches": (128,)}  # programs to compile
    monkeypatch.setattr(shapes, "serving_shapes", lambda *given: dataclasses.replace(of_a_server(*given), **fewer))
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    arguments = parser.parse_args(["--checkpoint=x", "--mesh=data=2,fsdp=2,tensor=2", "--rows=3", "--max-length=128"])
    engine = serve._engine(make_assistant(), arguments)
    assert engine.shapes.rows == engine.shapes.prefill_rows == 4
    assert len(engine._runner._state.cache["key"].sharding.device_set) == 8
    engine.start()
    with running(engine) as server:
        for text, images in (("Hello", []), ("What?", [WIDE])):
            status, answer = server.chat(messages=question(text, *images), max_tokens=12)
            expected = model.generate(text, images, max_new_tokens=12)
            assert status == 200 and answer["choices"][0]["message"]["content"] == expected
    engine.close()


def test_impossible_servers(capsys, folder, tmp_path):
    (tmp_path / "key").write_text("\n")
    checkpoint = f"--checkpoint={folder / 'model'}"
    for option, part in (
        ("--port=70000", "is not a port"),
        ("--modes=3x", "is not a list of 16x, 4x"),
        ("--mesh=4", "is not sizes of data, fsdp and tensor"),
        ("--allow-host=https://x.example", "is not a host's name"),
        ("--rows=0", "is not a whole number from 1"),
        (f"--api-key-file={tmp_path / 'key'}", "is empty"),
    ):
        status, _, err = call(capsys, "serve", checkpoint, option)
        assert status == 2
        assert_one_line(err, part)
    status, _, err = call(capsys, "serve", f"--checkpoint={tmp_path / 'none'}")
    assert status == 1
    assert_one_line(err, "does not exist")
