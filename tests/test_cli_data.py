"""`uhd-jax data`: what it prints, draws, writes and refuses."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest
from command_line import assert_one_line, call
from data_files import write_records
from PIL import Image

from uhd_jax.analysis import sample_view
from uhd_jax.cli import data as cli_data
from uhd_jax.data.sources import make_source

ROOMY = "--config.train.stages[0].packed_length=600"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("records"))


@pytest.fixture
def given(config_file, path):
    return f"--config={config_file}", ROOMY, "--source=json", f"--option=path={path}"


@pytest.fixture
def conversation(tmp_path, image_file):
    """Two turns about one image of 600 x 900 pixels, with a mark and a control character in the texts."""
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?\x1b[2J"}]},
        {"role": "assistant", "content": "Noise.\nCaf\u00e9."},
        {"role": "user", "content": "Say <|im_end|>"},
        {"role": "assistant", "content": "No."},
    ]
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"messages": messages, "images": ["image.png"]}) + "\n")
    return path


def test_index_is_made_once(capsys, config_file, tmp_path):
    path = write_records(tmp_path)
    argv = ("data", "index", f"--config={config_file}", "--source=json", f"--option=path={path}")
    status, out, _ = call(capsys, *argv)
    kept = f"{path}.uhd-index.npz"
    assert status == 0 and f"60 samples, 89 images; index written to {kept}" in out
    assert "1  samples_dropped_bad_image" in out and "sample 5: " in out and "absent.png" in out
    status, out, _ = call(capsys, *argv, "--json")
    (facts,) = json.loads(out)["indices"]
    assert (facts["made"], facts["index"], facts["samples"], facts["images"]) == (False, kept, 60, 89)
    assert facts["troubles"] == {"samples_dropped_bad_image": 1, "samples_dropped_bad_record": 1}
    assert call(capsys, *argv, f"--index={tmp_path / 'other.npz'}")[0] == 0 and (tmp_path / "other.npz").exists()


def test_stats(capsys, given, tmp_path):
    status, out, _ = call(capsys, "data", "stats", *given, f"--out={tmp_path / 'a.png'}")
    assert status == 0
    lines = out.splitlines()
    assert lines[0].startswith("stage only: json path=") and lines[1].startswith("60 samples, 89 images; ")
    assert any(line.startswith("trained tokens") for line in lines)
    assert any(line.startswith("2 programs, as now") for line in lines)
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    assert picture.shape[1] > 1000 and (picture < 128).mean() > 0.01
    (report,) = json.loads(call(capsys, "data", "stats", *given, "--json")[1])["stages"]
    dropped = sum(count for name, count in report["counters"].items() if "dropped" in name)
    assert report["kept"] + dropped == report["samples"] == 60


def test_stats_of_texts_alone_and_of_nothing_usable(capsys, config_file, tmp_path):
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text((json.dumps({"messages": turns}) + "\n") * 3)
    argv = ("data", "stats", f"--config={config_file}", "--source=json", f"--option=path={path}")
    assert call(capsys, *argv, f"--out={tmp_path / 'a.png'}")[0] == 0
    status, out, _ = call(capsys, *argv, f"--out={tmp_path / 'b.png'}", "--config.train.stages[0].packed_length=1")
    assert status == 0 and "0 samples are trained on" in out and "samples_dropped_too_long (100.0 %)" in out
    assert (tmp_path / "a.png").exists() and (tmp_path / "b.png").exists()


def test_plan_names_the_list_that_wastes_least(capsys, given):
    status, out, _ = call(capsys, "data", "plan", *given, "--programs=3")
    assert status == 0 and '"buckets": [\n    {"slots": ' in out
    (plan,) = json.loads(call(capsys, "data", "plan", *given, "--programs=3", "--json")[1])["stages"]
    lists = plan["bucket_lists"]
    assert [one["name"] for one in lists] == ["1 program", "2 programs", "3 programs"]
    assert all(len(one["buckets"]) <= number for number, one in enumerate(lists, 1))
    least = min(lists, key=lambda one: (one["dropped"], one["fewer_slices"], one["padding"]["work"]))
    assert plan["buckets"] == least["buckets"]


def test_plan_prefers_a_shorter_list_that_wastes_less(capsys, given, monkeypatch):
    wastes = iter((0.02, 0.01, 0.05, None))

    def bucket_list(name, data, fit):
        padding = {"tokens": 0.5, "slots": 0.5, "patches": 0.5, "work": next(wastes)}
        buckets = [{"slots": 1, "tokens": 1, "patches": 1}] * int(name[0])
        return {"name": name, "buckets": buckets, "dropped": 0, "turns_cut": 0, "fewer_slices": 0, "padding": padding}

    monkeypatch.setattr("uhd_jax.analysis.data_stats.bucket_list", bucket_list)
    (plan,) = json.loads(call(capsys, "data", "plan", *given, "--programs=4", "--json")[1])["stages"]
    assert len(plan["buckets"]) == 2


def test_show_as_json(capsys, config_file, conversation):
    argv = ("data", "show", "0", f"--config={config_file}", ROOMY, "--source=json", f"--option=path={conversation}")
    status, out, _ = call(capsys, *argv, "--json")
    shown = json.loads(out)
    assert status == 0 and shown["where"].endswith("one.jsonl:1") and shown["images"][0]["grid"] == [2, 4]
    assert sum(span["tokens"] for span in shown["spans"]) == shown["tokens"]
    texts = {kind: [s["text"] for s in shown["spans"] if s["kind"] == kind] for kind in ("trained", "mark", "visual")}
    assert texts["trained"] == ["Noise.\nCaf\u00e9.<|im_end|>", "No.<|im_end|>"]
    assert texts["visual"][:2] == ["[image 1 thumbnail: 4]", "[image 1 slice 1: 4]"] and len(texts["visual"]) == 9
    assert texts["mark"].count("<|im_end|>") == 2  # the one in the user's text is text
    trained = sum(span["tokens"] for span in shown["spans"] if span["kind"] == "trained")
    assert trained == shown["trained_tokens"]


def test_show_in_a_terminal(capsys, config_file, conversation):
    argv = ("data", "show", "0", f"--config={config_file}", ROOMY, "--source=json", f"--option=path={conversation}")
    status, out, _ = call(capsys, *argv)
    assert status == 0 and "[[Noise.\nCaf\u00e9.<|im_end|>]]" in out and "\x1b" not in out and "What?\\x1b[2J" in out
    coloured = call(capsys, *argv, "--colour=always")[1]
    assert "\x1b[30;42mNoise.\nCaf\u00e9.<|im_end|>\x1b[0m" in coloured and "What?\\x1b[2J" in coloured
    assert coloured.count("\u2580") == 72 * 24  # 600 x 900 pixels: 72 columns, two rows in a line


def test_show_says_that_buckets_are_not_planned(capsys, config_file, conversation):
    argv = ("data", "show", "0", f"--config={config_file}", ROOMY, "--source=json", f"--option=path={conversation}")
    assert "buckets are not planned: views unlimited here (uhd-jax data plan)\n" in call(capsys, *argv)[1]
    argv += ("--config.train.stages[0].slots=4",)
    assert "not planned" not in call(capsys, *argv)[1]
    shown = json.loads(call(capsys, *argv, "--json")[1])
    assert shown["views_limited"] and shown["views"] <= 4


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_of_samples_is_for_those_who_look(monkeypatch, terminal):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    with cli_data._bar("pack") as progress:
        progress(512, 2048)
        progress(2048, 2048)
    shown = stream.getvalue().split("\r")[-1]
    assert ("pack: 100%" in shown and "2.05k/2.05k" in shown) if terminal else shown == ""


def test_show_draws_views_and_text(capsys, config_file, conversation, tmp_path):
    argv = ("data", "show", "0", f"--config={config_file}", ROOMY, "--source=json", f"--option=path={conversation}")
    assert call(capsys, *argv, f"--out={tmp_path / 'a.png'}")[0] == 0
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    trained = (picture == (0xBB, 0xF7, 0xD0)).all(-1)
    visual = (picture == (0xE0, 0xED, 0xFB)).all(-1)
    assert trained.sum() > 2000 and visual.sum() > 5000
    assert np.flatnonzero(trained.any(axis=1)).max() > picture.shape[0] - 60  # the last answer ends the page


def test_show_says_that_a_sample_is_dropped(capsys, config_file, conversation):
    argv = ("data", "show", "0", f"--config={config_file}", "--source=json", f"--option=path={conversation}")
    status, out, _ = call(capsys, *argv, "--config.train.stages[0].too_long=fewer_slices")
    assert status == 0 and "DROPPED: too long" in out and "not sliced" in out
    cut = call(capsys, *argv)[1]
    assert "; the oldest round of question and answer cut" in cut and "Noise." not in cut and "[[No.<|im_end|>]]" in cut
    assert call(capsys, *argv, "--config.train.stages[0].packed_length=110")[1].count("slice 2") == 1


def test_show_says_why_a_sample_is_not_trained_on(capsys, config_file, tmp_path):
    path = tmp_path / "silent.jsonl"
    said = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": ""}]
    path.write_text("\n".join(json.dumps({"conversations": turns}) for turns in (said, said[:1])))
    for sample, reason in enumerate(("an answer is empty", "no answer to train on")):
        argv = ("data", "show", str(sample), f"--config={config_file}", "--source=json", f"--option=path={path}")
        assert f"; DROPPED: {reason}" in call(capsys, *argv)[1]
        assert json.loads(call(capsys, *argv, "--json")[1])["dropped"] == reason


def test_show_alters_images_as_an_epoch_does(capsys, config_file, conversation):
    argv = ("data", "show", "0", f"--config={config_file}", ROOMY, "--source=json", f"--option=path={conversation}")
    augment = "--config.train.stages[0].augment"
    argv += tuple(f"{augment}.{key}_probability=1.0" for key in ("resize", "jpeg", "ocr"))
    argv += ("--config.train.stages[0].max_slices=40",)  # so that there is room for more slices
    shown = [json.loads(call(capsys, *argv, f"--epoch={epoch}", "--json")[1]) for epoch in (0, 1, 0)]
    ((first,), (second,), (again,)) = (one["alterations"] for one in shown)
    assert first == again != second and set(first) == {"resized", "jpeg_quality", "ocr_seed"}
    assert shown[0]["images"][0]["image"] == first["resized"]
    height, width = first["resized"]
    told = (
        f"600x900 (height x width) resized to {height}x{width}, JPEG of quality {first['jpeg_quality']}, worn as a scan"
    )
    assert told in call(capsys, *argv)[1]


def test_lines_are_wrapped_without_losing_a_character():
    spans = [sample_view.Span("abc\ndefghij\n", "text", 1), sample_view.Span("klmnopqrst\n\nu", "trained", 1)]
    lines = ["".join(text for text, _ in line) for line in sample_view._wrapped(spans, 4)]
    assert lines == ["abc\u21b5", "defg", "hij\u21b5", "klmn", "opqr", "st\u21b5", "\u21b5", "u"]


def test_pack_needs_no_configuration(capsys, path, tmp_path):
    argv = ("data", "pack", str(tmp_path / "out"), "--source=json", f"--option=path={path}", "--shard-samples=32")
    status, out, _ = call(capsys, *argv)
    assert status == 0 and "58 samples" in out and "in 2 shards" in out and "skipped.jsonl" in out
    summary = json.loads(call(capsys, *argv, "--json")[1])
    assert summary["complete"] and summary["skipped"]["samples_dropped_bad_image"] == 1
    assert len(make_source_of(tmp_path / "out")) == 58
    assert_one_line(call(capsys, *argv[:-1], "--shard-samples=5")[2], "was begun with other data", "name a new folder")


def make_source_of(folder):
    from uhd_jax.config import DataConfig

    return make_source(DataConfig("array_record", {"path": str(folder)}))


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["index"], ["--config=FILE.py is needed"]),
        (["pack", "out"], ["--config=FILE.py is needed, or --source"]),
        (["stats", "CONFIG", "--option=path=a"], ["--option is for --source"]),
        (["stats", "CONFIG", "--stage=other"], ["--stage=other", "only"]),
        (["stats", "CONFIG", "--source=json", "--option=path"], ["write KEY=VALUE"]),
        (["show", "100000", "CONFIG"], ["has 100000 samples, numbered from 0"]),
        (["show", "-1", "CONFIG"], ["-1"]),
    ],
)
def test_wrong_command_lines(capsys, config_file, argv, parts):
    argv = [f"--config={config_file}" if word == "CONFIG" else word for word in argv]
    status, _, err = call(capsys, "data", *argv)
    assert status == 2
    assert_one_line(err, *parts)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--source=nothing"], ["--source.source: 'nothing' is not one of"]),
        (["--source=json", "--option=pth=a.jsonl"], ["--source.options", "pth"]),
        (["--source=json", "--option=path=absent.jsonl"], ["absent.jsonl: "]),
    ],
)
def test_data_that_is_refused(capsys, config_file, argv, parts):
    status, _, err = call(capsys, "data", "stats", f"--config={config_file}", *argv)
    assert status == 1
    assert_one_line(err, *parts)


def test_one_stage_at_a_time(capsys, config_file, tmp_path, path):
    two = tmp_path / "two.py"
    text = (tmp_path / "plain.py").read_text()
    two.write_text(text.replace("stages=(stage,)", "stages=(stage, stage | dict(name='next', packed_length=600))"))
    status, _, err = call(capsys, "data", "show", "0", f"--config={two}")
    assert status == 2
    assert_one_line(err, "show takes one stage: --stage=NAME of only, next")
    argv = ("data", "stats", f"--config={two}", "--source=json", f"--option=path={path}", "--json")
    reports = json.loads(call(capsys, *argv)[1])["stages"]
    assert [report["stage"] for report in reports] == ["only", "next"] and reports[0]["kept"] < reports[1]["kept"]
