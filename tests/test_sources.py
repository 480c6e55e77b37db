"""Sources by name, and records of the user's own: what is read, how mistakes are named, and that files may move."""

import dataclasses
import json
import os
import pickle

import numpy as np
import pytest
import tiny
from PIL import Image

from uhd_jax.checkpoint import differing_keys
from uhd_jax.config import ConfigError, DataConfig, ImageLimits, to_dict
from uhd_jax.data.chat import ImagePart, Message
from uhd_jax.data.pipeline import PipelineError, make_iterator
from uhd_jax.data.sources import Records, SourceError, check_data, make_source
from uhd_jax.slicing.plan import ImageRefused, Size

TURN = {"role": "user", "content": "What?"}


def record(*images, **changes):
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]
    return {"messages": messages, "images": list(images)} | changes


def user(*content):
    return record(messages=[TURN, {"role": "user", "content": list(content)}])


def write_lines(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def test_records_from_a_file_with_relative_image_paths(tmp_path):
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    path = write_lines(tmp_path / "r.jsonl", record("a.png"), record(), b"")
    source = make_source(DataConfig("records", {"path": str(path)}))
    assert len(source) == 2
    assert source.messages(0) == (Message("user", (ImagePart(0), "What?")), Message("assistant", ("A cat.",)))
    assert source.sizes(0) == [Size(4, 6)] and source.sizes(1) == []
    np.testing.assert_array_equal(source.images(0)[0], pixels)


def test_line_separators_inside_a_text_do_not_end_a_record(tmp_path):
    line = json.dumps(record(messages=[{"role": "user", "content": "a\u2028b"}]), ensure_ascii=False)
    path = write_lines(tmp_path / "r.jsonl", line.encode())
    assert Records.from_jsonl(path).messages(0)[0].parts == ("a\u2028b",)


def test_blank_lines_and_byte_order_marks_are_no_records_but_lines_count(tmp_path):
    bom = b"\xef\xbb\xbf"
    first, second = (json.dumps(record(note=note)).encode() for note in "ab")
    path = write_lines(tmp_path / "r.jsonl", bom, b"", bom + first + b"\r", b" \t\r", second, b"")
    source = Records.from_jsonl(path)
    assert [source.where(index) for index in range(len(source))] == [f"{path}:3", f"{path}:5"]
    with pytest.raises(SourceError, match=r"r\.jsonl:3: record: expected an object, got null$"):
        Records.from_jsonl(write_lines(path, first, b"", b"null"))


def test_where_a_sample_comes_from():
    assert Records([record(), record()], name="mine").where(1) == "mine:2"
    assert make_source(DataConfig("digit_pages")).where(17) == "digit_pages sample 17"


def test_records_reach_worker_processes(tmp_path):
    source = Records.from_jsonl(write_lines(tmp_path / "r.jsonl", record("a.png")))
    copy = pickle.loads(pickle.dumps(source))
    assert (copy.messages(0), copy.where(0)) == (source.messages(0), source.where(0))


def test_records_in_memory_take_arrays_and_check_limits():
    source = Records([record(np.zeros((8, 8, 3), np.uint8), np.ones((4, 4, 3), np.uint8))], ImageLimits(max_pixels=20))
    assert source.messages(0)[0].parts[:2] == (ImagePart(0), ImagePart(1))
    with pytest.raises(ImageRefused, match="max_pixels"):
        source.sizes(0)


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (None, "record: expected an object, got null"),
        ([], "record: expected an object, got a list"),
        ("x", "record: expected an object, got a string"),
        ({}, "messages: missing"),
        (record(messages=None), "messages: expected a list, got null"),
        (record(messages={"role": "user"}), "messages: expected a list, got an object"),
        (record(messages="hello"), "messages: expected a list, got a string"),
        (record(messages=[]), "messages: is empty"),
        (record(messages=[TURN, "hi"]), "messages[1]: expected an object, got a string"),
        (record(messages=[TURN, None]), "messages[1]: expected an object, got null"),
        (record(messages=[{"content": "x"}]), "messages[0].role: missing"),
        (record(messages=[{"role": "user"}]), "messages[0].content: missing"),
        (record(messages=[{"role": "cat", "content": "x"}]), "messages[0].role: 'cat' is not one of system, user"),
        (
            record(messages=[{"role": ["user"], "content": "x"}]),
            "messages[0].role: ['user'] is not one of system, user",
        ),
        (record(messages=[{"role": None, "content": "x"}]), "messages[0].role: None is not one of system, user"),
        (
            record(messages=[{"role": "user", "content": None}]),
            "messages[0].content: expected a string or a list of parts, got null",
        ),
        (
            record(messages=[{"role": "user", "content": 3.5}]),
            "messages[0].content: expected a string or a list of parts, got a number",
        ),
        (
            record(messages=[{"role": "user", "content": {"type": "image"}}]),
            "messages[0].content: expected a string or a list of parts, got an object",
        ),
        (user("x"), "messages[1].content[0]: expected an object, got a string"),
        (user({"text": "x"}), "messages[1].content[0].type: missing"),
        (user({"type": "audio"}), "messages[1].content[0].type: 'audio' is not one of text, image"),
        (user({"type": ["text"]}), "messages[1].content[0].type: ['text'] is not one of text, image"),
        (user({"type": "text"}), "messages[1].content[0].text: missing"),
        (user({"type": "text", "text": True}), "messages[1].content[0].text: expected a string, got true or false"),
        (user({"type": "text", "text": "\ud83d"}), "messages[1].content[0].text: holds half of a surrogate pair"),
        (
            record(messages=[{"role": "assistant", "content": [{"type": "image"}]}], images=["a.png"]),
            "messages[0].content[0]: only the role 'user' can show images, not 'assistant'",
        ),
        (record(images="a.png"), "images: expected a list, got a string"),
        (record(images=["a.png", 7]), "images[1]: expected a path, got a number"),
        (record(images=[["a.png"]]), "images[0]: expected a path, got a list"),
        (record(images=["a.png"]), "images: 1 listed, but 0 parts of type 'image' in the messages"),
        (user({"type": "image"}), "images: 0 listed, but 1 parts of type 'image' in the messages"),
    ],
)
def test_malformed_records_are_named_by_line_and_field(tmp_path, broken, complaint):
    path = write_lines(tmp_path / "r.jsonl", record(), b"", broken)
    with pytest.raises(SourceError) as caught:
        Records.from_jsonl(path)
    assert str(caught.value).startswith(f"{path}:3: {complaint}")
    with pytest.raises(SourceError) as caught:
        Records([record(), broken])
    assert str(caught.value).startswith(f"records:2: {complaint}")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"not json", "not JSON (Expecting value, column 1)"),
        (b'{"messages": [}', "not JSON (Expecting value, column 15)"),
        (b"[" * 100_000, "not JSON (maximum recursion depth"),
        (b"9" * 5000, "not JSON (Exceeds the limit"),
        ('{"é": 1}'.encode("latin-1"), "not UTF-8 (invalid continuation byte at byte 3); save the file as UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8 (invalid start byte at byte 1)"),
    ],
)
def test_lines_that_are_no_json_are_named(tmp_path, line, complaint):
    path = write_lines(tmp_path / "r.jsonl", record(), line)
    with pytest.raises(SourceError) as caught:
        Records.from_jsonl(path)
    assert str(caught.value).startswith(f"{path}:2: {complaint}")


