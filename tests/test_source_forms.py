"""Forms of records: fields that are null or empty, images that parts name, other media, captions beside metadata."""

import json
import tarfile

import numpy as np
import pytest
import source_files
from image_files import encode, photo
from test_source_rows import human

from uhd_jax.config import DataConfig
from uhd_jax.data.chat import ImagePart, Message
from uhd_jax.data.sources import Records, SourceError, make_source
from uhd_jax.data.sources.conversation import parse
from uhd_jax.slicing.plan import ImageRefused

ANSWER = {"role": "assistant", "content": "A."}


def asked(*content, **others):
    return {"messages": [{"role": "user", "content": list(content)}, ANSWER]} | others


@pytest.mark.parametrize("empty", [None, "", [], {}])
def test_a_field_that_is_null_or_empty_is_as_good_as_left_out(empty):
    for mark in ("", "<image>"):
        expected = parse(human(f"{mark}x", image="a.png"))
        assert expected[1] == ["a.png"]
        assert parse(human(f"{mark}x", image=empty, images=["a.png"])) == expected
        assert parse(human(f"{mark}x", image="a.png", images=empty)) == expected
    assert parse(human("x", image=empty)) == parse(human("x", image=empty, images=empty)) == parse(human("x"))
    assert parse(human("x") | {"messages": empty, "texts": empty}) == parse(human("x"))
    others = {"video": empty, "videos": empty, "audio": empty, "audios": empty}
    assert parse(human("x", **others)) == parse(human("x"))
    part = {"type": "image", "image": empty, "path": empty, "url": empty}
    assert parse(asked(part, images=["a.png"])) == parse(asked({"type": "image"}, images=["a.png"]))


@pytest.mark.parametrize("key", ["video", "videos", "audio", "audios"])
@pytest.mark.parametrize("value", ["a.mp4", ["a.mp4"], {"path": "a.mp4"}])
def test_other_media_are_not_trained_on_as_text(tmp_path, key, value):
    record = human("<video>\nWhat?", **{key: value})
    with pytest.raises(SourceError, match=f"^{key}: only texts and images are trained on"):
        parse(record)
    options = source_files.write_parquet(tmp_path, [human("x"), record])
    with pytest.raises(SourceError, match=rf"part-1.parquet:1: {key}: only"):
        make_source(DataConfig("parquet", options)).messages(1)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "image": {"path": "a.png", "bytes": None}},
        {"type": "image", "image": None, "path": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
        {"type": "image_url", "image_url": "a.png"},
    ],
)
def test_parts_may_name_their_image(part):
    messages, images = parse(asked({"type": "text", "text": "x"}, part, {"type": "image", "image": "b.png"}))
    assert images == ["a.png", "b.png"]
    assert messages[0] == Message("user", ("x", ImagePart(0), ImagePart(1)))


def test_images_may_be_named_twice_if_they_are_the_same():
    assert parse(asked({"type": "image", "image": "a"}, images=["a"]))[1] == ["a"]
    pixels = np.zeros((4, 6, 3), np.uint8)
    assert parse(human("x", image=pixels, images=[pixels]))[1][0] is pixels
    with pytest.raises(SourceError, match="image, images: both name images, and not the same ones"):
        parse(human("x", image=pixels, images=[pixels.copy()]))


def test_records_in_memory_name_arrays_in_parts():
    pixels = np.zeros((4, 6, 3), np.uint8)
    np.testing.assert_array_equal(Records([asked({"type": "image", "image": pixels})]).images(0)[0], pixels)


@pytest.mark.parametrize("named", ["000.jpg", "https://example.org/a.png", "../secret.png", 3])
def test_images_of_a_shard_are_its_members_whatever_its_records_name(tmp_path, named):
    record = asked({"type": "image", "image": named}, images=[named])
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        source_files.add_member(archive, "000.jpg", encode(photo(), "JPEG"))
        source_files.add_member(archive, "000.json", json.dumps(record).encode())
        source_files.add_member(archive, "001.json", json.dumps(record).encode())
        source_files.add_member(archive, "002.json", json.dumps(human("x")).encode())
        source_files.add_member(archive, "002.mp4", b"film")
    source = make_source(DataConfig("tar", {"path": str(tmp_path / "x.tar")}))
    assert source.files(0) == [encode(photo(), "JPEG")]
    for index, complaint in ((1, "x.tar:2: images: 0 listed, but 1 parts"), (2, "x.tar:3: holds a film or a sound")):
        with pytest.raises(SourceError, match=complaint):
            source.sizes(index)


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        (asked({"type": "image", "image": "a"}, images=["b"]), "images: named by parts of the messages too"),
        (asked({"type": "image", "image": "a"}, {"type": "image"}), "images: some are named by parts"),
        (asked({"type": "image", "image": 3}), "messages[0].content[0].image: expected a path, got a number"),
        (asked({"type": "image_url"}), "messages[0].content[0].image_url: missing"),
        (asked({"type": "image_url", "image_url": {}}), "messages[0].content[0].image_url.url: missing"),
        (asked({"type": "image_url", "image_url": None}), "messages[0].content[0]: expected a path, got null"),
        (asked({"type": "video", "video": "a"}), "messages[0].content[0].type: 'video' is not one of text, image"),
        (
            {"messages": [ANSWER | {"content": [{"type": "image_url", "image_url": "a"}]}]},
            "messages[0].content[0]: only the role 'user' can show images",
        ),
        (human("<image>", image=""), "images: 0 listed, but 1 marks '<image>'"),
        (human("x") | {"conversations": None, "texts": None}, "conversations: expected a list, got null"),
    ],
)
def test_what_is_wrong_is_named(record, complaint):
    with pytest.raises(SourceError) as caught:
        parse(record)
    assert str(caught.value).startswith(complaint)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("https://example.org/a.png", "not a path below the image root"),
        ("data:image/png;base64,iVBORw0KGgo=", "a data: URI; images are not read out of texts"),
        ("../a.png", "not a path below the image root"),
    ],
)
def test_images_named_by_parts_are_found_below_the_image_root_alone(tmp_path, name, complaint):
    (tmp_path / "a.png").write_bytes(encode(photo()))
    lines = [asked({"type": "image_url", "image_url": {"url": url}}) for url in ("a.png", name)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = make_source(DataConfig("json", {"path": str(tmp_path / "x.jsonl")}))
    assert source.files(0) == [encode(photo())]
    with pytest.raises(ImageRefused, match=complaint):
        source.sizes(1)


@pytest.mark.parametrize(
    ("text", "metadata", "expected"),
    [
        ("A cat.", {"caption": "other", "url": "http://x", "key": "0", "status": "success"}, "A cat."),
        (None, {"caption": "A cat.", "width": 3}, "A cat."),
        ("other", {"messages": [], **human("x")}, "A."),
        ("A cat.", {"conversations": None, "caption": None}, "A cat."),
        (None, {"caption": None}, SourceError),
        (None, {"width": 3}, SourceError),
    ],
)
def test_shards_of_img2dataset(tmp_path, text, metadata, expected):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        source_files.add_member(archive, "000.jpg", encode(photo(), "JPEG"))
        source_files.add_member(archive, "000.json", json.dumps(metadata).encode())
        if text:
            source_files.add_member(archive, "000.txt", text.encode())
    source = make_source(DataConfig("tar", {"path": str(tmp_path / "x.tar")}))
    if expected is SourceError:
        with pytest.raises(SourceError, match="x.tar:1: messages: missing"):
            source.messages(0)
    else:
        assert source.messages(0)[-1] == Message("assistant", (expected,))
        assert source.files(0) == [encode(photo(), "JPEG")]
