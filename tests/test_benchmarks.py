"""Benchmarks from files as they are published: what is read, how it is put, and what is said of a broken row."""

import json
from dataclasses import fields

import benchmark_files as files
import pytest
from benchmark_files import FORMS
from command_line import call
from tiny_assistant import make_assistant

import uhd_jax
from uhd_jax.data.sources.protocol import SourceError
from uhd_jax.evaluation import names, presets, tasks
from uhd_jax.evaluation.benchmarks import BENCHMARKS
from uhd_jax.evaluation.metrics.styles import MetricError
from uhd_jax.slicing.image_io import open_image


@pytest.fixture(scope="module")
def model(unoptimised):
    return make_assistant(max_length=4000)


def made(form, folder, prompts="llava"):
    name, maker, count, beginning, right = FORMS[form]
    data, options = maker(folder)
    task = tasks.BenchmarkTask(name, data, prompts, **options)
    samples = [sample for n in range(len(task)) if (sample := task.sample(n))]
    return task, samples, count, beginning, right


@pytest.mark.parametrize("form", FORMS)
def test_a_published_form_is_read_put_and_scored(form, tmp_path):
    task, samples, count, beginning, right = made(form, tmp_path)
    assert len(samples) == count
    assert len({sample.id for sample in samples}) == count
    for sample in samples:
        assert [open_image(image).shape[2] for image in sample.images] == [3] * (2 if "mmmu" in form else 1)
        assert sample.answers
    prompt = task.prompt(samples[0])
    assert prompt.startswith(beginning), prompt
    assert prompt.count("single word") + prompt.count("option's letter") <= 1
    answers = [right if right else sample.answers[0] for sample in samples]
    outcomes = [task.score(sample, answer, "official") for sample, answer in zip(samples, answers, strict=True)]
    assert [outcome.score for outcome in outcomes] == [1.0] * count
    summary = task.summarise(list(zip(samples, outcomes, strict=True)), "official")
    best = {"mme": 400 if "folder" in form else 200, "ocrbench": 1}.get(task.name, 1.0)
    first = next(value for key, value in summary.items() if key != "samples")
    assert summary["samples"] == count and first + summary.get("cognition", 0) == best


def test_names_on_the_command_line_are_those_of_the_code():
    assert names.BENCHMARKS == tuple(BENCHMARKS) and names.PRESETS == tuple(presets.PRESETS)


def test_images_stand_at_their_marks(tmp_path):
    task, samples, *_ = made("mmmu parquet", tmp_path)
    [turn] = task.conversation(samples[0], task.prompt(samples[0]), ("first", "second"))
    kinds = [(part["type"], part.get("image") or part["text"][:5]) for part in turn["content"]]
    assert kinds == [("image", "first"), ("text", " or "), ("image", "second"), ("text", "?\nA. ")]
    [turn] = task.conversation(samples[1], task.prompt(samples[1]), ("first", "second"))
    kinds = [(part["type"], part.get("image") or part["text"][:9]) for part in turn["content"]]
    assert kinds == [("image", "second"), ("text", "How much "), ("image", "first"), ("text", "?\nAnswer ")]


def test_a_table_keeps_a_picture_once_for_several_rows(tmp_path):
    _, samples, *_ = made("mmbench tsv", tmp_path)
    assert samples[0].images == samples[1].images == (files.picture(),)
    assert samples[1].options == ("dog", "cat") and samples[1].answers == ("A",)


@pytest.mark.parametrize(
    ("form", "change", "words"),
    [
        ("docvqa json", lambda row: row.pop("question"), ["field 'question'", "missing", "questionId"]),
        ("docvqa json", lambda row: row.update(question=["a"]), ["field 'question'", "must be a text, not list"]),
        ("docvqa json", lambda row: row.update(image="documents/none.png"), ["documents/none.png", "--images"]),
        ("docvqa json", lambda row: row.update(image="../a.png"), ["'../a.png'", "not a path below the image root"]),
        ("docvqa json", lambda row: row.update(answers=[{"a": 1}]), ["field 'answers'", "must be texts"]),
    ],
)
def test_a_broken_row_is_named_by_file_row_and_field(tmp_path, form, change, words):
    import json

    [path], _ = FORMS[form][1](tmp_path)
    content = json.loads(path.read_text())
    content["data"].append(dict(content["data"][0]))
    change(content["data"][1])
    path.write_text(json.dumps(content))
    task = tasks.BenchmarkTask(FORMS[form][0], [path], "llava")
    task.sample(0)
    with pytest.raises(SourceError) as error:
        task.sample(1)
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", "", "holds no record"),
        ("a.json", '{"info": 1}', "is an object without a list"),
        ("a.json", '{"data": [', "not JSON"),
        ("a.tsv", "index\tquestion\n", "holds no row"),
        ("a.txt", "x", "unknown kind '.txt'"),
        ("a.parquet", "x", "not a readable parquet file"),
    ],
)
def test_a_file_that_holds_nothing(tmp_path, name, content, words):
    path = files.write(tmp_path / name, content)
    with pytest.raises(SourceError, match=words) as error:
        tasks.BenchmarkTask("gqa", [path], "llava")
    assert str(path) in str(error.value)


def test_a_table_that_is_cut_off(tmp_path):
    path = files.write(tmp_path / "a.tsv", "index\tquestion\tanswer\n1\tA?\tyes\n2\tB?\n")
    task = tasks.BenchmarkTask("gqa", [path], "llava")
    assert task.sample(0).answers == ("yes",)
    with pytest.raises(SourceError, match="a.tsv:2: has 2 cells, the header 3"):
        task.sample(1)


