"""Opening checkpoints: what is read, and what is refused before or while it is read."""

from __future__ import annotations

import json
import os
import shutil
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from uhd_jax.convert.source import open_source, read_header
from uhd_jax.convert.tables import ConvertError
from uhd_jax.convert.tensors import INDEX
from uhd_jax.convert.writer import write_safetensors

RANDOM = np.random.default_rng(0)
TENSORS = {
    "a.weight": RANDOM.normal(size=(3, 5)).astype(np.float32),
    "b.weight": RANDOM.normal(size=(7,)).astype(jnp.bfloat16),
    "c": RANDOM.normal(size=()).astype(np.float16),
    "d.ids": np.arange(4),
}


def sharded(folder):
    """Two shards and their index."""
    names = sorted(TENSORS)
    files = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, own in files.items():
        save_file({name: TENSORS[name] for name in own}, folder / file)
    placed = {name: file for file, own in files.items() for name in own}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


def rewrite(file, change):
    """Replaces the header of a file by what `change` makes of it."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    text = change(json.loads(data[8 : 8 + length]))
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def refuses(path, *parts, allow_pickle=False):
    with pytest.raises(ConvertError) as raised:
        open_source(path, allow_pickle)
    for part in parts:
        assert part in str(raised.value)


def test_reads_what_was_written_whole_or_in_shards(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "two").mkdir()
    unindexed = sharded(tmp_path / "two")
    for path in (tmp_path, tmp_path / "model.safetensors", unindexed):
        with open_source(path) as source:
            assert set(source.tensors) == set(TENSORS)
            for name, tensor in TENSORS.items():
                assert source.tensors[name].shape == tensor.shape and source.tensors[name].dtype == tensor.dtype
                found = source.read(name)
                assert found.dtype == tensor.dtype and found.tobytes() == tensor.tobytes()
    (unindexed / INDEX).unlink()
    assert set(open_source(unindexed).tensors) == set(TENSORS)


def test_files_beside_the_weights(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "bad.json").write_text("{")
    for source in (open_source(tmp_path), open_source(tmp_path / "model.safetensors")):
        assert source.has("config.json") and not source.has("other.json")
        assert source.json("config.json") == {"model_type": "x"}
        for name, words in {"other.json": "no such file", "list.json": "holds list", "bad.json": "not JSON"}.items():
            with pytest.raises(ConvertError, match=f"{name}: {words}"):
                source.json(name)


def test_nothing_to_read(tmp_path):
    refuses(tmp_path / "absent", "absent: no such file or folder")
    refuses(tmp_path, "no weights there")
    (tmp_path / "model.json").write_text("{}")
    refuses(tmp_path, "no weights there", "a model of uhd-jax already")
    for name in "ab":
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    refuses(tmp_path, "which of a.safetensors, b.safetensors")


def test_one_shard_is_missing(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refuses(tmp_path, INDEX, "names files that are not there: model-00002-of-00002.safetensors")
    (tmp_path / INDEX).unlink()
    refuses(tmp_path, "shards are missing: model-00002-of-00002.safetensors")


def test_many_shards_are_missing(tmp_path):
    save_file(TENSORS, tmp_path / "model-00001-of-99999.safetensors")
    refuses(tmp_path, "shards are missing: model-00002-of-99999", "model-00009-of-99999.safetensors and 99990 more")


def test_what_is_no_file(tmp_path):
    """A pipe would be waited for without end."""
    os.mkfifo(tmp_path / "model.safetensors")
    refuses(tmp_path, "model.safetensors is no file")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("absent")
    refuses(tmp_path, "model.safetensors is no file, or a link to nothing")


def test_an_index_that_does_not_fit_its_files(tmp_path):
    index = json.loads((sharded(tmp_path) / INDEX).read_text())

    def with_map(**changes):
        placed = {name: file for name, file in (index["weight_map"] | changes).items() if file is not None}
        (tmp_path / INDEX).write_text(json.dumps(index | {"weight_map": placed}))

    with_map(**{"e.weight": "model-00001-of-00002.safetensors", "a.weight": None})
    refuses(tmp_path, "e.weight is not in model-00001", "a.weight of model-00001-of-00002.safetensors is not in the in")
    with_map(**{"a.weight": "model-00002-of-00002.safetensors"})
    refuses(tmp_path, "a.weight is not in model-00002-of-00002.safetensors")
    with_map(**{"a.weight": "../other.safetensors"})
    refuses(tmp_path, "'../other.safetensors', which is not the name of a file beside the index")
    (tmp_path / INDEX).write_text("{}")
    refuses(tmp_path, "no weight_map")


def test_a_tensor_in_two_files(tmp_path):
    sharded(tmp_path)
    save_file(TENSORS, tmp_path / "model-00002-of-00002.safetensors")
    refuses(tmp_path, "a.weight is both in", "model-00001-of-00002", "model-00002-of-00002")


@pytest.mark.parametrize("length", [0, 5, 100, -1, -20])
def test_truncated(tmp_path, length):
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    file.write_bytes(file.read_bytes()[:length])
    refuses(tmp_path, str(file), "truncated", "download it again")


def test_no_safetensors_at_all(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refuses(tmp_path, "Git LFS pointer", "git lfs pull")
    file.write_bytes(struct.pack("<Q", 4) + b"\xff\xff{}")
    refuses(tmp_path, str(file), "header is damaged")
    file.write_bytes(struct.pack("<Q", 2) + b"[]")
    refuses(tmp_path, str(file), "header is damaged")


def lie(**changes):
    return lambda header: header | {"a.weight": header["a.weight"] | changes}


@pytest.mark.parametrize(
    "change, words",
    [
        (lie(shape=[3, 6]), "its header lies: a.weight, F32[3, 6], takes 72 bytes, its offsets 60"),
        (lie(shape=[-3, -5]), "its header lies: a.weight has shape [-3, -5]"),
        (lie(shape=[3.0, 5]), "its header lies: a.weight has shape [3.0, 5]"),
        (lie(dtype="F16"), "its header lies: a.weight, F16[3, 5], takes 30 bytes, its offsets 60"),
        (lie(dtype="F4"), "a.weight has dtype F4; known are F64"),
        (lie(data_offsets=[0, 60]), "its header lies: "),
        (lie(data_offsets=[10**6, 10**6 + 60]), "its header lies: b.weight begins at byte"),
        (lie(data_offsets=[60, 0]), "its header lies"),
        (lambda header: {k: v for k, v in header.items() if k != "c"}, "its header "),
        (lambda header: header | {"a.weight": 3}, "header is damaged"),
        (lambda header: {"d.ids": header["d.ids"]}, "bytes after the last tensor"),
        (
            lambda header: json.dumps(header).replace('"b.weight"', '"a.weight"').encode(),
            "its header names a.weight twice",
        ),
    ],
)
def test_a_header_that_lies(tmp_path, change, words):
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    rewrite(file, change)
    refuses(tmp_path, str(file), words)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, jnp.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(tmp_path, dtype, value):
    tensor = np.ones((300, 7), dtype)
    largest = jnp.finfo(dtype).max
    tensor[0, 0], tensor[1, 1] = largest, -largest
    save_file({"fine": tensor}, tmp_path / "model.safetensors")
    assert open_source(tmp_path).read("fine").max() == largest
    tensor[299, 3] = value
    save_file({"layer.weight": tensor}, tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    with pytest.raises(ConvertError, match=rf"model.safetensors: layer.weight holds {value} at \[299, 3\]"):
        source.read("layer.weight")


def test_a_file_that_becomes_shorter(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    source = open_source(tmp_path)
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(ConvertError, match="became shorter while it was read: "):
        [source.read(name) for name in TENSORS]


def items(tensors):
    return [(name, tensor, lambda tensor=tensor: tensor) for name, tensor in tensors.items()]


def test_what_is_written_is_read_by_the_format_s_own_library(tmp_path):
    write_safetensors(tmp_path, items(TENSORS))
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", framework="np") as reader:
        assert reader.metadata() == {"format": "pt"}
        for name, tensor in TENSORS.items():
            assert reader.get_tensor(name).tobytes() == tensor.tobytes()
    for info in read_header(tmp_path / "model.safetensors").values():
        assert info.offset % info.dtype.itemsize == 0


def test_shards_are_small_enough_and_indexed(tmp_path):
    tensors = {f"layer.{n}": np.full((50, n + 1), n, np.float32) for n in range(12)}
    write_safetensors(tmp_path, items(tensors), max_shard_bytes=5000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and all(file.name.endswith(f"-of-{len(files):05d}.safetensors") for file in files)
    assert all(file.stat().st_size <= 5000 for file in files)
    assert json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"] == sum(
        t.nbytes for t in tensors.values()
    )
    source = open_source(tmp_path)
    assert set(source.tensors) == set(tensors)
    assert all((source.read(name) == tensor).all() for name, tensor in tensors.items())
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    write_safetensors(tmp_path, items(tensors), max_shard_bytes=1)  # every tensor is larger
    assert len(list(tmp_path.glob("*.safetensors"))) == len(tensors)


def test_tensors_that_are_not_what_was_said(tmp_path):
    with pytest.raises(ConvertError, match="a.weight would be written twice"):
        write_safetensors(tmp_path, items({"a.weight": np.ones(2)}) * 2)
    with pytest.raises(ConvertError, match="a.weight became float32"):
        write_safetensors(tmp_path, [("a.weight", np.ones(2), lambda: np.ones(2, np.float32))])
