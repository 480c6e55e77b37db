"""Rows of files: where they are, what a broken one is called, and that image paths stay below their root."""

import ast
import json
import os
import random
import re
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import source_files
from image_files import encode, photo

from uhd_jax.config import DataConfig, ImageLimits
from uhd_jax.data.chat import ImagePart, Message
from uhd_jax.data.sources import SOURCES, SourceError, check_data, make_source
from uhd_jax.data.sources import files as files_module
from uhd_jax.data.sources.conversation import parse
from uhd_jax.data.sources.files import DataFile
from uhd_jax.data.sources.json_rows import find_rows, read_row
from uhd_jax.data.sources.paths import ImageRoot
from uhd_jax.data.windows import COUNTERS
from uhd_jax.slicing.plan import ImageRefused


def human(value, **others):
    return {"conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "A."}]} | others


def test_marks_say_where_images_stand():
    messages, images = parse(human("<image> and <image>\nWhich?", image=["a.png", "b.png"]))
    assert messages[0].parts == (ImagePart(0), " and ", ImagePart(1), "\nWhich?") and images == ["a.png", "b.png"]
    messages, images = parse(human("Which?", image=["a.png", "b.png"]))
    assert messages[0].parts == (ImagePart(0), ImagePart(1), "Which?")
    named = {"<image_00>": "a.png", "<image_01>": "b.png", "<image_1>": "c.png"}
    record = {"image": named, "conversations": [{"role": "user", "content": "<image_01>x<image_1><image_00>y"}]}
    messages, images = parse(record)
    assert messages[0].parts == (ImagePart(0), "x", ImagePart(1), ImagePart(2), "y")
    assert images == ["b.png", "c.png", "a.png"]
    later = {"messages": [{"role": "user", "content": "Hi"}, {"role": "user", "content": "<image>"}], "images": ["a"]}
    assert parse(later)[0][1] == Message("user", (ImagePart(0),))


def test_null_in_the_place_of_images_is_as_good_as_left_out():
    assert parse(human("x", image=None, images=None)) == parse(human("x"))
    assert parse(human("<image>x", image=None, images=["a.png"])) == parse(human("<image>x", images=["a.png"]))
    assert parse(human("<image>x", image="a.png", images=None)) == parse(human("<image>x", image="a.png"))
    assert parse(human("<image>x", image="a.png", images=["a.png"])) == parse(human("<image>x", image="a.png"))


def test_a_mark_in_an_answer_or_a_system_prompt_is_text():
    messages, _ = parse(
        {
            "system": "Say <image>.",
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "An <image>"}],
        }
    )
    assert messages == (
        Message("system", ("Say <image>.",)),
        Message("user", (ImagePart(0),)),
        Message("assistant", ("An <image>",)),
    )


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        (human("<image><image>", image="a.png"), "images: 1 listed, but 2 marks '<image>'"),
        (human("<image>", image=["a.png", "b.png"]), "images: 2 listed, but 1 marks"),
        (human("<image>"), "images: 0 listed, but 1 marks"),
        (
            human("<image_00><image_00>", image={"<image_00>": "a", "<image_01>": "b"}),
            "images: 2 listed, but 2 marks '<image_00>', which show the images [0, 0]",
        ),
        (human("x", image={"": "a"}), "image: '' is no mark like '<image_00>'"),
        (human("<image> a", image={"a": "a.png"}), "image: 'a' is no mark like '<image_00>'"),
        (human("<image>", image=None), "images: 0 listed, but 1 marks"),
        (human("<image>", image="a.png", images=["b.png"]), "image, images: both name images, and not the same"),
        (human("x", image=[None]), "image[0]: expected a path, got null"),
        (human("x", image=3), "image: expected a path, got a number"),
        (human("x", image={"bytes": None, "path": None}), "image: expected bytes or a path, got null"),
        (human("x", image={"bytes": "text"}), "image: expected bytes or a path, got a string"),
        (human("x", image=["\ud800"]), "image[0]: holds half of a surrogate pair"),
        (human(None), "conversations[0].value: expected a string or a list of parts, got null"),
        ({"conversations": [{"from": "cat", "value": "x"}]}, "conversations[0].from: 'cat' is not one of human, gpt"),
        ({"conversations": [{"value": "x"}]}, "conversations[0].role: missing"),
        ({"texts": [{"user": "x"}]}, "texts[0].assistant: missing"),
        ({"texts": {}}, "texts: expected a list, got an object"),
        ({"conversations": []}, "conversations: is empty"),
        (human("x", system=3), "system: expected a string, got a number"),
        ({"messages": [{"role": "assistant", "content": "x"}], "images": ["a"]}, "images: 1 listed, but no turn of"),
    ],
)
def test_malformed_records_name_the_field(record, complaint):
    with pytest.raises(SourceError) as caught:
        parse(record)
    assert str(caught.value).startswith(complaint)


