"""`uhd-jax evaluate`: answers kept line by line, resumed, sharded, scored again; the report as HTML."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re

import benchmark_files as files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from command_line import assert_one_line, call

import uhd_jax
from uhd_jax.config import SlicingConfig, TowerConfig
from uhd_jax.evaluation import digit_pages, runner, tasks
from uhd_jax.evaluation.page import page
from uhd_jax.evaluation.presets import Settings
from uhd_jax.evaluation.samples import Sample
from uhd_jax.generation.prompt import PromptError

ROWS = 10


class Answering:
    """In the place of an `Assistant`: knows what is yes by the number in the question."""

    config = dataclasses.replace(tiny.MODEL, tower=TowerConfig())

    def __init__(self, stop_after: int | None = None):
        self.asked: list[tuple[str, dict]] = []
        self._stop_after = stop_after

    def generate(self, prompts, **options):
        if self._stop_after is not None and len(self.asked) >= self._stop_after:
            raise KeyboardInterrupt
        assert all(part["image"].shape[2] == 3 for [turn] in prompts for part in turn["content"][:-1])
        texts = [turn["content"][-1]["text"] for [turn] in prompts]
        self.asked += [(text, options) for text in texts]
        return ["Yes" if int(re.search(r"\d+", text)[0]) % 3 else "<b>No</b>" for text in texts]


@pytest.fixture
def data(tmp_path):
    files.write(tmp_path / "data/a.png", files.picture(0, (60, 100)))
    rows = [{"question_id": n, "image": "a.png", "text": f"Is it {n}?", "answer": "yes"} for n in range(ROWS)]
    return files.lines(tmp_path / "data/gqa.jsonl", rows)


@pytest.fixture
def evaluate(tmp_path, capsys, monkeypatch, data):
    def run(*more, model=None, out="scores.json"):
        model = model or Answering()
        monkeypatch.setitem(vars(uhd_jax), "load", lambda directory: model)
        argv = ["evaluate", "--checkpoint=runs/m", "--task=gqa", f"--data={data}", f"--out={tmp_path}/{out}", *more]
        return *call(capsys, *argv), model

    return run


def read(path):
    first, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    return first["settings"], lines


def test_every_question_is_a_line(evaluate, tmp_path, data):
    status, out, err, model = evaluate("--preset=v1", "--beams=1", f"--html={tmp_path}/r.html")
    assert status == 0, err
    assert json.loads((tmp_path / "scores.json").read_text()) == {
        "task": "gqa",
        "metrics": "official",
        "samples": ROWS,
        "accuracy": 0.6,
    }
    settings, lines = read(tmp_path / "scores.jsonl")
    assert settings.items() >= {"task": "gqa", "model": "m", "max_slices": 7, "long_side": 1024, "beams": 1}.items()
    assert [line["index"] for line in lines] == list(range(ROWS))
    assert lines[3] | {"views": 0} == {
        "index": 3,
        "id": "3",
        "where": f"{data}:4",
        "prompt": "Is it 3?\nAnswer the question using a single word or phrase.",
        "images": [str(data.parent / "a.png")],
        "views": 0,
        "output": "<b>No</b>",
        "expected": ["yes"],
        "parsed": "<b>No</b>",
        "score": 0.0,
    }
    [plan] = lines[3]["views"]
    assert plan["image"] == [614, 1024] and plan["views"] > 1  # the longer side is 1024 before it is sliced
    assert model.asked[3][1] == {"max_slices": 7, "max_new_tokens": 128, "temperature": 0.0, "mode": None}
    assert re.search(r"accuracy +0\.6\n", out)


def test_a_stopped_evaluation_goes_on(evaluate, tmp_path):
    status, *_ = evaluate("--batch=2", model=Answering(stop_after=4))
    assert status == 130 and not (tmp_path / "scores.json").exists()
    answers = tmp_path / "scores.jsonl"
    assert len(read(answers)[1]) == 4
    answers.write_text(answers.read_text() + '{"index": 4, "id": "4", "outp')  # killed within a line
    status, _, err, model = evaluate("--batch=2")
    assert status == 0, err
    assert [text[6] for text, _ in model.asked] == list("456789")
    whole = answers.read_text()
    status, _, _, model = evaluate("--metrics=lmms-eval")
    assert status == 0 and model.asked == []
    assert json.loads((tmp_path / "scores.json").read_text())["metrics"] == "lmms-eval"
    assert answers.read_text() == whole


def test_answers_under_other_settings_are_not_mixed(evaluate, tmp_path, data):
    assert evaluate("--limit=2")[0] == 0
    kept = (tmp_path / "scores.jsonl").read_text()
    status, _, err, model = evaluate("--max-slices=3")
    assert status == 1 and model.asked == []
    assert_one_line(err, "scores.jsonl", "max_slices: None there, 3 now", "move it away")
    data.write_text(data.read_text().replace("Is it 9", "Is it 8"))
    status, _, err, _ = evaluate()
    assert status == 1
    assert_one_line(err, "scores.jsonl", "data: ")
    assert (tmp_path / "scores.jsonl").read_text() == kept


def test_a_model_that_was_trained_on_is_another(tmp_path):
    run = tmp_path / "run"
    first = files.write(run / "checkpoints/9/params/d/a", b"1")
    files.write(run / "evaluation.json", "{}")
    before = runner.weights_stamp(run)
    files.write(run / "evaluation.json", '{"new": 1}')
    assert runner.weights_stamp(run) == before != ""
    files.write(run / "checkpoints/10/params/d/a", b"2")
    after = runner.weights_stamp(run)
    first.write_bytes(b"3")  # of an older step
    assert runner.weights_stamp(run) == after != before
    assert runner.weights_stamp(files.write(tmp_path / "hf/model.safetensors", b"1").parent) not in ("", before)


def test_shards_together_are_the_whole(evaluate, tmp_path):
    evaluate(out="whole.json")
    for number in (3, 1, 2):
        status, out, err, model = evaluate(f"--shard={number}/3")
        assert status == 0, err
        assert len(model.asked) == len(range(number - 1, ROWS, 3))
    status, _, err, model = evaluate()
    assert status == 0 and model.asked == [], err
    assert (tmp_path / "scores.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert (tmp_path / "scores.json").read_text() == (tmp_path / "whole.json").read_text()


def test_a_missing_shard_is_answered_when_they_are_put_together(evaluate, tmp_path):
    evaluate("--shard=1/2")
    status, _, err, model = evaluate()
    assert status == 0 and [text[6] for text, _ in model.asked] == list("13579"), err


def test_processes_take_a_part_each_and_the_first_puts_them_together(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr(runner.multihost, "join", lambda launch: None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    waited = []
    monkeypatch.setattr(runner.multihost_utils, "sync_global_devices", waited.append)
    for process, answered in ((1, "13579"), (0, "02468")):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        status, out, err, model = evaluate("--shard=process")
        assert status == 0 and "".join(text[6] for text, _ in model.asked) == answered, err
        assert bool(out) == (tmp_path / "scores.json").exists() == (process == 0)
    assert waited == ["evaluated"] * 2
    assert len(read(tmp_path / "scores.jsonl")[1]) == ROWS


@pytest.mark.parametrize(
    ("arguments", "status", "parts"),
    [
        (["--shard=3/2"], 2, ["'3/2' is not a part such as 1/4, nor the word process"]),
        (["--beams=0"], 2, ["--beams"]),
        (["--data=nowhere.json"], 1, ["nowhere.json", "no such file"]),
        (["--images=nowhere"], 1, ["gqa.jsonl:1: ", "nowhere", "--images"]),
    ],
)
def test_what_cannot_be_asked(evaluate, arguments, status, parts):
    found, _, err, _ = evaluate(*arguments)
    assert found == status
    assert_one_line(err, *parts)


def test_digit_pages_go_the_same_way(tmp_path, capsys, monkeypatch):
    """A model that reads digits only where it sees slices."""
    monkeypatch.setattr(digit_pages, "PAGES", 3)
    known = {}
    for kind in ("transcription", "question"):
        source = digit_pages.DigitPagesTask("v4")._sources[kind]
        known |= {
            (source.messages(page)[0].parts[-1], source.images(page)[0].tobytes()): source.messages(page)[1].parts[0]
            for page in range(3)
        }

    class Reading(Answering):
        config = dataclasses.replace(tiny.MODEL, tower=TowerConfig(), slicing=SlicingConfig(scale_resolution=112))

        def generate(self, prompts, **options):
            asked = [(turn["content"][-1]["text"], turn["content"][0]["image"].tobytes()) for [turn] in prompts]
            return [known[key] if options["max_slices"] is None else "?" for key in asked]

    monkeypatch.setitem(vars(uhd_jax), "load", lambda directory: Reading())
    status, out, err = call(
        capsys, "evaluate", "--checkpoint=m", "--task=digit_pages", f"--out={tmp_path}/evaluation.json", "--json"
    )
    assert status == 0, err
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert (result["accuracy_with_slices"], result["accuracy_thumbnail_only"]) == (1.0, 0.0)
    assert (result["questions_with_slices"], result["questions_thumbnail_only"]) == (1.0, 0.0)
    assert result["pages"] == 3 and len(result["answers"]) == 6 and (tmp_path / "page.png").exists()
    assert set(result["answers"][0]) == {"kind", "question", "expected", "with_slices", "thumbnail_only"}
    assert json.loads(out).items() <= result.items()
    assert len(read(tmp_path / "evaluation.jsonl")[1]) == 12
    argv = ["evaluate", "--checkpoint=m", "--task=digit_pages", f"--out={tmp_path}/first.json"]
    assert call(capsys, *argv, "--limit=2")[0] == 0
    first = json.loads((tmp_path / "first.json").read_text(), parse_constant=pytest.fail)
    assert first["accuracy_with_slices"] == 1.0 and "accuracy_thumbnail_only" not in first and first["pages"] == 2


def test_digit_pages_has_no_files(capsys):
    argv = ["evaluate", "--checkpoint=m", "--out=x.json"]
    status, _, err = call(capsys, *argv, "--task=digit_pages", "--data=x")
    assert status == 2 and "--data is not for the embedded task" in err
    status, _, err = call(capsys, *argv, "--task=mme")
    assert status == 2 and "--task=mme needs --data=FILE" in err


def test_an_error_of_a_batch_names_its_question(tmp_path, data):
    class Refusing(Answering):
        def generate(self, prompts, **options):
            raise PromptError("prompt[1]: is too long")

    task = tasks.BenchmarkTask("gqa", [data], "llava")
    run = runner.Run(task, Settings(), tmp_path / "a.jsonl", {})
    with pytest.raises(PromptError, match=re.escape(f"{data}:2: is too long")):
        runner.answer_all(run, Refusing())


def test_two_evaluations_do_not_write_the_same_answers(tmp_path, data):
    run = runner.Run(tasks.BenchmarkTask("gqa", [data], "llava"), Settings(), tmp_path / "a.jsonl", {})
    with runner.alone(run), pytest.raises(runner.EvaluationError, match="another evaluation"), runner.alone(run):
        pytest.fail("both wrote")


def test_devices_answer_as_one(tmp_path, data, monkeypatch):
    used = []

    class OnDevice(Answering):
        def __init__(self, config=None, params=None, tokenizer=None, max_length=0):
            super().__init__()
            self.params, self.tokenizer, self.max_length = params, tokenizer, max_length

        def generate(self, prompts, **options):
            used.append((self.params.device, jnp.zeros(()).device))
            return super().generate(prompts, **options)

    monkeypatch.setattr(runner, "Assistant", OnDevice)
    task = tasks.BenchmarkTask("gqa", [data], "bare")
    model = OnDevice(params=jnp.zeros(()))
    found = []
    for devices in (1, 3):
        run = runner.Run(task, Settings("bare"), tmp_path / f"{devices}.jsonl", {}, batch=2, devices=devices)
        assert runner.answer_all(run, model) == ROWS
        runner.finish(run, "official")
        found.append((tmp_path / f"{devices}.jsonl").read_text())
    assert found[0] == found[1]
    assert all(params == computing for params, computing in used)
    assert {device for device, _ in used[5:]} == set(jax.local_devices()[:3])


class _Reader(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_report_is_one_safe_file(evaluate, tmp_path):
    status, *_ = evaluate(f"--html={tmp_path}/r.html")
    assert status == 0
    read = _Reader((tmp_path / "r.html").read_text())
    assert read.tags.count("img") == read.tags.count("article") == ROWS
    assert all(source.startswith("data:image/jpeg;base64,") for source in read.sources)
    assert "<b>No</b>" in read.text and not {"b", "script", "link"} & set(read.tags)
    assert "All 10 questions" in read.text and "accuracy" in read.text


def test_a_long_report_shows_wrong_and_right_questions():
    def line(index):
        sample = Sample(str(index), "?", (), ("yes",))
        return {"index": index, "id": sample.id, "where": "a:1", "prompt": "?", "views": [], "output": "<script>"} | {
            "parsed": "no",
            "expected": ["yes"],
            "score": float(index % 10 > 0),
        }

    lines = [line(index) for index in range(1000)]
    text = page(
        "<title>", {"accuracy": 0.9}, {"task": "x"}, lines, lambda row: [np.zeros((8, 8, 3), np.uint8)], shown=50
    )
    read = _Reader(text)
    assert read.tags.count("article") == 50 and "50 of 1000 questions" in read.text
    assert text.count('class="score wrong"') == 25 and "script" not in read.tags
