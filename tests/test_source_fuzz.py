"""A thousand damaged records, a thousand damaged images, damaged shards: typed errors, every one counted."""

import json
import random

import pytest
import source_files
from image_files import SAVE, encode, photo
from pipelines import iterator

from uhd_jax.config import DataConfig
from uhd_jax.data.record_format import PackedSample, RecordError, decode
from uhd_jax.data.record_format import encode as pack
from uhd_jax.data.sources import Records, SourceError, make_source
from uhd_jax.data.windows import COUNTERS, FEWER_SLICES, MALFORMED, REFUSED
from uhd_jax.slicing.plan import ImageRefused

FUZZED = 1000


def damaged(data, rng):
    """Bytes flipped, cut out, doubled, overwritten or cut off."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        place, length = rng.randrange(len(data)), rng.choice([1, 2, 16])
        kind = rng.randrange(5)
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place : place + length]
        elif kind == 2:
            data[place:place] = data[place : place + length]
        elif kind == 3:
            data[place : place + length] = rng.randbytes(length)
        elif rng.random() < 0.3:
            del data[place:]
        data = data or bytearray(b"x")
    return bytes(data)


def swapped(value, rng):
    """A JSON value in which one value has another type, or an object another key."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        if rng.random() < 0.2:
            return {(rng.choice(["image", "images", "x", "system"]) if k == key else k): v for k, v in value.items()}
        return {k: swapped(v, rng) if k == key else v for k, v in value.items()}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return [swapped(v, rng) if i == place else v for i, v in enumerate(value)]
    choices = [None, True, -1, 1e400, "", "<image>", "\ud800", [], {}, [value], {"x": value}, "\0", "../x", 10**50]
    return rng.choice(choices)


def account(source, **train):
    """Reads an epoch; asserts that every sample of it is trained on, waiting, or counted as dropped."""
    options = {"packed_length": 400, "rows": 2, "max_slices": 2, "slots": 16}
    train = {"packing_window": 250, "max_broken_samples": 1.0} | train
    batches = iterator(source, train=train, **options)
    seen = 0
    while True:
        _, info = next(batches)
        seen += info.samples
        position = batches.get_state()["position"]
        if position["batch"] == 0:  # a window is over
            dropped = sum(info.counters[name] for name in COUNTERS if name != FEWER_SLICES)
            assert seen + info.waiting + dropped == position["start"] == info.read
            if info.read >= len(source):
                batches.close()
                return seen, info.counters


def test_fuzzed_records_are_trained_on_or_counted(tmp_path):
    rng = random.Random(0)
    source_files.write_images(tmp_path)
    forms = (source_files.llava, source_files.sharegpt, source_files.parts, source_files.minicpm)
    samples = [sample for sample in source_files.SAMPLES if "china.jpg" not in sample[0]]  # the quick ones
    lines = []
    for _ in range(FUZZED):
        record = rng.choice(forms)(rng.choice(samples))
        if rng.random() < 0.5:
            line = json.dumps(swapped(record, rng)).encode()
        else:
            line = damaged(json.dumps(record, ensure_ascii=False).encode(), rng).replace(b"\n", b" ")
        lines.append(line if len(line) > 2 else b"nul")
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    source = make_source(DataConfig("json", {"path": str(tmp_path / "x.jsonl")}))
    assert len(source) == FUZZED
    seen, counters = account(source)
    assert seen > FUZZED / 20 and counters[MALFORMED] > FUZZED / 3 and counters[REFUSED] > 0


def test_fuzzed_images_are_trained_on_or_counted():
    rng = random.Random(0)
    formats = [encode(photo(), name, **options) for name, options in SAVE.items()]
    turns = [
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "assistant", "content": "A photo."},
    ]
    records = [{"messages": turns, "images": [damaged(rng.choice(formats), rng)]} for _ in range(FUZZED)]
    seen, counters = account(Records(records))
    assert counters[REFUSED] > FUZZED / 4 and seen > FUZZED / 10


def test_fuzzed_shards_fail_whole_or_sample_by_sample(tmp_path):
    rng = random.Random(0)
    with_images = source_files.SAMPLES
    source_files.SAMPLES, kept = with_images[2:6], with_images
    try:
        source_files.write_tar(tmp_path)
    finally:
        source_files.SAMPLES = kept
    content = (tmp_path / "001.tar").read_bytes()
    for shard in tmp_path.glob("*.tar"):
        shard.unlink()
    headers = [place for place in range(0, len(content), 512) if content[place + 257 : place + 262] == b"ustar"]
    opened = refused = 0
    for _ in range(200):
        data = bytearray(content)
        for _ in range(rng.choice([1, 3])):
            place = rng.choice(headers) + rng.randrange(1024)
            data[place : place + 1] = damaged(bytes(data[place : place + 1]), rng)[:1]
        (tmp_path / "x.tar").write_bytes(damaged(bytes(data), rng) if rng.random() < 0.3 else bytes(data))
        try:
            source = make_source(DataConfig("tar", {"path": str(tmp_path / "x.tar")}))
        except SourceError as error:
            assert "x.tar" in str(error)
            refused += 1
            continue
        opened += 1
        for index in range(len(source)):
            try:
                source.messages(index), source.sizes(index)
            except (SourceError, ImageRefused):
                pass
    assert opened > 10 and refused > 10


def test_fuzzed_records_of_shards_are_refused_or_whole():
    rng = random.Random(0)
    source = Records([source_files.parts(source_files.SAMPLES[4])], folder="x")
    sample = PackedSample(source.messages(0), (encode(photo()),), "x:1")
    refused = 0
    for _ in range(FUZZED):
        try:
            assert isinstance(decode(damaged(pack(sample), rng)), PackedSample)
        except RecordError:
            refused += 1
    assert refused > FUZZED / 4


def test_fuzzed_parquet_fails_whole_or_row_by_row(tmp_path):
    pytest.importorskip("pyarrow")
    rng = random.Random(0)
    rows = [
        row | {"images": [{"bytes": encode(photo()), "path": None}] * len(row["images"])}
        for row in source_files.finevision_rows()
    ]
    source_files.write_parquet(tmp_path, rows)
    content = (tmp_path / "part-0.parquet").read_bytes()
    (tmp_path / "part-1.parquet").unlink()
    broken = 0
    for _ in range(150):
        (tmp_path / "part-0.parquet").write_bytes(damaged(content, rng))
        try:
            source = make_source(DataConfig("parquet", {"path": str(tmp_path)}))
            for index in range(len(source)):
                source.messages(index), source.sizes(index)
        except (SourceError, ImageRefused):
            broken += 1
    assert broken > 50