def random_value(rng, depth=0):
    kind = rng.randrange(7 if depth < 4 else 5)
    if kind == 6:
        return {f"k{n}{rng.choice(WORDS)}": random_value(rng, depth + 1) for n in range(rng.randrange(3))}
    if kind == 5:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(3))]
    return rng.choice([rng.choice(WORDS) * rng.randrange(3), rng.randrange(-5, 1000), 1.5, None, True])


WORDS = ['"', "\\", '\\"', "[", "]", "{", "}", ",", "\n", "é", "冰", "\\\\", "a", '",', "]}"]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 2**20])
def test_the_elements_of_an_array_are_found_whatever_their_texts_hold(tmp_path, monkeypatch, chunk):
    """Against `json.loads` of the whole; chunks end between any two bytes, also inside of runs of backslashes."""
    monkeypatch.setattr(files_module, "CHUNK", chunk)
    rng = random.Random(chunk)
    path = tmp_path / "x.json"
    for trial in range(25 if chunk < 64 else 100):
        values = [random_value(rng) for _ in range(rng.randrange(1, 6))]
        text = json.dumps(values, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1]))
        path.write_bytes(rng.choice([b"", b"\xef\xbb\xbf", b" \n"]) + text.encode() + rng.choice([b"", b"\n "]))
        file = DataFile(path)
        rows = find_rows(file)
        assert [read_row(file, start, end) for start, end, _ in rows.tolist()] == values, (trial, text)
        assert rows[:, 2].tolist() == list(range(1, len(values) + 1))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'[{"a": 1}, {"b": [2}', "damaged or cut off: element 2 of its array, at byte 11, is not JSON"),
        (b'[{"a": 1}, {"b": "2}]', "damaged or cut off: element 2 of its array, at byte 11, is not JSON"),
        (b'[{"a": "1}, {"b": "2"}, {"c": 3}]', "element 1 of its array, at byte 2, is not JSON"),
        (b'[{"a": 1}, {"b": 2}', "cut off after element 2 of its array"),
        (b'[{"a": 1}] [2]', "element 1 of its array, at byte 2, is not JSON (Extra data"),
        (b'[{"a": 1}] x', "element 1 of its array, at byte 2, is not JSON (Extra data"),
        (b"[", "element 1 of its array, at byte 2, is not JSON"),
        (b"[]", "holds no record"),
        (b" [ \n] ", "holds no record"),
        (b"", "holds no record"),
        (b"\xef\xbb\xbf\n \n", "holds no record"),
    ],
)
def test_damaged_and_empty_files_are_named(tmp_path, content, complaint):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(SourceError) as caught:
        make_source(DataConfig("json", {"path": str(tmp_path / "x.json")}))
    assert str(caught.value).startswith(f"{tmp_path}/x.json: ") and complaint in str(caught.value)


def test_rows_are_named_by_line_or_element(tmp_path):
    good, bad = json.dumps(human("x")), '{"conversations": 3}'
    (tmp_path / "x.jsonl").write_text(f"\n{good}\n  \n{bad}\nnot json\n{good}")
    source = make_source(DataConfig("json", {"path": str(tmp_path / "x.jsonl")}))
    assert len(source) == 4 and source.messages(3) == source.messages(0)
    for index, complaint in (
        (1, "4: conversations: expected a list, got a number"),
        (2, "5: not JSON (Expecting value"),
    ):
        with pytest.raises(SourceError) as caught:
            source.messages(index)
        assert str(caught.value).startswith(f"{tmp_path}/x.jsonl:{complaint}")
    (tmp_path / "x.json").write_text(f"[{good}, 7, {bad}, nope]")
    source = make_source(DataConfig("json", {"path": str(tmp_path / "x.json")}))
    for index, complaint in ((1, "2: record: expected an object"), (2, "3: conversations: "), (3, "4: not JSON")):
        with pytest.raises(SourceError) as caught:
            source.sizes(index)
        assert str(caught.value).startswith(f"{tmp_path}/x.json:{complaint}")


