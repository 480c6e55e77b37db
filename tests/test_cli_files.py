"""Files and folders that a command is told to write to or read from: wrong ones are named before any work is done."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from command_line import assert_one_line, call

import uhd_jax
from uhd_jax.cli.common import write_json

COMMANDS = {
    "slices": ["slices", "image.png"],
    "generate": ["generate", "--checkpoint=model", "--prompt=x"],
    "evaluate": ["evaluate", "--checkpoint=model", "--task=digit_pages"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("out", "part"),
    [
        ("", "'' is not the name of a file"),
        (".", "'.' is not the name of a file"),
        ("nodir/x.out", "'nodir/x.out': there is no folder nodir; make it first"),
        ("file/x.out", "'file/x.out': there is no folder file; make it first"),
    ],
)
def test_a_result_without_a_place(capsys, tmp_path, monkeypatch, command, out, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setitem(vars(uhd_jax), "load", lambda directory: pytest.fail("worked in vain"))
    status, _, err = call(capsys, *COMMANDS[command], f"--out={out}")
    assert status == 2
    assert_one_line(err, "--out", part)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("workdir", "part"),
    [
        ("file", "'file' cannot be a folder: file is a file"),
        ("file/run", "'file/run' cannot be a folder: file is a file"),
        ("", "'' is not the name of a folder"),
    ],
)
def test_a_workdir_that_can_be_no_folder(capsys, tmp_path, monkeypatch, config_file, workdir, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    status, _, err = call(capsys, "train", f"--config={config_file}", f"--workdir={workdir}")
    assert status == 2
    assert_one_line(err, "--workdir", part)


@pytest.mark.parametrize("command", ["generate", "evaluate"])
@pytest.mark.parametrize(("name", "part"), [("file", "file is a file"), ("nowhere", "nowhere does not exist")])
def test_a_checkpoint_that_is_no_folder(capsys, tmp_path, command, name, part):
    (tmp_path / "file").write_text("")
    argv = [COMMANDS[command][0], f"--checkpoint={tmp_path / name}", *COMMANDS[command][2:], f"--out={tmp_path}/a.json"]
    status, _, err = call(capsys, *argv)
    assert status == 1
    assert_one_line(err, part)
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(("name", "part"), [("file", "file: is not a folder"), ("nowhere", "nowhere: is not a folder")])
def test_a_report_of_what_is_no_folder(capsys, tmp_path, name, part):
    (tmp_path / "file").write_text("")
    status, _, err = call(capsys, "report", str(tmp_path / name))
    assert status == 1
    assert_one_line(err, part)


def test_an_error_of_writing_names_the_file_that_was_meant(tmp_path):
    (tmp_path / ".result.json.partial").mkdir()
    with pytest.raises(OSError) as caught:
        write_json(tmp_path / "result.json", {})
    assert caught.value.filename == str(tmp_path / "result.json")
    with pytest.raises(OSError) as caught:
        write_json("/dev/full", {})
    assert caught.value.filename == "/dev/full"


def test_a_name_that_is_not_utf8_is_written_as_its_json_escape(tmp_path):
    value = {"file": os.fsdecode(b"\xff.png"), "answer": "héllo 😀"}
    write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == value


def test_a_result_may_go_to_the_output_of_a_pipeline():
    code = "from uhd_jax.cli.common import write_json; write_json('/dev/stdout', [1])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert json.loads(done.stdout) == [1]
