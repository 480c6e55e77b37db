"""The index of a source: what it knows is what encoding would say, and it is made anew when the data has changed."""

from __future__ import annotations

import dataclasses
import json
import os

import numpy as np
import pytest
from data_files import write_records
from image_files import png_of

from uhd_jax.config import ChatConfig, DataConfig, ImageLimits, SlicingConfig
from uhd_jax.data import index as indexing
from uhd_jax.data.chat import ImagePart, Message, encode_chat
from uhd_jax.data.index import data_stamp, index_path, open_index
from uhd_jax.data.known import REFERENCE, BlockTokens
from uhd_jax.data.sources import make_source
from uhd_jax.data.tokenizer import load_tokenizer
from uhd_jax.data.windows import MALFORMED, REFUSED
from uhd_jax.slicing.plan import Size, make_plan

SIZES = (Size(100, 90), Size(900, 1400), Size(300, 2000), Size(50, 60))


def data_of(path):
    return DataConfig("json", {"path": str(path)})


@pytest.mark.parametrize(
    "chat",
    [
        ChatConfig(),
        ChatConfig(use_image_id=False, system="Be brief.", empty_think=True),
        ChatConfig(template="vicuna_v1", layout="A", turn_end="<|im_end|>"),
        ChatConfig(template="vicuna_v1", layout="A", schema=False),
        ChatConfig(template="plain", layout="A"),
        ChatConfig(train_turn_marks=True),
    ],
    ids=lambda chat: f"{chat.template} {chat.layout} {chat.schema} {chat.train_turn_marks} {chat.empty_think}",
)
def test_lengths_are_those_of_encoding(chat):
    tokenizer = load_tokenizer("bytes", chat)
    plans = [make_plan(size, SlicingConfig(), 14, 2) for size in SIZES]
    assert {bool(plan.slices) for plan in plans} == {True, False}
    parts = tuple(ImagePart(number) for number in range(len(plans)))
    messages = (Message("user", (*parts, "So?")), Message("assistant", ("Thus.\n1, 2",)))
    reference = len(encode_chat(messages, [REFERENCE] * len(plans), tokenizer, chat).tokens)
    together = reference + sum(map(BlockTokens(tokenizer, chat).of, plans))
    assert together == len(encode_chat(messages, plans, tokenizer, chat).tokens)


def test_sizes_texts_and_troubles(tmp_path):
    path = write_records(tmp_path)
    chat = ChatConfig()
    index, made = open_index(data_of(path), [chat])
    assert made and len(index) == 60
    records = [json.loads(line) for line in path.read_text().splitlines()]
    sizes = [len(record.get("images", [])) for record in records]
    sizes[5] = sizes[11] = 0
    np.testing.assert_array_equal(index.images, sizes)
    assert list(index.troubles) == [5, 11]
    assert index.troubles[11].counter == MALFORMED and "'bot'" in index.troubles[11].reason
    assert np.flatnonzero(~index.answered).tolist() == [5, 9, 11]
    assert index.troubles[5].counter == REFUSED and "absent.png: no such file" in index.troubles[5].reason
    (texts,) = index.texts.values()
    assert texts.trained[3] == 0 < texts.tokens[3] and texts.tokens[5] == 0
    answer = records[7]["messages"][1]["content"].strip()
    assert texts.trained[7] == len(answer) + 1  # bytes, and the mark of the end


def test_what_the_prompt_form_cannot_take_is_said(tmp_path):
    path = write_records(tmp_path)
    index, _ = open_index(data_of(path), [ChatConfig(template="plain"), ChatConfig()])
    plain, chatml = index.texts.values()
    assert not chatml.troubles and plain.troubles[3].counter == MALFORMED and "plain" in plain.troubles[3].reason
    assert plain.tokens[3] == 0


def test_images_that_the_messages_do_not_show_are_said(tmp_path, monkeypatch):
    source = make_source(data_of(write_records(tmp_path)))
    monkeypatch.setattr(source, "sizes", lambda sample: [Size(8, 8)] * 4)
    measured = indexing.measure(source, 0, {})
    assert measured.trouble.counter == MALFORMED and "4 images, but the messages show" in measured.trouble.reason


def test_workers_make_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "STRETCH", 16)
    data, done = data_of(write_records(tmp_path)), []
    alone, _ = open_index(data, [ChatConfig()], progress=lambda *counts: done.append(counts))
    assert done == [(16, 60), (32, 60), (48, 60), (60, 60)]
    shared, _ = open_index(data, [ChatConfig()], processes=2)
    assert shared.troubles == alone.troubles and shared.texts.keys() == alone.texts.keys()
    for key, texts in alone.texts.items():
        np.testing.assert_array_equal(shared.texts[key].tokens, texts.tokens)
        np.testing.assert_array_equal(shared.texts[key].trained, texts.trained)
    np.testing.assert_array_equal(shared.sizes, alone.sizes)
    np.testing.assert_array_equal(shared.starts, alone.starts)


def test_kept_and_used_again(tmp_path):
    path = write_records(tmp_path)
    data = data_of(path)
    kept = index_path(data)
    assert kept == tmp_path / "train.jsonl.uhd-index.npz"
    first, made = open_index(data, [ChatConfig()], path=kept)
    again, made_again = open_index(data, [ChatConfig()], path=kept)
    assert (made, made_again) == (True, False)
    assert again.troubles == first.troubles and again.texts.keys() == first.texts.keys()
    np.testing.assert_array_equal(again.sizes, first.sizes)
    assert again.sizes_of(7) == first.sizes_of(7)