@pytest.fixture
def rooted(tmp_path):
    """A folder of images, with links inside and out, beside a secret."""
    root = tmp_path / "root"
    (root / "deep").mkdir(parents=True)
    photo().save(root / "a.png")
    photo().save(tmp_path / "secret.png")
    (tmp_path / "root-secret").mkdir()
    photo().save(tmp_path / "root-secret" / "a.png")
    (root / "deep" / "inside.png").symlink_to(root / "a.png")
    (root / "outside.png").symlink_to(tmp_path / "secret.png")
    (root / "folder").symlink_to(tmp_path)
    (root / "loop").symlink_to("loop")
    return root


@pytest.mark.parametrize("kind", ["json", "records"])
@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("a.png", ""),
        ("./deep/inside.png", ""),
        ("{root}/a.png", "not a path below the image root"),
        ("/etc/passwd", "not a path below the image root"),
        ("../secret.png", "not a path below the image root"),
        ("deep/../../secret.png", "not a path below the image root"),
        ("deep/../a.png", "not a path below the image root"),
        ("outside.png", "leads out of the image root through a link"),
        ("folder/secret.png", "leads out of the image root through a link"),
        ("folder/root-secret/a.png", "leads out of the image root through a link"),
        ("loop", "root/loop"),
        ("deep", "is a directory"),
        (".", "leads out of the image root|is a directory"),
        ("missing.png", "no such file"),
        ("", "not a path below the image root"),
        ("a\0.png", "not a path below the image root"),
        ("x" * 5000, "File name too long|no such file"),
        ("file:///etc/passwd", "not a path below the image root"),
        ("http://169.254.169.254/x.png", "not a path below the image root"),
        ("gs://bucket/a.png", "not a path below the image root"),
        ("data:image/png;base64,iVBORw0KGgo=", "a data: URI; images are not read out of texts"),
    ],
)
def test_images_are_found_below_their_root_alone(rooted, kind, name, complaint):
    path = rooted.parent / "data.jsonl"
    record = {"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": [name.format(root=rooted)]}
    path.write_text(json.dumps(record) + "\n" * 2)
    source = make_source(DataConfig(kind, {"path": str(path), "image_root": str(rooted)}))
    for look in (source.sizes, source.images, source.files):
        if not complaint:
            assert len(look(0)) == 1
            continue
        with pytest.raises(ImageRefused, match=complaint):
            look(0)


def test_a_file_that_becomes_a_link_is_refused_though_its_folder_is_known(rooted):
    root = ImageRoot(rooted)
    assert root.open("a.png", 2**20) == os.path.realpath(rooted / "a.png")
    (rooted / "a.png").rename(rooted.parent / "moved.png")
    (rooted / "a.png").symlink_to(rooted.parent / "moved.png")
    with pytest.raises(ImageRefused, match="leads out of the image root through a link"):
        root.open("a.png", 2**20)


def test_the_root_itself_may_be_a_link(rooted):
    (rooted.parent / "linked").symlink_to(rooted)
    path = rooted.parent / "data.jsonl"
    path.write_text(json.dumps(human("x", image="deep/inside.png")))
    source = make_source(DataConfig("json", {"path": str(path), "image_root": str(rooted.parent / "linked")}))
    assert source.files(0) == [(rooted / "a.png").read_bytes()]


def test_images_in_a_bucket_are_bounded_too():
    system = pytest.importorskip("fsspec").filesystem("memory")
    system.pipe("/safe/images/a.png", encode(photo()))
    system.pipe("/safe/secret.png", encode(photo()))
    lines = [human("x", image=name) for name in ("a.png", "../secret.png", "missing.png")]
    system.pipe("/safe/data.jsonl", "\n".join(map(json.dumps, lines)).encode())
    options = {"path": "memory://safe/data.jsonl", "image_root": "memory://safe/images/"}
    source = make_source(DataConfig("json", options))
    assert source.files(0) == [encode(photo())]
    for index, complaint in ((1, "not a path below"), (2, "cannot be read")):
        with pytest.raises(ImageRefused, match=complaint):
            source.sizes(index)
    with pytest.raises(ImageRefused, match="max_bytes=100"):
        make_source(DataConfig("json", options), ImageLimits(max_bytes=100)).sizes(0)