def test_a_hidden_test_set_is_not_scored_as_wrong(tmp_path):
    path = files.lines(tmp_path / "test.jsonl", [{"question_id": 1, "text": "What?", "image": None}])
    task = tasks.BenchmarkTask("vqav2", [path], "llava")
    with pytest.raises(SourceError, match="question 1: has no reference answer"):
        task.score(task.sample(0), "x", "official")


def test_mme_needs_two_questions_of_an_image(tmp_path):
    task, samples, *_ = made("mme folder", tmp_path)
    scored = [(sample, task.score(sample, "Yes", "official")) for sample in samples[:3]]
    with pytest.raises(MetricError, match="has 1 questions; MME asks two"):
        task.summarise(scored, "official")


def test_presets_are_those_of_the_papers():
    def settings(preset, name, **given):
        return presets.settings_for(preset, name, given)

    one = settings("v1", "textvqa")
    assert (one.max_slices, one.long_side, one.beams, one.max_new_tokens) == (7, 1024, 3, 128)
    assert settings("v1", "mmbench").long_side == 0 and settings("v1", "mme").beams == 5
    two = settings("v2", "textvqa")
    assert (two.max_slices, two.long_side, two.beams) == (9, 1536, 3)
    assert settings("v2", "ocrbench").long_side == 0 and settings("v2", "docvqa").long_side == 1024
    four = settings("v4", "mmmu")
    assert (four.max_slices, four.upsize, four.beams, four.max_new_tokens) == (9, True, 3, 2048)
    direct = settings("v4", "ai2d")
    assert (direct.prompts, direct.upsize) == ("minicpm", False)
    six = settings("4.6", "ai2d")
    assert (six.prompts, six.max_slices, six.beams, six.repetition_penalty) == ("minicpm_4_6_steps", 9, 3, 1.2)
    assert (six.mode, six.max_new_tokens, six.upsize, six.thinking) == ("4x", 8192, True, False)
    assert settings("4.6", "gqa").prompts == "minicpm_4_6" and not settings("4.6", "pope").upsize
    thinking = settings("4.6-thinking", "gqa")
    assert (thinking.beams, thinking.temperature, thinking.repetition_penalty) == (1, 0.7, 1.0)
    assert thinking.thinking and thinking.upsize and thinking.prompts == "minicpm_4_6_steps"
    assert settings("v4", "ai2d", beams=1, mode=None).beams == 1 and settings("plain", "gqa") == presets.Settings()


@pytest.mark.parametrize(
    ("preset", "form", "asked"),
    [
        ("v1", "mme parquet", {"beams": 5, "max_slices": 7}),
        ("4.6", "ai2d parquet", {"beams": 3, "max_slices": 9, "mode": "4x", "repetition_penalty": 1.2}),
    ],
)
def test_a_model_is_asked_by_the_papers_settings(preset, form, asked, model, tmp_path, capsys, monkeypatch):
    """Beams and penalty included: what `evaluate` keeps is what the model says when it is asked so by hand."""
    name, maker, count, *_ = FORMS[form]
    data, _ = maker(tmp_path)
    monkeypatch.setitem(vars(uhd_jax), "load", lambda directory: model)
    out = tmp_path / "scores.json"
    argv = ["evaluate", "--checkpoint=m", f"--task={name}", f"--data={data[0]}", f"--preset={preset}", f"--out={out}"]
    status, _, err = call(capsys, *argv, "--max-new-tokens=6")
    assert status == 0, err
    first, *lines = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    settings = presets.Settings(**{key.name: first["settings"][key.name] for key in fields(presets.Settings)})
    assert vars(settings).items() >= asked.items() and len(lines) == json.loads(out.read_text())["samples"] == count
    task = tasks.BenchmarkTask(name, data, settings.prompts)
    plain = []
    for line in lines:
        sample = task.sample(line["index"])
        [image] = [presets.resized(open_image(one), settings, f"{sample.id}/0") for one in sample.images]
        conversation = task.conversation(sample, line["prompt"], [image])
        assert line["output"] == model.generate(conversation, max_new_tokens=6, **asked)
        plain.append(model.generate(conversation, max_new_tokens=6, max_slices=asked["max_slices"]))
    assert [line["output"] for line in lines] != plain


def test_images_are_resized_as_the_papers_did():
    import numpy as np

    image = np.zeros((300, 401, 3), np.uint8)
    long = presets.resized(image, presets.Settings(long_side=1024), "a")
    assert long.shape == (766, 1024, 3)  # int(1024 / 401 * 300)
    up = [presets.resized(image, presets.Settings(upsize=True), name).shape for name in ("a", "a", "b")]
    assert up[0] == up[1] != up[2]
    for height, width, _ in up:
        assert 401 <= width <= 1553 and height == int(width / 401 * 300)  # int(401 * sqrt(1344**2 / (300 * 401)))
    large = np.zeros((1344, 1344, 3), np.uint8)
    assert presets.resized(large, presets.Settings(upsize=True), "a") is large


def test_the_answer_of_a_model_that_thinks_first():
    read = presets.final_answer
    said = "It has ears. Answer: C is wrong.\nAnswer: b"
    assert read(said, "choice", "minicpm_steps") == "B" and read(said, "choice", "llava") == said
    assert read("3 + 4.\nAnswer: 7", "short", "minicpm_steps") == "7"
    assert read("Answer: STOP", "text", "minicpm_steps") == "Answer: STOP"
    thought = "<think>Answer: A</think>\nThe Answer is c"
    assert read(thought, "choice", "minicpm_4_6_steps") == "C" and read(thought, "choice", "minicpm_steps") == "A"
    assert read(thought, "short", "minicpm_4_6") == "The Answer is c"
    assert read("So \u7b54\u6848\u662fJ", "choice", "minicpm_4_6_steps") == "J"
    assert read("x <answer> 7\n</answer>", "text", "minicpm_4_6") == "7"
