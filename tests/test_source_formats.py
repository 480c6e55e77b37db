"""Every format of data gives the same batches, bit for bit, as the LLaVA JSON form of the same samples."""

import dataclasses
import functools
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
import source_files
from pipelines import equal, iterator, take

from uhd_jax.config import ConfigError, DataConfig
from uhd_jax.data.chat import encode_chat
from uhd_jax.data.sources import SourceError, make_source
from uhd_jax.data.tokenizer import byte_tokenizer
from uhd_jax.slicing.plan import plan_image

WRITE = {
    "LLaVA JSON": ("json", source_files.write_llava),
    "MiniCPM-V JSON": ("json", source_files.write_pretty),
    "LLaVA lines": ("json", functools.partial(source_files.write_lines, form=source_files.llava)),
    "messages with marks": ("json", functools.partial(source_files.write_lines, form=source_files.sharegpt)),
    "messages with parts": ("json", functools.partial(source_files.write_lines, form=source_files.parts)),
    "records": ("records", functools.partial(source_files.write_lines, form=source_files.parts)),
    "parquet of LLaVA-OneVision": (
        "parquet",
        lambda folder: source_files.write_parquet(folder, source_files.rows_with_bytes()),
    ),
    "parquet of FineVision": (
        "parquet",
        lambda folder: source_files.write_parquet(folder, source_files.finevision_rows()),
    ),
    "datasets on disk": ("arrow", lambda folder: source_files.write_arrow(folder, source_files.rows_with_bytes())),
    "WebDataset": ("tar", source_files.write_tar),
    "WebDataset, long names": (
        "tar",
        functools.partial(source_files.write_tar, format=tarfile.GNU_FORMAT, deep="long/" * 60),
    ),
    "WebDataset, ustar prefix": (
        "tar",
        functools.partial(source_files.write_tar, format=tarfile.USTAR_FORMAT, deep="long/" * 24),
    ),
    "ArrayRecord": (
        "array_record",
        lambda folder: source_files.write_array_record(folder, opened(folder / "llava", "LLaVA JSON")),
    ),
}


def opened(folder, name):
    folder.mkdir(exist_ok=True)
    kind, write = WRITE[name]
    return make_source(DataConfig(kind, write(folder)))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("llava"), "LLaVA JSON")


@pytest.fixture(scope="module")
def expected(llava):
    batches = iterator(llava, **STAGE)
    found = [batch for batch, _ in take(batches, 6)]
    batches.close()
    return found


STAGE = {"packed_length": 700, "rows": 2, "max_slices": 4}


@pytest.mark.parametrize("name", WRITE)
def test_every_format_gives_the_same_batches(tmp_path, name, llava, expected):
    source = opened(tmp_path / "data", name)
    assert len(source) == len(llava) == len(source_files.SAMPLES)
    for index, sample in enumerate(source_files.SAMPLES):
        assert source.files(index) == [source_files.image_bytes(image) for image in sample[0]]
        assert source.sizes(index) == llava.sizes(index) == [image.shape[:2] for image in source.images(index)]
    where = [source.where(index) for index in range(len(source))]
    assert len(set(where)) == len(where)
    batches = iterator(source, **STAGE)
    infos = []
    for reference in expected:
        batch, info = next(batches)
        infos.append(info)
        assert equal(batch, reference)
    assert infos[-1].images > 0 and not any(infos[-1].counters.values())
    batches.close()


@pytest.mark.parametrize("name", WRITE)
def test_sources_of_files_pickle_as_their_names(tmp_path, name):
    source = opened(tmp_path / "data", name)
    source.messages(3)
    pickled = pickle.dumps(source)
    assert len(pickled) < 1000
    copy = pickle.loads(pickled)
    assert copy.messages(3) == source.messages(3) and copy.files(3) == source.files(3)


