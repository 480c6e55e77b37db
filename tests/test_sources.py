"""Sources by name, and records of the user's own."""

import json

import numpy as np
import pytest
from PIL import Image

from uhd_jax.config import ConfigError, DataConfig, ImageLimits
from uhd_jax.data.chat import ImagePart, Message
from uhd_jax.data.sources import Records, SourceError, make_source
from uhd_jax.slicing.plan import ImageRefused, Size


def record(*images, **changes):
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]
    return {"messages": messages, "images": list(images)} | changes


def test_records_from_a_file_with_relative_image_paths(tmp_path):
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "r.jsonl").write_text(json.dumps(record("a.png")) + "\n" + json.dumps(record()) + "\n")
    source = make_source(DataConfig("records", {"path": str(tmp_path / "r.jsonl")}))
    assert len(source) == 2
    assert source.messages(0) == (Message("user", (ImagePart(0), "What?")), Message("assistant", ("A cat.",)))
    assert source.sizes(0) == [Size(4, 6)] and source.sizes(1) == []
    np.testing.assert_array_equal(source.images(0)[0], pixels)


def test_line_separators_inside_a_text_do_not_end_a_record(tmp_path):
    line = json.dumps(record(messages=[{"role": "user", "content": "a\u2028b"}]), ensure_ascii=False)
    (tmp_path / "r.jsonl").write_text(line + "\n", encoding="utf-8")
    assert Records.from_jsonl(tmp_path / "r.jsonl").messages(0)[0].parts == ("a\u2028b",)


def test_records_in_memory_take_arrays_and_check_limits():
    source = Records([record(np.zeros((8, 8, 3), np.uint8), np.ones((4, 4, 3), np.uint8))], ImageLimits(max_pixels=20))
    assert source.messages(0)[0].parts[:2] == (ImagePart(0), ImagePart(1))
    with pytest.raises(ImageRefused, match="max_pixels"):
        source.sizes(0)


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        ({}, "records:2: the key 'messages' is missing"),
        (record(messages=[]), "records:2: no messages"),
        (record(messages=[{"role": "user"}]), "records:2: the key 'content'"),
        (record(messages=[{"role": "cat", "content": "x"}]), "records:2: role 'cat'"),
        (
            record(messages=[{"role": "user", "content": [{"type": "audio"}]}]),
            "records:2: content part of type 'audio'",
        ),
        (record(images=["a.png"]), "records:2: 0 image parts in the messages, but 1 images"),
        ([], "records:2: "),
    ],
)
def test_malformed_records_are_named(broken, complaint):
    with pytest.raises(SourceError, match=complaint):
        Records([record(), broken])


def test_unreadable_files_are_named(tmp_path):
    path = tmp_path / "r.jsonl"
    with pytest.raises(SourceError, match="r.jsonl: cannot be read"):
        Records.from_jsonl(path)
    path.write_text(json.dumps(record()) + "\nnot json\n")
    with pytest.raises(SourceError, match="r.jsonl:2: not JSON"):
        Records.from_jsonl(path)


def test_unknown_sources_and_options_are_named():
    with pytest.raises(ConfigError, match="data.source: 'digits'.*digit_pages, records"):
        make_source(DataConfig("digits"))
    with pytest.raises(ConfigError, match="data.options.paths: unknown"):
        make_source(DataConfig("records", {"paths": "x"}))
    with pytest.raises(ConfigError, match="data.options.path: missing"):
        make_source(DataConfig("records"))
