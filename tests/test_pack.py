"""`data.pack`: everything of a source comes out of the folder again, also when packing was interrupted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_files import write_records
from image_files import SAVE, encode, photo

from uhd_jax.config import DataConfig
from uhd_jax.data import pack as packing
from uhd_jax.data.pack import PackError, pack
from uhd_jax.data.sources import SourceError, make_source
from uhd_jax.data.windows import MALFORMED, REFUSED
from uhd_jax.data.workers import WorkerError
from uhd_jax.slicing.plan import ImageRefused

ROOT = Path(__file__).parents[1]


def data_of(path):
    return DataConfig("json", {"path": str(path)})


def packed(folder):
    return make_source(DataConfig("array_record", {"path": str(folder)}))


def assert_holds(folder, data, left_out=()):
    source, found = make_source(data), packed(folder)
    kept = [sample for sample in range(len(source)) if sample not in left_out]
    assert len(found) == len(kept)
    for number, sample in enumerate(kept):
        assert found.messages(number) == source.messages(sample)
        assert found.sizes(number) == source.sizes(sample)
        assert found.files(number) == source.files(sample)


def test_everything_comes_out_again(tmp_path):
    data = data_of(write_records(tmp_path))
    done = []
    summary = pack(data, tmp_path / "out", shard_samples=16, progress=lambda *counts: done.append(counts))
    assert_holds(tmp_path / "out", data, left_out=[5, 11])
    assert summary["complete"] and (summary["samples"], summary["shards"]) == (58, 4)
    assert summary["skipped"] == {REFUSED: 1, MALFORMED: 1} and done[-1] == (60, 60)
    lost = tmp_path / "out/data-00001-of-00004.arrayrecord"
    lost.rename(tmp_path / "lost")
    with pytest.raises(PackError, match="only 3 of 4 shards are there; bring back those that were lost"):
        pack(data, tmp_path / "out", shard_samples=16)
    (tmp_path / "lost").rename(lost)
    assert pack(data, tmp_path / "out", shard_samples=16) == summary
    line, other = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert line["sample"] == 5 and line["where"].endswith("train.jsonl:6") and "absent.png" in line["reason"]
    assert other["sample"] == 11 and "'bot'" in other["reason"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *(f"data-0000{shard}-of-00004.arrayrecord" for shard in range(4)),
        "pack.json",
        "skipped.jsonl",
    ]


def test_a_whole_pack_may_be_read_only(tmp_path, monkeypatch):
    data, folder = data_of(write_records(tmp_path)), tmp_path / "out"
    summary = pack(data, folder)
    monkeypatch.setattr(packing.os, "access", lambda path, mode: False)
    monkeypatch.setattr(packing.fcntl, "flock", lambda *_: pytest.fail("opens its lock"))
    assert pack(data, folder) == summary


def test_files_are_kept_byte_for_byte(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for format, options in SAVE.items():
        (folder / f"a.{format.lower()}").write_bytes(encode(photo(), format, **options))
    data = DataConfig("images", {"path": str(folder)})
    pack(data, tmp_path / "out")
    found = packed(tmp_path / "out")
    assert [found.files(number) for number in range(6)] == [[p.read_bytes()] for p in sorted(folder.iterdir())]
    source = make_source(data)
    for number in range(6):
        np.testing.assert_array_equal(found.images(number)[0], source.images(number)[0])


def test_damaged_pixels_are_kept_for_training_to_count(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/cut.jpg").write_bytes(encode(photo(200, 300), "JPEG")[:3000])
    summary = pack(DataConfig("images", {"path": str(tmp_path / "images")}), tmp_path / "out")
    assert summary["samples"] == 1
    with pytest.raises(ImageRefused):
        packed(tmp_path / "out").images(0)


def test_malformed_samples_are_counted_apart(tmp_path, monkeypatch):
    data = data_of(write_records(tmp_path))
    monkeypatch.setattr("uhd_jax.data.sources.JsonFiles.files", lambda self, index: [b""] if index == 3 else [])
    summary = pack(data, tmp_path / "out")
    assert summary["skipped"][MALFORMED] >= 2 and summary["skipped"][REFUSED] == 1


def test_processes_write_the_same(tmp_path):
    data = data_of(write_records(tmp_path))
    pack(data, tmp_path / "one", shard_samples=16)
    pack(data, tmp_path / "two", shard_samples=16, processes=2)
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").glob("*.arrayrecord")}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").glob("*.arrayrecord")}


class Killed(BaseException):
    pass


def test_goes_on_with_the_shards_that_are_missing(tmp_path, monkeypatch):
    data = data_of(write_records(tmp_path))
    pack(data, tmp_path / "whole", shard_samples=16)
    write, read = packing._record, []

    def until_forty(source, sample):
        if sample == 40:
            raise Killed
        return write(source, sample)

    monkeypatch.setattr(packing, "_record", until_forty)
    with pytest.raises(Killed):
        pack(data, tmp_path / "out", shard_samples=16)
    assert len(list((tmp_path / "out").glob("*.arrayrecord"))) == 2
    assert not json.loads((tmp_path / "out/pack.json").read_text())["complete"]
    with pytest.raises(SourceError, match="out: was not packed to its end; go on with"):
        packed(tmp_path / "out")
    assert len(packed(tmp_path / "out/*.arrayrecord")) == 30  # asked for by name
    monkeypatch.setattr(packing, "_record", lambda source, sample: read.append(sample) or write(source, sample))
    done = []
    summary = pack(data, tmp_path / "out", shard_samples=16, progress=lambda *counts: done.append(counts))
    assert read == list(range(32, 60)) and min(done) >= (32, 60)
    assert summary == json.loads((tmp_path / "whole/pack.json").read_text())
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    read.clear()
    assert pack(data, tmp_path / "out", shard_samples=16) == summary and not read


# Stops at a sample in the middle of the third shard, until it is killed.
STOPS = """
import sys, time
from uhd_jax.config import DataConfig
from uhd_jax.data import pack as packing
write = packing._record
def record(source, sample):
    if sample == 40:
        print("there", flush=True)
        time.sleep(600)
    return write(source, sample)