def tar_of(path, *members, **options):
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members:
            source_files.add_member(archive, name, content)
    return make_source(DataConfig("tar", {"path": str(path), "question": "What?"}))


def test_captions_of_a_shard_answer_the_question_of_the_options(tmp_path):
    source = tar_of(tmp_path / "x.tar", ("a.png", encode(photo())), ("a.txt", b"A photo."), ("a.cls", b"7"))
    assert len(source) == 1
    assert source.messages(0) == (Message("user", (ImagePart(0), "What?")), Message("assistant", ("A photo.",)))


def test_broken_samples_of_a_shard_are_named(tmp_path):
    source = tar_of(
        tmp_path / "x.tar",
        ("a.png", encode(photo())),
        ("b.txt", b"caption without an image"),
        ("b.json", b"{}"),
        ("c.json", b"[1]"),
        ("d.json", b"\xff"),
        ("e.txt", b"A.\xff"),
    )
    complaints = [
        "0 members .json and 0 .txt",
        "images: 0 listed, but 1 parts",
        "record: expected",
        "its text is not",
        "its",
    ]
    for index, complaint in enumerate(complaints):
        with pytest.raises(SourceError) as caught:
            source.messages(index)
        assert str(caught.value).startswith(f"{tmp_path}/x.tar:{index + 1}: {complaint}")


def test_shards_that_are_no_plain_tar_are_named(tmp_path):
    members = [(f"{n}.json", json.dumps(human("x")).encode()) for n in range(4)]
    content = (tar_of(tmp_path / "x.tar", *members), (tmp_path / "x.tar").read_bytes())[1]
    with tarfile.open(tmp_path / "z.tar", "w:gz") as archive:
        source_files.add_member(archive, *members[0])
    cases = {
        "z.tar": ((tmp_path / "z.tar").read_bytes(), "no tar header at byte 0 .compressed"),
        "cut.tar": (content[: 2048 + 520], "is cut off at byte"),
        "damaged.tar": (content[:1024] + b"\xff" * 512 + content[1536:], "no tar header at byte 1024;"),
        "empty.tar": (b"\0" * 10240, "holds no member"),
    }
    for name, (data, complaint) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SourceError, match=complaint):
            make_source(DataConfig("tar", {"path": str(tmp_path / name)}))


def test_links_and_folders_in_a_shard_are_no_samples(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, kind in (("a.json", tarfile.SYMTYPE), ("b.json", tarfile.LNKTYPE), ("c.json", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        source_files.add_member(archive, ".d.json", b"what some systems add")
        source_files.add_member(archive, "d.json", json.dumps(human("x")).encode())
    source = make_source(DataConfig("tar", {"path": str(tmp_path / "x.tar")}))
    assert len(source) == 1 and source.messages(0)


def test_a_file_that_has_become_shorter_is_an_error_of_its_rows(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps(human(f"{n}")) for n in range(4)))
    source = make_source(DataConfig("json", {"path": str(path)}))
    os.truncate(path, 100)
    with pytest.raises(SourceError, match="not JSON"):
        source.messages(3)


def test_many_rows_open_as_a_mapped_index(tmp_path):
    path, count = tmp_path / "x.json", 50_000
    path.write_text("[" + ",".join(json.dumps(human(f"<image>{n}", image=f"{n}.png")) for n in range(count)) + "]")
    options = DataConfig("json", {"path": str(path)})
    make_source(options)
    tracemalloc.start()
    source = make_source(options)
    assert len(source) == count and source.messages(count - 1)[0].parts == (ImagePart(0), str(count - 1))
    assert tracemalloc.get_traced_memory()[1] < 2**19  # not even ten bytes per row
    tracemalloc.stop()
    assert isinstance(source._rows[0].base, np.memmap)


def test_the_examples_of_the_documentation_are_read():
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    (lines,) = re.findall("```json\n(.*?)```", page, re.DOTALL)
    shown = [
        sum(isinstance(part, ImagePart) for part in parse(json.loads(line))[0][0].parts) for line in lines.splitlines()
    ]
    assert shown == [1, 2, 1, 1]
    configs = re.findall('```python\n"data": (.*?),?\n```', page, re.DOTALL)
    assert [check_data(DataConfig(**ast.literal_eval(config))) is not None for config in configs] == [True, True]
    for name in COUNTERS:
        assert f"`data/{name}`" in page
    for name in SOURCES:
        assert f"| `{name}` |" in page
