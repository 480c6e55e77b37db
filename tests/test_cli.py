"""The command line as a whole: help, exit statuses, that every mistake is answered by one clear line, whole results."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from command_line import assert_one_line, call

import uhd_jax
from uhd_jax.cli import COMMANDS, main
from uhd_jax.cli.common import whole_file, write_json
from uhd_jax.config import ConfigError


def test_help_lists_every_command(capsys):
    for argv in ((), ("--help",)):
        status, out, _ = call(capsys, *argv)
        assert status == 0
        assert [line.split()[0] for line in out.splitlines() if line.startswith("  ") and "--" not in line] == list(
            COMMANDS
        )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists_and_explains_itself(capsys, command):
    status, out, _ = call(capsys, command, "--help")
    assert status == 0
    assert out.startswith(f"usage: uhd-jax {command}")


def test_version(capsys):
    assert call(capsys, "--version") == (0, f"uhd-jax {uhd_jax.__version__}\n", "")


def test_unknown_command(capsys):
    status, _, err = call(capsys, "dance")
    assert status == 2
    assert_one_line(err, "'dance'", "slices")


def test_unknown_flag(capsys):
    status, _, err = call(capsys, "slices", "--size=100x100", "--colour=red")
    assert status == 2
    assert_one_line(err, "--colour=red")


def test_flags_are_not_abbreviated(capsys):
    assert call(capsys, "slices", "--siz=100x100")[0] == 2


def test_light_commands_do_not_import_jax():
    """Measured on two cores: 0.2 s instead of 2 s and more."""
    code = (
        "import sys, uhd_jax; from uhd_jax.cli import main; "
        "main(['--help']); main(['slices', '--size=800x600']); "
        "sys.exit(sorted({'jax', 'flax', 'orbax', 'matplotlib', 'transformers'} & set(sys.modules)) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_errors_of_the_project_are_one_line_and_others_keep_their_traceback(capsys, monkeypatch):
    from uhd_jax.cli import slices

    def run(arguments, config):
        raise ConfigError("first\nsecond")

    monkeypatch.setattr(slices, "run", run)
    status, _, err = call(capsys, "slices", "--size=1x1")
    assert status == 1
    assert_one_line(err, "uhd-jax: error: first second")
    status, _, err = call(capsys, "slices", "--size=1x1", "--traceback")
    assert status == 1 and "Traceback" in err

    def bug(arguments, config):
        raise ZeroDivisionError

    monkeypatch.setattr(slices, "run", bug)
    with pytest.raises(ZeroDivisionError):
        main(["slices", "--size=1x1"])


def test_interrupt(capsys, monkeypatch):
    from uhd_jax.cli import slices

    def run(arguments, config):
        raise KeyboardInterrupt

    monkeypatch.setattr(slices, "run", run)
    assert call(capsys, "slices", "--size=1x1")[0] == 130


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m uhd_jax slices --help | head -n 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("usage") and "Traceback" not in done.stderr


def test_a_result_is_whole_or_absent(tmp_path):
    path = tmp_path / "result.json"
    with pytest.raises(ZeroDivisionError), whole_file(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with whole_file(path) as partial:
        partial.write_text("whole")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("result.json", "whole")]


def test_a_result_never_replaces_what_is_no_regular_file(tmp_path):
    target, link = tmp_path / "real.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    write_json(link, {"a": 1})
    assert link.is_symlink() and json.loads(target.read_text()) == {"a": 1}
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR)  # so that writing does not wait for a reader
    write_json(pipe, {"a": 1})
    assert pipe.is_fifo() and json.loads(os.read(reader, 100)) == {"a": 1}
    os.close(reader)
