"""The commands around a model: train, generate."""

from __future__ import annotations

import io
import json
import os
import sys

import pytest
from command_line import assert_one_line, call

import uhd_jax
from uhd_jax.cli import main


def test_commands_that_need_a_configuration_say_so(capsys):
    for argv in (("cost", "--image-size=3x3"), ("train", "--workdir=nowhere")):
        status, _, err = call(capsys, *argv)
        assert status == 2
        assert_one_line(err, "--config")


@pytest.mark.parametrize(
    ("flag", "part"),
    [
        ("--temperature=-1", "'-1'"),
        ("--temperature=nan", "'nan'"),
        ("--repetition-penalty=0", "'0' is not a number above 0"),
        ("--top-p=0", "'0'"),
        ("--top-p=1.5", "'1.5'"),
        ("--top-k=-1", "'-1'"),
        ("--max-new-tokens=0", "'0'"),
        ("--seed=x", "'x'"),
        ("--seed=4294967296", "'4294967296' is not a whole number from 0 to 2147483647"),
        ("--max-new-tokens=4294967296", "'4294967296' is not a whole number from 1 to 2147483647"),
        ("--config=x.py", "--config=x.py"),
    ],
)
def test_generate_refuses_senseless_values(capsys, flag, part):
    status, _, err = call(capsys, "generate", "--checkpoint=none", "--prompt=x", flag)
    assert status == 2
    assert_one_line(err, part)


class Echo:
    """Stands in for a loaded model."""

    def generate(self, prompt, images, stream, **options):
        for word in ("four", " two"):
            if stream:
                stream(word)
        self.seen = (prompt, images, options)
        return "four two"


def test_generate_streams_or_prints_json(capsys, monkeypatch, tmp_path):
    echo = Echo()
    monkeypatch.setitem(vars(uhd_jax), "load", lambda directory: echo)
    argv = ("generate", "--checkpoint=c", "--prompt=What?", "--image=a.png", "--image", "b.png", "--top-k=3")
    assert call(capsys, *argv) == (0, "four two\n", "")
    assert echo.seen[:2] == ("What?", ["a.png", "b.png"]) and echo.seen[2]["top_k"] == 3
    assert echo.seen[2]["thinking"] is None and echo.seen[2]["videos"] == []
    assert (echo.seen[2]["beams"], echo.seen[2]["stop"], echo.seen[2]["repetition_penalty"]) == (1, [], 1.0)
    call(capsys, *argv, "--beams=3", "--stop=a", "--stop=b", "--repetition-penalty=1.2")
    assert (echo.seen[2]["beams"], echo.seen[2]["stop"]) == (3, ["a", "b"])
    assert echo.seen[2]["repetition_penalty"] == 1.2
    out = call(capsys, *argv, "--video=c.mp4", "--no-thinking", "--json", f"--out={tmp_path / 'answer.json'}")[1]
    assert echo.seen[2]["thinking"] is False and echo.seen[2]["videos"] == ["c.mp4"]
    asked = {"prompt": "What?", "images": ["a.png", "b.png"], "videos": ["c.mp4"]}
    assert json.loads(out) == asked | {"answer": "four two"}
    assert json.loads((tmp_path / "answer.json").read_text()) == json.loads(out)


def test_generate_shows_what_the_output_can_and_keeps_the_rest(monkeypatch, tmp_path):
    class Foreign:
        def generate(self, prompt, images, stream, **options):
            return (stream or str)("h\u00e9 \U0001f600") or "h\u00e9 \U0001f600"

    monkeypatch.setitem(vars(uhd_jax), "load", lambda directory: Foreign())
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    image = os.fsdecode(b"\xff.png")
    argv = ["generate", "--checkpoint=c", "--prompt=h\u00e9?", f"--image={image}", f"--out={tmp_path / 'a.json'}"]
    assert main(argv) == main([*argv, "--json"]) == 0
    sys.stdout.flush()
    answer, printed = sys.stdout.buffer.getvalue().decode("ascii").splitlines()
    assert answer == "h? ?"
    expected = {"prompt": "h\u00e9?", "images": [image], "videos": [], "answer": "h\u00e9 \U0001f600"}
    assert json.loads(printed) == json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == expected


def test_train_then_answer(capsys, config_file, image_file, tmp_path):
    workdir = tmp_path / "run"
    argv = ("train", f"--config={config_file}", f"--workdir={workdir}", "--config.model.dtype=float32")
    assert call(capsys, *argv)[0] == 0
    trained = json.loads((workdir / "trained.json").read_text())
    assert (trained["name"], trained["steps"], trained["seed"]) == ("plain", 3, 0)

    # Another configuration is refused and leaves the finished run as it was.
    status, _, err = call(capsys, *argv, "--config.train.seed=1")
    assert status == 1 and "train.seed" in err.splitlines()[-1]
    assert json.loads((workdir / "trained.json").read_text()) == trained

    # More steps continue the run.
    assert call(capsys, *argv, "--config.train.stages[0].steps=4")[0] == 0
    assert json.loads((workdir / "trained.json").read_text())["steps"] == 4

    ask = ("generate", f"--checkpoint={workdir}", "--prompt=?", "--max-new-tokens=3", "--max-slices=1")
    status, out, _ = call(capsys, *ask, f"--image={image_file}", "--json")
    assert status == 0
    assert set(json.loads(out)) == {"prompt", "images", "videos", "answer"}

    status, _, err = call(capsys, *ask, "--image=missing.png")
    assert status == 1 and "missing.png" in err.splitlines()[-1]


def test_generate_without_a_model(capsys, tmp_path):
    status, _, err = call(capsys, "generate", f"--checkpoint={tmp_path}", "--prompt=?")
    assert status == 1
    assert_one_line(err, str(tmp_path))


def test_train_names_a_source_that_does_not_exist(capsys, config_file, tmp_path):
    argv = ("train", f"--config={config_file}", f"--workdir={tmp_path / 'run'}")
    status, _, err = call(capsys, *argv, "--config.train.stages[0].data.source=dreams")
    assert status == 1
    assert_one_line(err, "config.train.stages[0].data.source: 'dreams'")
    assert not (tmp_path / "run").exists()