def test_marks_in_texts_stay_texts(llava):
    """The samples hold `<|im_end|>`, `<slice>` and `<|im_start|>` in their texts."""
    from pipelines import MODEL

    tokenizer = byte_tokenizer(MODEL.chat)
    for index in (3, 4):
        plans = [plan_image(size, MODEL, max_slices=4) for size in llava.sizes(index)]
        sample = encode_chat(llava.messages(index), plans, tokenizer, MODEL.chat)
        turns = len(llava.messages(index))
        for mark, count in ((MODEL.chat.turn_start, turns), (MODEL.chat.turn_end, turns)):
            assert (sample.tokens == tokenizer.special(mark)).sum() == count
        slices = sum(len(plan.views) - 1 for plan in plans)
        assert (sample.tokens == tokenizer.special(MODEL.chat.slice_start)).sum() == slices
        assert (sample.tokens == tokenizer.special(MODEL.chat.placeholder)).sum() == sum(p.visual_tokens for p in plans)
        text = tokenizer.decode(sample.tokens, skip_special=False)
        assert ("<|im_end|> are" if index == 3 else "<slice> <|im_start|>") in text


def test_indices_are_stored_beside_the_file_and_made_anew_when_it_changes(tmp_path, monkeypatch):
    from uhd_jax.data.sources import json_file

    options = source_files.write_lines(tmp_path, source_files.llava)
    made = []

    def find_rows(file):
        made.append(file.path)
        return find(file)

    find = json_file.find_rows
    monkeypatch.setattr(json_file, "find_rows", find_rows)
    assert len(make_source(DataConfig("json", options))) == len(make_source(DataConfig("json", options))) == 8
    assert len(made) == 1 and (tmp_path / ".data.jsonl.rows.npy").is_file()
    with open(options["path"], "a") as file:
        file.write("\n{}\n")
    assert len(make_source(DataConfig("json", options))) == 9 and len(made) == 2
    (tmp_path / ".data.jsonl.rows.npy").write_bytes(b"\x93NUMPY damaged")
    assert len(make_source(DataConfig("json", options))) == 9 and len(made) == 3


def test_where_nothing_can_be_written_beside_the_file_the_index_goes_to_the_cache(tmp_path, monkeypatch):
    from uhd_jax.data.sources import stored

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = source_files.write_lines(tmp_path / "data", source_files.llava)
    (tmp_path / "data" / ".data.jsonl.rows.npy").mkdir()  # cannot be replaced by a file
    assert len(make_source(DataConfig("json", options))) == 8
    assert [path.suffix for path in (tmp_path / "cache" / "uhd_jax").iterdir()] == [".npy"]
    monkeypatch.setattr(stored, "_store", None)  # is not needed again
    assert len(make_source(DataConfig("json", options))) == 8


def test_data_in_a_bucket(llava):
    """`memory://` stands for `gs://`: the same door."""
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    folder = os.path.dirname(llava.where(0).rpartition(":")[0])
    system.put(folder, "/bucket", recursive=True)
    options = {"path": "memory://bucket/llava.json", "image_root": "memory://bucket/images"}
    source = make_source(DataConfig("json", options))
    for index in range(len(llava)):
        assert source.messages(index) == llava.messages(index) and source.files(index) == llava.files(index)
    for suffix, name in (("tar", "WebDataset"), ("parquet", "parquet of FineVision")):
        local = llava  # the samples are the same
        path = f"{folder}/../{suffix}"
        os.makedirs(path, exist_ok=True)
        from pathlib import Path

        kind, write = WRITE[name]
        write(Path(path))
        system.put(path, f"/bucket/{suffix}", recursive=True)
        there = make_source(DataConfig(kind, {"path": f"memory://bucket/{suffix}"}))
        assert [there.files(index) for index in range(8)] == [local.files(index) for index in range(8)]
        assert there.where(7).startswith("memory://")


@pytest.mark.parametrize(
    ("kind", "path", "complaint"),
    [
        ("json", "https://example.org/x.json", "data is not read from https://"),
        ("json", "file:///etc/passwd", "data is not read from file://"),
        ("json", "nowhere.json", "no such file, nor a folder or pattern"),
        ("parquet", "nowhere/*.parquet", "no such file, nor a folder or pattern"),
        ("tar", "nowhere", "no such file"),
        ("arrow", "nowhere", r"state\.json: cannot be read"),
    ],
)
def test_data_that_cannot_be_opened_is_named(tmp_path, monkeypatch, kind, path, complaint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=complaint):
        make_source(DataConfig(kind, {"path": path}))