packing._record = record
packing.pack(DataConfig("json", {"path": sys.argv[1]}), sys.argv[2], shard_samples=16)
"""


def test_a_killed_pack_leaves_nothing_and_two_at_once_are_refused(tmp_path):
    path, out = write_records(tmp_path), tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-c", STOPS, path, out], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"there\n"
        with pytest.raises(PackError, match="out: another pack is at work there"):
            pack(data_of(path), out, shard_samples=16)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert len(list(out.glob(".data-00002-*.partial"))) == 1
    (out / ".parts/.00001.json.1.partial").write_text("half")
    pack(data_of(path), out, shard_samples=16)
    pack(data_of(path), tmp_path / "whole", shard_samples=16)
    files = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    assert {file.name: file.read_bytes() for file in out.iterdir()} == files


def test_a_pack_that_was_killed_before_it_wrote_anything_goes_on(tmp_path):
    (tmp_path / "out").mkdir()
    for name in (".pack.lock", ".pack.json.17.partial"):
        (tmp_path / "out" / name).write_text("")
    assert pack(data_of(write_records(tmp_path)), tmp_path / "out")["complete"]
    assert not list((tmp_path / "out").glob(".*"))


def test_a_shard_without_a_usable_sample_is_no_file(tmp_path):
    data = data_of(write_records(tmp_path))
    summary = pack(data, tmp_path / "out", shard_samples=1)
    assert summary["shards"] == summary["samples"] == 58
    assert_holds(tmp_path / "out", data, left_out=[5, 11])


def test_a_folder_that_lost_a_shard_is_not_read_as_a_smaller_one(tmp_path):
    pack(data_of(write_records(tmp_path)), tmp_path / "out", shard_samples=16)
    (tmp_path / "out/data-00001-of-00004.arrayrecord").unlink()
    with pytest.raises(SourceError, match="holds 42 samples, 58 were packed; copy all its shards"):
        packed(tmp_path / "out")
    (tmp_path / "out/pack.json").write_text("[]")
    with pytest.raises(SourceError, match="pack.json: damaged"):
        packed(tmp_path / "out")
    (tmp_path / "out/pack.json").unlink()
    assert len(packed(tmp_path / "out")) == 42


def test_other_data_is_not_mixed_in(tmp_path):
    path = write_records(tmp_path)
    pack(data_of(path), tmp_path / "out")
    with pytest.raises(PackError, match=r"other data \(shard_samples changed\); name a new folder"):
        pack(data_of(path), tmp_path / "out", shard_samples=7)
    path.write_text(path.read_text() + path.read_text().splitlines()[3] + "\n")
    with pytest.raises(PackError, match="source_samples, stamp changed"):
        pack(data_of(path), tmp_path / "out")
    (tmp_path / "out/pack.json").write_text("{}")
    with pytest.raises(PackError, match="pack.json: damaged"):
        pack(data_of(path), tmp_path / "out")


def test_folders_that_are_refused(tmp_path):
    data = data_of(write_records(tmp_path))
    with pytest.raises(PackError, match="is not empty"):
        pack(data, tmp_path)
    with pytest.raises(PackError, match="not a local folder"):
        pack(data, "gs://bucket/out")


def test_a_worker_that_dies_is_named(tmp_path, monkeypatch):
    from uhd_jax.data import workers

    with pytest.raises(WorkerError, match="fewer --workers"):
        list(workers.run(Dies(), [1, 2], 2))


class Dies:
    def open(self):
        import os

        return lambda item: os._exit(1)
