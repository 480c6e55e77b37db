"""`uhd-jax train`: what is refused before anything is written, what a run leaves, full disks, bad and hanging data."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import tiny
from command_line import CONFIG, assert_one_line, call
from image_files import encode, photo

from uhd_jax.models import uhd

pytestmark = pytest.mark.usefixtures("unoptimised", "compiled_once")

ROOT = Path(__file__).parents[1]
PEAK = "--config.train.peak_flops=1e12"  # not to be measured


def records_file(folder, spoil):
    """Twelve records with an image each; `spoil` makes the bytes of the files."""
    lines = []
    for number in range(12):
        (folder / f"{number}.png").write_bytes(spoil(encode(photo(112, 112))))
        content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A photo."}]
        lines.append(json.dumps({"messages": messages, "images": [f"{number}.png"]}) + "\n")
    path = folder / "records.jsonl"
    path.write_text("".join(lines))
    return path


def config_on(source, file):
    """The tiny configuration with another source of its only stage."""
    file.write_text(CONFIG.replace('dict(source="digit_pages", options=dict(task="cell"))', source))
    return f"--config={file}"


@pytest.fixture(autouse=True)
def quick_loss(monkeypatch):
    monkeypatch.setattr(uhd, "loss_sums", tiny.quick_loss_sums)


@pytest.fixture
def in_a_process(compiled_once):
    """Starts the command line in a process of its own, after some lines of Python."""
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "JAX_COMPILATION_CACHE_DIR": compiled_once,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }

    def start(*arguments, before=""):
        quick = "import tiny\nfrom uhd_jax.models import uhd\nuhd.loss_sums = tiny.quick_loss_sums"
        script = f"{quick}\n{before}\nimport sys\nfrom uhd_jax.cli import main\nsys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", script, *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)

    return start


def test_a_tokenizer_that_was_deleted_comes_back(capsys, config_file, tmp_path):
    workdir = tmp_path / "run"
    kept = workdir / "tokenizer" / "tokenizer.json"
    argv = ("train", f"--config={config_file}", f"--workdir={workdir}", PEAK)
    assert call(capsys, *argv)[0] == 0
    written = kept.read_text()
    for more in ("--config.train.stages[0].steps=4", "--config.train.stages[0].steps=4"):  # goes on; is finished
        kept.unlink()
        kept.parent.rmdir()
        assert call(capsys, *argv, more)[0] == 0
        assert kept.read_text() == written


def test_data_of_a_later_stage_is_refused_before_anything_is_written(capsys, config_file, tmp_path):
    path = Path(config_file)
    later = 'dict(stage, name="later", data=dict(source="records", options=dict(path="nowhere.jsonl")))'
    path.write_text(path.read_text().replace("stages=(stage,)", f"stages=(stage, {later})"))
    workdir = tmp_path / "run"
    status, _, err = call(capsys, "train", f"--config={path}", f"--workdir={workdir}")
    assert status == 1
    assert_one_line(err, "nowhere.jsonl")
    assert not workdir.exists()


def test_images_that_all_fail_in_decoding_end_the_run(capsys, tmp_path):
    path = records_file(tmp_path, lambda data: data[:-100])
    config = config_on(f'dict(source="records", options=dict(path="{path}"))', tmp_path / "config.py")
    workdir = tmp_path / "run"
    status, _, err = call(capsys, "train", config, f"--workdir={workdir}", PEAK)
    assert status == 1 and not (workdir / "trained.json").exists()
    *said, last = err.splitlines()
    assert last.startswith("uhd-jax: error: step 3: 3 steps in a row had nothing to train on.")
    assert "samples_dropped_bad_image " in last and str(path) in last and "finite" not in err
    named = [line for line in said if line.startswith(f"{path}:")]
    assert len(named) == len(set(named)) <= 12 and any(line.startswith(f"{path}:1: ") for line in named)
    listed = [json.loads(line) for line in (workdir / "dropped.jsonl").read_text().splitlines()]
    assert [f"{one['where']}: {one['counter']}: {one['reason']}" for one in listed] == named


def test_a_full_disk_is_the_last_line_and_no_traceback_is_before_it(in_a_process, config_file, tmp_path):
    # No file may grow beyond 32 KiB: writes fail as they do on a full disk.
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (2**15, resource.RLIM_INFINITY))"
    argv = ("train", f"--config={config_file}", f"--workdir={tmp_path}/run", PEAK)
    _, err = (process := in_a_process(*argv, before=limit)).communicate(timeout=300)
    assert process.returncode == 1, err
    last = err.splitlines()[-1]
    assert last.startswith(f"uhd-jax: error: cannot write {tmp_path}/run/checkpoints") and "File too large" in last
    assert "Traceback" not in err and "absl" not in err


HANGING = """
import pathlib, time
from uhd_jax.data import sources
from uhd_jax.data.demo import DigitPages, DigitPagesOptions

class Hanging(DigitPages):
    def images(self, index):
        file = pathlib.Path({folder!r}, "decoded")
        with file.open("a") as decoded:
            decoded.write(".")
        while file.stat().st_size > 100:
            time.sleep(0.1)
        return super().images(index)

sources.SOURCES["hanging"] = sources.SourceKind(DigitPagesOptions, lambda options, limits: Hanging(options))
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_while_a_sample_hangs_saves_and_leaves(in_a_process, tmp_path, workers):
    file = tmp_path / "config.py"
    config = config_on('dict(source="hanging", options=dict(task="cell"))', file)
    file.write_text(textwrap.dedent(HANGING).format(folder=str(tmp_path)) + file.read_text())
    options = ("stages[0].steps=1000", "log_every=1", f"data_workers={workers}")
    options = [f"--config.train.{option}" for option in options]
    process = in_a_process("train", config, f"--workdir={tmp_path}/run", PEAK, *options)
    log = tmp_path / "run" / "metrics.jsonl"
    decoded = tmp_path / "decoded"
    before = None
    while process.poll() is None:  # until no more steps are made
        state = (decoded.exists() and decoded.stat().st_size > 100, log.exists() and log.stat().st_size)
        if all(state) and state == before:
            break
        before = state
        time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    steps = len(log.read_text().splitlines())
    assert f"interrupted: step {steps} is saved; start again to continue" in err.splitlines()
    assert "Traceback" not in err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [str(steps)]
