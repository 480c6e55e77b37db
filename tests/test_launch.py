"""launch/quickstart.sh: its steps, interruptions and messages, with a stand-in for the program that really works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"

# Trains for five short steps, saves on SIGTERM, notes its calls; the other commands write their results.
STAND_IN = """#!{python}
import os, signal, sys, time
command, *rest = sys.argv[1:]
flags = dict(part[2:].split("=", 1) for part in rest if part.startswith("--") and "=" in part)
out = flags.get("workdir") or os.path.dirname(flags.get("out", "")) or rest[0]
with open(os.environ["CALLS"], "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")

def write(path, text="x"):
    with open(path, "w") as file:
        file.write(text)

if command == "train":
    busy = os.path.join(out, "busy")
    os.close(os.open(busy, os.O_CREAT | os.O_EXCL))  # two at work in one folder would spoil each other's checkpoints
    saved = os.path.join(out, "saved")
    step, stop = int(open(saved).read()) if os.path.exists(saved) else 0, []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    while step < 5 and not stop:
        time.sleep(0.2)
        step += 1
        write(os.path.join(out, "metrics.jsonl"))
    write(saved, str(step))
    os.remove(busy)
    if step == 5:
        write(os.path.join(out, "trained.json"))
elif command == "evaluate":
    write(os.path.join(out, "page.png"))
    write(flags["out"])
elif command == "report":
    write(os.path.join(out, "report.json"), open(os.path.join(out, "elapsed.txt")).read())
else:
    write(flags["out"])
"""


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """Starts the script in a folder of its own; `calls()` lists what it has run."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    program = venv / "bin" / "uhd-jax"
    program.write_text(STAND_IN.replace("{python}", sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("VENV_DIR", str(venv))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    digest = 'source "$0" && install_digest "" > "$VENV_DIR/.installed"'
    subprocess.run(["bash", "-c", digest, str(LAUNCH / "common.sh")], check=True)
    out = tmp_path / "out"

    def start(*argv):
        command = ["bash", str(LAUNCH / "quickstart.sh"), "--out", "out", *argv]
        return subprocess.Popen(
            command,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # Tests started in the background of a script ignore SIGINT, and so would what they start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def calls():
        return [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()]

    def wait_until_training():
        for _ in range(100):
            if (out / "metrics.jsonl").exists():
                return
            time.sleep(0.1)
        raise AssertionError("training did not start")

    start.out, start.calls, start.wait_until_training = out, calls, wait_until_training
    return start


def finish(process):
    text, _ = process.communicate(timeout=60)
    return process.returncode, text


EVERY_STEP = ["train", "evaluate", "slices", "generate", "report"]


def test_every_step_runs_once(quickstart):
    status, text = finish(quickstart("--seed", "3"))
    assert status == 0, text
    assert quickstart.calls() == EVERY_STEP
    assert "--config.train.seed=3" in (quickstart.out.parent / "calls").read_text()
    status, text = finish(quickstart("--seed=3"))
    assert status == 0 and quickstart.calls() == EVERY_STEP
    assert text.count("done before") == len(EVERY_STEP)
    steps = [line.split()[0] for line in (quickstart.out / "elapsed.txt").read_text().splitlines()]
    assert steps == ["install", *EVERY_STEP, "install"]


def test_a_lost_result_is_made_again_and_the_report_with_it(quickstart):
    finish(quickstart())
    (quickstart.out / "slices.png").unlink()
    assert finish(quickstart())[0] == 0
    assert quickstart.calls() == [*EVERY_STEP, "slices", "report"]


def test_control_and_short(quickstart):
    assert finish(quickstart("--control", "--short"))[0] == 0
    assert quickstart.calls() == ["train", "evaluate", "slices", "generate", "train", "evaluate", "report"]
    lines = (quickstart.out.parent / "calls").read_text().splitlines()
    assert "configs/demo.py:thumbnail" in lines[4] and f"--workdir={quickstart.out}/control" in lines[4]
    assert all("--config.train.stages[3].steps=" in lines[i] for i in (0, 4))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("whole_group", [False, True])
def test_interrupted_and_started_again(quickstart, number, whole_group):
    """A signal to the script, or to all of the terminal's foreground group as Ctrl-C sends it."""
    process = quickstart()
    quickstart.wait_until_training()
    (os.killpg if whole_group else os.kill)(process.pid, number)
    status, text = finish(process)
    assert status == 130 and "Start the same command again" in text
    assert 0 < int((quickstart.out / "saved").read_text()) < 5
    assert not (quickstart.out / "running.txt").exists()
    assert finish(quickstart())[0] == 0
    assert quickstart.calls() == ["train", *EVERY_STEP]


def test_killed_and_started_again(quickstart):
    process = quickstart()
    quickstart.wait_until_training()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (quickstart.out / "running.txt").read_text().startswith("train ")
    status, text = finish(quickstart())
    assert status == 0, text
    assert quickstart.calls() == ["train", *EVERY_STEP]
    lines = (quickstart.out / "elapsed.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["install", "train", "install", *EVERY_STEP]


def test_training_that_leaves_early_is_not_taken_for_finished(quickstart):
    process = quickstart()
    quickstart.wait_until_training()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGTERM)
    status, text = finish(process)
    assert status == 1 and "ended early" in text


def test_a_failing_step_stops_everything(quickstart):
    program = quickstart.out.parent / "venv" / "bin" / "uhd-jax"
    program.write_text("#!/bin/sh\necho no disk >&2\nexit 3\n")
    status, text = finish(quickstart())
    assert status == 1
    assert "no disk" in text and "failed with exit status 3" in text


def test_results_of_different_settings_do_not_mix(quickstart):
    finish(quickstart())
    status, text = finish(quickstart("--seed", "1"))
    assert status == 1 and "seed=0" in text and "--out" in text
    assert quickstart.calls() == EVERY_STEP


@pytest.mark.parametrize("argv", [["--seed"], ["--seed=x"], ["--out"], ["--fast"]])
def test_wrong_arguments(quickstart, argv):
    status, text = finish(quickstart(*argv))
    assert status == 1 and "error:" in text


def test_an_old_python_is_named(quickstart, tmp_path, monkeypatch):
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(old))
    monkeypatch.setenv("VENV_DIR", str(tmp_path / "none"))
    status, text = finish(quickstart())
    assert status == 1 and str(old) in text and "3.11" in text


def test_a_missing_venv_module_is_named(quickstart, tmp_path, monkeypatch):
    bare = tmp_path / "python3"
    bare.write_text(f'#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(bare))
    monkeypatch.setenv("VENV_DIR", str(tmp_path / "none"))
    status, text = finish(quickstart())
    assert status == 1 and "python3-venv" in text
    assert not (tmp_path / "none").exists()
