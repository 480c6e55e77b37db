"""Batches planned from an index are those planned from the data, and of other hosts' samples nothing is read."""

import dataclasses
import gc
import json
import logging
import pickle
import tempfile
import threading
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from pipelines import MODEL, TOKENIZER, Numbered, equal, iterator, take

from uhd_jax.config import (
    AugmentConfig,
    BucketConfig,
    ChatConfig,
    ConfigError,
    DataConfig,
    RunConfig,
    StageConfig,
    TrainConfig,
)
from uhd_jax.data import index as indexing
from uhd_jax.data import known as knowing
from uhd_jax.data.index import index_path, open_index
from uhd_jax.data.known import Known, bits_of
from uhd_jax.data.known_from_index import known_samples
from uhd_jax.data.sources import SourceError, check_data, make_source
from uhd_jax.data.windows import COUNTERS, MALFORMED, REFUSED
from uhd_jax.slicing.sizes import Size
from uhd_jax.training import batches as batches_of_stages
from uhd_jax.training.batches import make_batches

CHAT = ChatConfig()
BUCKETS = (BucketConfig(slots=10, tokens=200, patches=64), BucketConfig(slots=8, tokens=200, patches=96))
STAGE = {"packed_length": 200, "buckets": BUCKETS}


def save(path, pixels):
    Image.fromarray(pixels).save(path, "PNG")


