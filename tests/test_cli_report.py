"""`uhd-jax report`: what it gathers from a run's folder."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command_line import assert_one_line, call
from PIL import Image


@pytest.fixture
def finished_run(tmp_path):
    def write(name, value):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value))

    losses = [("cells", 1, 2.0), ("cells", 2, None), ("pages", 3, 1.5), ("pages", 4, 0.5)]
    records = [
        {"stage": stage, "step": step, "stage_step": (step - 1) % 2 + 1, "loss": loss, "compilations": 1}
        for stage, step, loss in losses
    ]
    write("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    trained = {"name": "d", "seed": 3, "steps": 4, "train_seconds": 9.5, "devices": "1 x cpu", "versions": {}}
    write("trained.json", trained)
    scores = {"accuracy_with_slices": 0.9, "accuracy_thumbnail_only": 0.1, "chance": 0.125, "pages": 7}
    questions = {"questions_with_slices": 0.3, "questions_thumbnail_only": 0.2, "questions_chance": 0.25}
    write("evaluation.json", scores | questions | {"answers": [{"question": "?"}]})
    return write, tmp_path


def test_report(capsys, finished_run):
    write, directory = finished_run
    write("elapsed.txt", "install 20\ntrain 50\ntrain 30\nevaluate 5\n")
    status, out, _ = call(capsys, "report", str(directory), "--json")
    assert status == 0
    report = json.loads(out)
    assert report == json.loads((directory / "report.json").read_text())
    evaluation = json.loads((directory / "evaluation.json").read_text())
    del evaluation["answers"]
    assert report.items() >= {"seed": 3, **evaluation}.items() and "answers" not in report
    assert (report["train_seconds"], report["total_seconds"]) == (80, 105)
    assert "accuracy_thumbnail_trained" not in report
    assert report["stages"][1] == {"name": "pages", "first_loss": 1.5, "last_loss": 0.5, "steps": 2, "compilations": 1}
    with Image.open(directory / "loss.png") as picture:
        assert picture.format == "PNG" and np.asarray(picture).std() > 1


def test_report_counts_the_step_in_progress_and_the_control(capsys, finished_run, monkeypatch):
    write, directory = finished_run
    monkeypatch.setattr("time.time", lambda: 1000.5)
    write("elapsed.txt", "train 50\n")
    write("running.txt", "report 990\n")
    write("control/evaluation.json", {"accuracy_thumbnail_only": 0.07})
    report = json.loads(call(capsys, "report", str(directory), "--json")[1])
    assert (report["total_seconds"], report["seconds"]) == (60, {"train": 50, "report": 10})
    assert report["accuracy_thumbnail_trained"] == 0.07


def test_report_without_the_quickstart_has_the_time_of_training_only(capsys, finished_run):
    report = json.loads(call(capsys, "report", str(finished_run[1]), "--json")[1])
    assert report["train_seconds"] == 9.5 and "total_seconds" not in report


@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        ("trained.json", None, "missing"),
        ("evaluation.json", None, "missing"),
        ("evaluation.json", "{", "not JSON"),
        ("metrics.jsonl", None, "missing"),
        ("metrics.jsonl", "", "no records"),
        ("metrics.jsonl", '{"stage": 1', "line 1"),
        ("metrics.jsonl", '{"stage": "a"}', "line 1 lacks step, stage_step, loss, compilations"),
        ("trained.json", "[]", "lacks a JSON object"),
        ("trained.json", '{"name": "d"}', "lacks seed, steps"),
        ("control/evaluation.json", "{}", "lacks accuracy_thumbnail_only"),
        ("elapsed.txt", "train soon\n", "train soon"),
    ],
)
def test_report_refuses(capsys, finished_run, file, content, part):
    write, directory = finished_run
    (directory / file).unlink(missing_ok=True)
    if content is not None:
        write(file, content)
    status, _, err = call(capsys, "report", str(directory))
    assert status == 1
    assert_one_line(err, file, part)
    assert not (directory / "report.json").exists()


def test_report_refuses_bytes_that_are_no_text(capsys, finished_run):
    (finished_run[1] / "metrics.jsonl").write_bytes(b"\xff\n")
    status, _, err = call(capsys, "report", str(finished_run[1]))
    assert status == 1
    assert_one_line(err, "metrics.jsonl is not text")
