"""The demo's road in small, as a user walks it: train, kill, resume, answer, refuse; real pages, packing, prefetch."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEPS = 4
STAGES = ("cells", "views", "pages", "questions")
OPTIONS = [f"--config.train.stages[{index}].steps={STEPS}" for index in range(4)]
OPTIONS += [f"--config.train.stages[{index}].warmup_steps=1" for index in range(4)]
OPTIONS += ["--config.train.log_every=1", "--config.train.checkpoint_every=3"]
# Little work per step, and two buckets for the pages, so that batches of different shapes take turns.
SMALL = [f"--config.train.stages[{index}].rows=2" for index in range(4)]
SMALL += ["--config.train.stages[2].buckets=()", "--config.train.stages[2].packed_length=96"]
SMALL += ["--config.train.stages[2].slots=7", "--config.train.packing_window=24"]


@pytest.fixture(scope="module")
def run(compiled_once):
    """Calls the command line in a process of its own; programs are compiled once for all calls."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": compiled_once,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PLATFORMS": "cpu",
    }

    def start(*arguments) -> subprocess.Popen:
        command = [sys.executable, "-m", "uhd_jax", *map(str, arguments)]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def call(*arguments) -> tuple[int, str, str]:
        process = start(*arguments)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    call.start = start
    return call


def _train(workdir: Path) -> list[str]:
    return ["train", "--config=configs/demo.py", f"--workdir={workdir}", *OPTIONS, *SMALL]


def _records(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """A run that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("whole")
    status, _, err = run(*_train(workdir))
    assert status == 0, err
    return workdir


def test_every_stage_runs_and_compiles_once_per_bucket(whole):
    records = _records(whole)
    assert [record["stage"] for record in records] == [name for name in STAGES for _ in range(STEPS)]
    last = {record["stage"]: record for record in records}
    assert {name: last[name]["compilations"] for name in ("cells", "views", "questions")} == dict.fromkeys(
        ("cells", "views", "questions"), 1
    )
    assert 1 <= last["pages"]["compilations"] <= 2
    for key in ("tokens_per_second", "images_per_second", "data_wait_fraction", "flop_utilisation", "grad_norm"):
        assert all(record[key] > 0 for record in records), key
    for key in ("padding_waste_tokens", "padding_waste_slots", "padding_waste_patches"):
        assert all(0 <= record[key] < 1 for record in records), key
    assert json.loads((whole / "trained.json").read_text())["steps"] == 4 * STEPS
    assert list((whole / "tensorboard").glob("events*"))


def test_killed_anywhere_and_resumed_has_the_same_losses_bit_for_bit(run, whole, tmp_path):
    kill = random.randrange(1, 4 * STEPS)
    process = run.start(*_train(tmp_path))
    while process.poll() is None and len(_records(tmp_path)) < kill:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    status, _, err = run(*_train(tmp_path))
    assert status == 0, (kill, err)
    found, expected = (
        [(record["step"], record["loss"], record["grad_norm"]) for record in _records(folder)]
        for folder in (tmp_path, whole)
    )
    assert found == expected, kill


def test_a_finished_run_answers(run, whole):
    page = whole / "page.png"
    scores = f"--out={whole}/evaluation.json"
    status, out, err = run("evaluate", f"--checkpoint={whole}", "--task=digit_pages", "--limit=40", scores)
    assert status == 0 and page.exists(), err
    result = json.loads((whole / "evaluation.json").read_text())
    # 8 pages transcribed in both views, 8 with a question in both views, 8 more transcribed with slices.
    assert len(result["answers"]) == 24 and result["pages"] == 16 and result["digits"] > 100
    for key in ("accuracy_with_slices", "accuracy_thumbnail_only", "questions_with_slices", "questions_thumbnail_only"):
        assert 0 <= result[key] <= 1, key
    assert 0.1 < result["chance"] < 0.2
    asked = ["generate", f"--checkpoint={whole}", f"--image={page}", f"--image={page}", "--prompt=<image> <slice>?"]
    status, out, err = run(*asked, "--json", "--max-new-tokens=5")
    assert status == 0, err
    assert set(json.loads(out)) >= {"answer", "prompt", "images"}
    status, out, err = run("report", whole)
    assert status == 0, err
    report = json.loads((whole / "report.json").read_text())
    assert set(report) >= {"accuracy_with_slices", "accuracy_thumbnail_only", "chance", "train_seconds", "seed"}
    assert (whole / "loss.png").stat().st_size > 10_000


def test_errors_are_one_line(run, whole, tmp_path):
    (tmp_path / "broken.png").write_bytes((ROOT / "docs/images/slices.png").read_bytes()[:5000])
    other = ["train", "--config=configs/demo.py", f"--workdir={whole}", *OPTIONS, *SMALL]
    for arguments, words in (
        ([*other, "--config.model.tower.width=64", "--config.model.tower.heads=4"], ("model.tower.width", str(whole))),
        (["generate", f"--checkpoint={whole}", f"--image={tmp_path}/broken.png", "--prompt=?"], ("broken.png",)),
        (["generate", f"--checkpoint={tmp_path}/none", "--prompt=?"], (f"{tmp_path}/none",)),
        (["generate", f"--checkpoint={whole}", f"--prompt={'x' * 40_000}"], ("40", "max_length")),
    ):
        status, out, err = run(*arguments)
        assert status == 1, (arguments, err)
        lines = [line for line in err.splitlines() if "error:" in line]
        assert len(lines) == 1 and "Traceback" not in err, err
        for word in words:
            assert word in lines[0], lines