def write(folder, count=60):
    """Conversations about up to three images; some too large for a row, some unusable."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        height, width = 112 + 40 * (number % 3), 112 * (1 + number % 2)
        save(folder / f"{number}.png", rng.integers(0, 256, (height, width, 3), np.uint8))
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    lines = []
    for number in range(count):
        images = [f"{(number + k) % 12}.png" for k in range(number % 4)]
        if number % 13 == 5:
            images = ["missing.png"]
        if number % 13 == 6:
            images = ["cut.png"]  # its header is whole
        said = []
        for k in range(max(1, len(images))):
            asked = ("<image>" if images else "") + "so " * (number % 7 + 40 * (number % 17 == 3))
            answer = "" if number % 11 == 7 else "x" * (3 * (number % 11) + 1)
            said += [{"from": "human", "value": f"{asked}<{number}.{k}>"}, {"from": "gpt", "value": answer}]
        record = {"image": images, "conversations": said} if images else {"conversations": said}
        lines.append("no record" if number % 19 == 8 else json.dumps(record))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines))
    return DataConfig("json", {"path": str(path)})


def indexed(data):
    """The source, and what is known of it from an index that is made now."""
    open_index(data, [CHAT], path=index_path(data))
    source = make_source(data)
    return source, known_samples(data, source, CHAT, TOKENIZER)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("known") / "data")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "stage",
    [
        {},
        {"buckets": (), "bucket_budget": 2},
        {"too_long": "drop"},
        {"augment": AugmentConfig(resize_probability=0.5, jpeg_probability=0.5, ocr_probability=0.5)},
    ],
    ids=["given buckets", "planned buckets", "drop", "augmented"],
)
def test_the_same_batches(data, tmp_path, stage, workers):
    source, known = indexed(data)
    assert 30 < known.count < 60
    made = []
    for name, what in (("without", None), ("with", known)):
        batches = iterator(
            source, train={"data_workers": workers}, known=what, dropped=tmp_path / name, **STAGE | stage
        )
        taken = take(batches, 8)
        made.append((taken, batches.get_state()))
        batches.close()
    (without, state), (with_index, other_state) = made
    for (batch, info), (other, its) in zip(without, with_index, strict=True):
        assert equal(batch, other)
        assert info == its
    assert state == other_state and info.epoch > 1
    assert sum(info.counters[name] > 0 for name in COUNTERS) >= 4
    dropped = [sorted((tmp_path / name).read_text().splitlines()) for name in ("without", "with")]
    assert dropped[0] == dropped[1] and len(dropped[0]) > 10


def test_mixtures_plan_from_the_indices_that_there_are(data, tmp_path):
    other = write(tmp_path / "other", 30)
    parts = [
        {"name": name, "source": "json", "options": dict(one.options), "weight": 1.0}
        for name, one in (("indexed", data), ("other", other))
    ]
    mixture = DataConfig("mixture", {"parts": parts})
    source = make_source(mixture)
    _, alone = indexed(data)
    known = known_samples(mixture, source, CHAT, TOKENIZER)
    assert known.count == alone.count and [known.get(n) for n in range(60)] == [alone.get(n) for n in range(60)]
    assert not any(map(known.get, range(60, 90)))
    batches, without = iterator(source, known=known, **STAGE), iterator(source, **STAGE)
    assert all(equal(a[0], b[0]) for a, b in zip(take(batches, 6), take(without, 6), strict=True))
    batches.close(), without.close()


def test_a_run_goes_on_with_an_index_where_it_went_on_without(data):
    source, known = indexed(data)
    without = iterator(source, **STAGE)
    take(without, 3)
    batches = iterator(source, known=known, **STAGE)
    batches.set_state(json.loads(json.dumps(without.get_state())))
    assert all(equal(a[0], b[0]) for a, b in zip(take(batches, 4), take(without, 4), strict=True))
    batches.close(), without.close()


class Counted(Numbered):
    """Counts what is read."""

    def __init__(self):
        super().__init__(40)
        self.read = Counter()
        self._lock = threading.Lock()

    def _note(self, what):
        with self._lock:
            self.read[what] += 1

    def sizes(self, index):
        self._note("sizes")
        return super().sizes(index)

    def messages(self, index):
        self._note("messages")
        return super().messages(index)


def known_of(source):
    """What an index would say of `Numbered` samples."""
    sizes = [source.sizes(index) for index in range(len(source))]
    tokens = []
    for index, its in enumerate(sizes):
        plans = [knowing.REFERENCE] * len(its)
        tokens.append(len(knowing.encode_chat(source.messages(index), plans, TOKENIZER, MODEL.chat).tokens))
    starts = np.cumsum([0, *map(len, sizes)])
    flat = np.array([size for one in sizes for size in one], np.int32).reshape(-1, 2)
    count = len(source)
    return Known(starts, flat, np.array(tokens, np.int32), bits_of(np.ones(count, bool), np.ones(count), []))


def test_a_host_reads_its_own_samples_alone():
    known = known_of(Numbered())
    taken, sources = [], []
    for host in range(2):
        sources.append(Counted())
        batches = iterator(
            sources[-1], (host, 2), known=known, train={"prefetch": 0}, buckets=BUCKETS, packed_length=200
        )
        sources[-1].read.clear()  # what the fingerprint read
        taken.append(take(batches, 3))
        batches.close()
    samples = [sum(info.samples for _, info in one) for one in taken]
    assert min(samples) > 5
    images = Numbered().images
    assert images(1)  # whose own look at `sizes` is the only one left
    for source, count in zip(sources, samples, strict=True):
        assert source.read["messages"] <= count + 4  # a batch may be made ahead
        assert source.read["sizes"] <= 2 * (count + 4)


def stale(data, change):
    """Batches of data that changed after its index was made, where nobody noticed."""
    source, known = indexed(data)
    change(source)
    batches = iterator(source, known=known, train={"max_broken_samples": 1.0}, **STAGE)
    found = take(batches, 8)
    batches.close()
    return found


@pytest.mark.parametrize("what", ["image", "text"])
def test_what_changed_since_is_counted(tmp_path, what, caplog):
    data = write(tmp_path / "data")
    fresh = stale(data, lambda source: None)
    rows = (tmp_path / "data" / "data.jsonl").read_text()

    def change(source):
        if what == "image":
            save(tmp_path / "data" / "1.png", np.zeros((50, 60, 3), np.uint8))
        else:
            (tmp_path / "data" / "data.jsonl").write_text(rows.replace("<30.0>", "<<30>>").replace("<33.0>", "<333.0>"))
            source.__init__(source._options, source._limits)

    with caplog.at_level(logging.WARNING):
        found = stale(data, change)
    counter = REFUSED if what == "image" else MALFORMED
    assert found[-1][1].counters[counter] > fresh[-1][1].counters[counter]
    assert any("uhd-jax data index --anew" in line for line in caplog.messages)
    assert sum(info.samples for _, info in found) < sum(info.samples for _, info in fresh)


def test_an_index_that_does_not_suit_is_not_used(tmp_path, caplog):
    data = write(tmp_path / "data")
    source, known = indexed(data)
    assert known and index_path(data).is_file()
    assert known_samples(data, source, ChatConfig(system="Other."), TOKENIZER) is None
    assert "no lengths of texts in this stage's prompt form" in caplog.text
    path = tmp_path / "data" / "data.jsonl"
    path.write_text(path.read_text() + "\n" + path.read_text().splitlines()[0])
    assert known_samples(data, make_source(data), CHAT, TOKENIZER) is None
    assert "is no index of this data as it is now" in caplog.text
    index_path(data).unlink()
    caplog.clear()
    assert known_samples(data, make_source(data), CHAT, TOKENIZER) is None and not caplog.text


def test_a_form_that_was_added_while_rows_could_not_be_read_leaves_them_to_be_read(tmp_path, monkeypatch):
    data, other = write(tmp_path / "data"), ChatConfig(system="Other.")
    source, known = indexed(data)
    messages = type(source).messages

    def fails_at_times(self, index):
        if index % 10 == 2:
            raise SourceError("no answer")
        return messages(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(type(source), "messages", fails_at_times)
        patch.setattr(indexing, "_COMPARED", 1)
        open_index(data, [other], path=index_path(data))
        added = known_samples(data, source, other, TOKENIZER)
    lost = {n for n in range(60) if known.get(n) and not added.get(n)}
    assert lost == {n for n in range(60) if n % 10 == 2 and known.get(n)} and len(lost) > 3


def test_an_image_of_half_its_size_does_not_pass_for_one_decoded_smaller(tmp_path):
    data = write(tmp_path / "data")
    source, known = indexed(data)
    for path in (tmp_path / "data").glob("*.png"):
        if path.stem.isdecimal():
            with Image.open(path) as image:
                image.resize((image.width // 2, image.height // 2)).save(path, "JPEG")
    batches = iterator(source, known=known, train={"jpeg_draft": True, "max_broken_samples": 1.0}, **STAGE)
    found = take(batches, 4)
    batches.close()
    assert sum(info.images for _, info in found) < 10  # of samples that did not fit whole, and were read again
    assert found[-1][1].counters[REFUSED] > 10


def test_a_mixture_has_no_index_of_its_own(data):
    mixture = DataConfig("mixture", {"parts": [{"name": "a", "source": "json", "weight": 1.0}]}, index="a.npz")
    with pytest.raises(ConfigError, match=r"data\.index: a mixture has none of its own"):
        check_data(mixture)


def test_an_index_takes_no_other_files_place(tmp_path):
    data = write(tmp_path / "data")
    mine = tmp_path / "mine.json"
    mine.write_text("[]")
    with pytest.raises(ConfigError, match=r"mine\.json is there, but no index that can be read; name another file"):
        open_index(data, [CHAT], path=mine)
    assert mine.read_text() == "[]"
    other = tmp_path / "other.npz"
    for anew, made in ((False, True), (False, False), (True, True)):
        assert open_index(data, [CHAT], path=other, anew=anew)[1] == made


def test_an_index_lies_on_a_disk(data):
    there = dataclasses.replace(data, index="gs://bucket/a.npz")
    with pytest.raises(ConfigError, match="gs://bucket/a.npz: is written and read on a local disk"):
        known_samples(there, make_source(there), CHAT, TOKENIZER)


def test_a_damaged_index_is_not_used(tmp_path, caplog):
    data = write(tmp_path / "data")
    source, _ = indexed(data)
    whole, rng = index_path(data).read_bytes(), np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            damaged[place] ^= int(rng.integers(1, 256))
        index_path(data).write_bytes(damaged)
        known_samples(data, source, CHAT, TOKENIZER)  # not used, or what was hit means nothing
    assert "is no index of this data as it is now, and is not used" in caplog.text


def test_an_index_that_is_named_has_to_suit(tmp_path):
    data = dataclasses.replace(write(tmp_path / "data"), index=str(tmp_path / "other.npz"))
    source = make_source(data)
    with pytest.raises(ConfigError, match=r"other\.npz is not there; make it with uhd-jax data index --anew"):
        known_samples(data, source, CHAT, TOKENIZER)
    open_index(data, [CHAT], path=index_path(data))
    assert (tmp_path / "other.npz").is_file()
    assert known_samples(data, source, CHAT, TOKENIZER).count > 30
    with pytest.raises(ConfigError, match="no lengths of texts"):
        known_samples(data, source, ChatConfig(system="Other."), TOKENIZER)


def test_much_is_mapped_and_not_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    small = known_of(Numbered())
    count = 100_000
    sizes, tokens, bits = np.full((count, 2), 100, np.int32), np.full(count, 9, np.int32), np.zeros(count, np.int8)
    large = Known(np.arange(count + 1), sizes, tokens, bits)
    assert len(pickle.dumps(small)) > 1000 and not list(tmp_path.iterdir())
    assert len(pickle.dumps(large)) < 1000 and len(list(tmp_path.rglob("*.npy"))) == 4
    for one in (small, large):
        copied = pickle.loads(pickle.dumps(one))
        assert copied.digest == one.digest and [copied.get(n) for n in range(40)] == [one.get(n) for n in range(40)]
    del large, one
    gc.collect()
    assert not list(tmp_path.iterdir())
    assert copied.get(7).sizes == [Size(100, 100)]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    again = Known(np.arange(count + 1), sizes, tokens, bits)
    assert pickle.loads(pickle.dumps(again)).get(7) == again.get(7) == copied.get(7)


def test_texts_alone():
    known = known_of(source := Numbered(images=False))
    batches, without = iterator(source, known=known), iterator(source)
    assert all(equal(a[0], b[0]) for a, b in zip(take(batches, 3), take(without, 3), strict=True))
    batches.close(), without.close()


def test_an_index_that_one_host_lacks_ends_all(data, monkeypatch):
    stage = StageConfig("s", data, 1, 4, 200, 1.0, 0.0, ("tower",), buckets=BUCKETS)
    config = RunConfig("n", MODEL, TrainConfig((stage,), packing_window=24))
    monkeypatch.setattr(batches_of_stages, "all_agree", lambda here: False)
    with pytest.raises(ConfigError, match="another process cannot use the index"), make_batches(config, 0):
        pass


@pytest.mark.parametrize(("first", "used"), [("same", True), ("other", False)])
def test_hosts_use_an_index_together_or_not_at_all(data, monkeypatch, caplog, first, used):
    indexed(data)
    stage = StageConfig("s", data, 1, 4, 200, 1.0, 0.0, ("tower",), buckets=BUCKETS)
    config = RunConfig("n", MODEL, TrainConfig((stage,), packing_window=24))
    monkeypatch.setattr(batches_of_stages.jax, "process_count", lambda: 2)
    monkeypatch.setattr(batches_of_stages, "row_share", lambda mesh: (0, 1))
    monkeypatch.setattr(batches_of_stages, "as_first", lambda numbers: numbers if first == "same" else [0])
    monkeypatch.setattr(batches_of_stages, "all_agree", lambda here: here)
    with caplog.at_level(logging.INFO), make_batches(config, 0) as batches:
        next(batches)
    assert (f"{indexed(data)[1].count} of 60 samples are planned from an index" in caplog.text) == used
    assert ("the index is not the same on all hosts" in caplog.text) == (not used)