def test_a_missing_library_names_the_extra(tmp_path, monkeypatch):
    import sys

    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    for path in (str(tmp_path), "gs://bucket/x"):
        with pytest.raises(SourceError, match=r"needs the package \w+: pip install 'uhd-jax\[data\]'"):
            make_source(DataConfig("parquet", {"path": path}))


def test_a_dataset_with_splits_asks_for_one(tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(SourceError, match="has the splits train, test; name one"):
        make_source(DataConfig("arrow", {"path": str(tmp_path)}))


def test_the_real_datasets_library_writes_what_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(source_files.rows_with_bytes()).save_to_disk(tmp_path / "saved")
    source = make_source(DataConfig("arrow", {"path": str(tmp_path / "saved")}))
    assert source.files(3) == [source_files.image_bytes(name) for name in ("coins.png", "logo.png")]


def test_parquet_keeps_few_row_groups(tmp_path, monkeypatch):
    from uhd_jax.data.sources import parquet

    read, real = [], parquet._read_group
    monkeypatch.setattr(parquet, "_read_group", lambda *place: read.append(place) or real(*place))
    folder = tmp_path / "data"
    folder.mkdir()
    options = source_files.write_parquet(folder, source_files.finevision_rows()) | {"row_groups": 1}
    source = make_source(DataConfig("parquet", options))
    assert read == []
    for index in (0, 1, 2, 0, 3, 0):
        source.messages(index)
    assert len(read) == 3  # the first group, the second, the first again
    with pytest.raises(ConfigError, match=r"data\.options\.row_groups: must be at least 1"):
        make_source(DataConfig("parquet", options | {"row_groups": 0}))


def test_options_are_plain(llava):
    assert dataclasses.is_dataclass(llava._options)
    np.testing.assert_array_equal(llava._rows[0][:, 2], np.arange(1, 9))


def test_json_files_follow_each_other_in_the_order_of_their_names(tmp_path):
    source_files.write_images(tmp_path)
    for name, samples in (("b", source_files.SAMPLES[3:]), ("a", source_files.SAMPLES[:3])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(source_files.llava(one)) for one in samples))
    for path in (tmp_path, tmp_path / "*.jsonl"):
        source = make_source(DataConfig("json", {"path": str(path)}))
        said = [source.messages(index)[1].parts for index in range(len(source))]
        assert said == [(sample[2],) for sample in source_files.SAMPLES]
        assert [source.where(index) for index in (2, 3)] == [f"{tmp_path}/a.jsonl:3", f"{tmp_path}/b.jsonl:1"]


@pytest.mark.parametrize("kind", ["json", "parquet"])
@pytest.mark.parametrize("pattern", ["", "*/t.*"])
def test_files_of_several_folders_have_each_its_own_images(tmp_path, kind, pattern):
    """Both hold an image of the same name."""
    record = source_files.llava((["1.img"], "What is this?", "This."))
    for folder, image in (("a", "china.jpg"), ("b", "coins.png")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.img").write_bytes(source_files.image_bytes(image))
        if kind == "json":
            (tmp_path / folder / "t.jsonl").write_text(json.dumps(record))
        else:
            source_files.write_parquet(tmp_path / folder, [record, record])
            os.rename(tmp_path / folder / "part-0.parquet", tmp_path / folder / "t.parquet")
            os.remove(tmp_path / folder / "part-1.parquet")
    source = make_source(DataConfig(kind, {"path": str(tmp_path / pattern)}))
    found = [source.files(index) for index in range(2)]
    assert found == [[source_files.image_bytes(name)] for name in ("china.jpg", "coins.png")]
    one = make_source(DataConfig(kind, {"path": str(tmp_path / pattern), "image_root": str(tmp_path / "b")}))
    assert one.files(0) == one.files(1) == [source_files.image_bytes("coins.png")]