def test_unreadable_and_empty_files_are_named(tmp_path):
    with pytest.raises(SourceError, match=r"r\.jsonl: cannot be read \(No such file or directory\)"):
        Records.from_jsonl(tmp_path / "r.jsonl")
    with pytest.raises(SourceError, match=r"cannot be read \(Is a directory\)"):
        Records.from_jsonl(tmp_path)
    with pytest.raises(SourceError, match=r"r\.jsonl: holds no record"):
        Records.from_jsonl(write_lines(tmp_path / "r.jsonl", b"\n\n"))


def test_unknown_sources_and_options_are_named_by_their_full_key():
    key = "config.train.stages[1].data"
    with pytest.raises(
        ConfigError, match=r"^data\.source: 'digits' is not one of array_record, arrow, digit_pages, images, json, "
    ):
        make_source(DataConfig("digits"))
    with pytest.raises(ConfigError, match=r"^config\.train\.stages\[1\]\.data\.source: 'digits'"):
        make_source(DataConfig("digits"), key=key)
    with pytest.raises(ConfigError, match=r"^config\.train\.stages\[1\]\.data\.options\.paths: unknown"):
        check_data(DataConfig("records", {"paths": "x"}), key)
    with pytest.raises(ConfigError, match=r"data\.options\.path: missing"):
        check_data(DataConfig("records"))
    with pytest.raises(ConfigError, match=r"data\.options\.samples: expected int"):
        check_data(DataConfig("digit_pages", {"samples": "x"}))
    assert check_data(DataConfig("records", {"path": "absent.jsonl"})).path == "absent.jsonl"


def texts(*answers):
    return [{"messages": [TURN, {"role": "assistant", "content": answer}]} for answer in answers]


def run_on(path):
    """A run on a file, and the iterator of its only stage."""
    data = DataConfig("records", {"path": str(path)})
    run = tiny.run([tiny.stage(data=data, packed_length=64)], packing_window=8)
    decoder = dataclasses.replace(run.model.decoder, vocab_size=300)
    model = dataclasses.replace(run.model, decoder=decoder)
    return run, make_iterator(run.train.stages[0], model, run.train, make_source(data))


def test_a_run_resumes_from_the_same_file_elsewhere_but_not_from_another(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "r.jsonl", *texts("a", "bb", "ccc", "d"))
    run, batches = run_on(path)
    next(batches)
    state = batches.get_state()
    following, _ = next(batches)
    batches.close()

    (tmp_path / "moved").mkdir()
    moved = path.rename(tmp_path / "moved" / "other.jsonl")
    monkeypatch.chdir(tmp_path)
    for spelling in (moved, "moved/other.jsonl"):
        run_there, batches = run_on(spelling)
        assert differing_keys(to_dict(run), to_dict(run_there)) == []
        batches.set_state(state)
        np.testing.assert_array_equal(next(batches)[0].tokens, following.tokens)
        batches.close()

    changed = write_lines(tmp_path / "moved" / "other.jsonl", *texts("a", "bb", "xyz", "d"))
    with pytest.raises(PipelineError, match="another data configuration"):
        run_on(os.path.relpath(changed))[1].set_state(state)