def test_another_prompt_form_is_added_without_reading_sizes(tmp_path, monkeypatch):
    data = data_of(write_records(tmp_path))
    kept = index_path(data)
    open_index(data, [ChatConfig()], path=kept)
    monkeypatch.setattr(indexing, "_COMPARED", 0)
    for file in tmp_path.glob("*.png"):
        file.unlink()
    both, made = open_index(data, [ChatConfig(), ChatConfig(system="Be brief.")], path=kept)
    assert made and len(both.texts) == 2 and len(both.sizes) and list(both.troubles) == [5, 11]
    first, second = both.texts.values()
    assert np.flatnonzero(second.tokens <= first.tokens).tolist() == [5, 11]
    assert not open_index(data, [ChatConfig(system="Be brief.")], path=kept)[1]


def changed_text(path):
    path.write_text(path.read_text().replace("Words", "Wordy", 1))


def changed_image(path):
    name = json.loads(path.read_text().splitlines()[0])["images"]
    path.with_name(name[0]).write_bytes(png_of(8, 8))


def damaged(path):
    index_path(data_of(path)).write_bytes(b"PK\x03\x04 and no more")


@pytest.mark.parametrize("change", [changed_text, changed_image, damaged])
def test_made_anew_when_the_data_has_changed(tmp_path, change):
    path = write_records(tmp_path, seed=1)
    data = data_of(path)
    open_index(data, [ChatConfig()], path=index_path(data))
    change(path)
    assert open_index(data, [ChatConfig()], path=index_path(data))[1]
    assert not open_index(data, [ChatConfig()], path=index_path(data))[1]


def test_a_mixture_is_the_indices_of_its_parts(tmp_path):
    folders = tmp_path / "a", tmp_path / "b"
    parts = []
    for seed, folder in enumerate(folders):
        folder.mkdir()
        options = {"path": str(write_records(folder, 30 + seed, seed))}
        parts.append({"name": folder.name, "source": "json", "options": options, "weight": 1.0})
    index, made = open_index(DataConfig("mixture", {"parts": parts}), [ChatConfig()])
    assert made and index.parts == (30, 31) and list(index.troubles) == [5, 11, 35, 41]
    second, made = open_index(
        data_of(folders[1] / "train.jsonl"), [ChatConfig()], path=index_path(data_of(folders[1] / "train.jsonl"))
    )
    assert not made
    (texts,), (expected,) = index.texts.values(), second.texts.values()
    np.testing.assert_array_equal(texts.tokens[30:], expected.tokens)
    assert index.sizes_of(36) == second.sizes_of(6) and index.answered[30:].tolist() == second.answered.tolist()


def test_a_pattern_has_a_place(tmp_path):
    write_records(tmp_path)
    data = data_of(tmp_path / "tr*.jsonl")
    assert index_path(data) == tmp_path / "tr_.jsonl.uhd-index.npz"
    before = data_stamp(data)
    assert data_stamp(data) == before
    (tmp_path / "train2.jsonl").write_text("{}")
    assert data_stamp(data) != before
    assert index_path(data_of(tmp_path / "*/train.jsonl")) is None


@pytest.mark.parametrize(
    ("source", "name"),
    [("json", ""), ("json", "*/train.jsonl"), ("records", "deep/train.jsonl")],
)
def test_files_in_further_folders_have_their_part_in_the_stamp(tmp_path, source, name):
    (tmp_path / "deep").mkdir()
    path = write_records(tmp_path / "deep")
    data = dataclasses.replace(data_of(tmp_path / name), source=source)
    before = data_stamp(data)
    (tmp_path / "deep/other.txt").write_text("no rows")
    assert data_stamp(data) == before
    path.write_text(path.read_text().replace("Words", "Wordy", 1))
    os.utime(path, ns=(0, 0))
    assert data_stamp(data) != before


def test_images_behind_links_have_their_part_in_the_stamp(tmp_path):
    """And nothing else: neither other files, nor links to nowhere."""
    (tmp_path / "far").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images/linked").symlink_to(tmp_path / "far")
    (tmp_path / "images/gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "far/a.png").write_bytes(b"one")
    data = DataConfig("images", {"path": str(tmp_path / "images")})
    before = data_stamp(data)
    (tmp_path / "images/notes.txt").write_text("no image")
    assert data_stamp(data) == before
    (tmp_path / "far/a.png").write_bytes(b"another")
    assert data_stamp(data) != before


def test_files_in_a_bucket_have_their_part_in_the_stamp():
    system = pytest.importorskip("fsspec").filesystem("memory")
    data = data_of("memory://stamped")
    stamps = []
    for content in (b"{}", b"[]"):
        system.pipe("/stamped/deep/t.json", content)
        stamps.append(data_stamp(data))
    assert stamps[0] != stamps[1] == data_stamp(data)


def test_made_anew_for_other_limits(tmp_path):
    data = data_of(write_records(tmp_path))
    open_index(data, [], path=index_path(data))
    small, made = open_index(data, [], ImageLimits(max_side=200), index_path(data))
    assert made and len(small.troubles) > 10


def test_a_source_without_files_has_no_place_for_an_index(tmp_path):
    assert index_path(DataConfig("digit_pages", {"task": "cell"})) is None
    assert index_path(DataConfig("images", {"path": str(tmp_path)})) == tmp_path / "data.uhd-index.npz"


def test_nothing_is_left_of_an_index_that_cannot_be_written(tmp_path, monkeypatch):
    data = data_of(write_records(tmp_path))

    def full(file, **_):
        file.write(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space"):
        open_index(data, [], path=index_path(data))
    assert not [name for name in os.listdir(tmp_path) if "uhd-index" in name]
