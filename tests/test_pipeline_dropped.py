"""What the pipeline cuts, drops and skips: counted, named once, and nothing else lost."""

import json
import logging

import numpy as np
import pytest
from PIL import Image
from pipelines import Numbered, equal, iterator, numbers_of, take

from uhd_jax.config import (
    BucketConfig,
)
from uhd_jax.data.chat import ImagePart, Message
from uhd_jax.data.pipeline import REPORTS
from uhd_jax.data.sources import Records
from uhd_jax.data.windows import FEWER_SLICES, MALFORMED, REFUSED, TOO_LONG, TURNS_CUT, UNTRAINED, PipelineError
from uhd_jax.slicing.plan import ImageRefused, Size


def test_samples_seen_waiting_and_dropped_add_up_to_the_stream():
    """At the end of a window the stream is accounted for place by place."""
    source = Numbered(answer="{}" + "x" * 20)
    source.messages = lambda index: (
        Message("user", (*map(ImagePart, range(len(source.sizes(index)))), f"<{index}>")),
        Message("assistant", ("y" * (300 if index % 10 == 3 else 1),)),
    )
    batches = iterator(source, train={"prefetch": 0})
    counts, info = np.zeros(40, int), None
    for _ in range(60):
        batch, info = next(batches)
        np.add.at(counts, numbers_of(batch), 1)
        position = batches.get_state()["position"]
        if position["batch"] == 0:
            dropped = info.counters[TOO_LONG]
            assert counts.sum() + info.waiting + dropped == position["start"]
            if position["start"] % 40 == 0:
                assert dropped == 4 * position["start"] // 40
                stream = batches._planner._stream
                np.add.at(counts, waiting := [int(stream[p]) for p in position["carried"]], 1)
                expected = np.where(np.arange(40) % 10 == 3, 0, position["start"] // 40)
                np.testing.assert_array_equal(counts, expected)
                np.add.at(counts, waiting, -1)
    assert info.counters[TOO_LONG] > 0
    batches.close()


def test_too_long_for_all_slices_gets_fewer_and_is_counted(caplog):
    class Large(Numbered):
        def sizes(self, index):
            return [Size(336, 336)]

    batches = iterator(Large(count=8), packed_length=80)
    with caplog.at_level(logging.WARNING):
        batch, info = next(batches)
    assert info.counters[FEWER_SLICES] >= info.samples > 0 and info.counters[TOO_LONG] == 0
    assert 1 < info.views / info.images < 10 and "instead of 9 slices" in caplog.text
    batches.close()


@pytest.mark.parametrize("too_long", ["cut_turns", "fewer_slices"])
def test_oldest_turns_are_cut_before_a_sample_is_dropped(caplog, tmp_path, too_long):
    class Long(Numbered):
        """Sample 2 has one answer that no row has room for; the others have four rounds, of which three fit."""

        def messages(self, index):
            rounds = [(Message("user", ("so",)), Message("assistant", ("x" * 20,)))] * 3 * (index != 2)
            answer = Message("assistant", ("y" * (1 if index != 2 else 300),))
            return (*sum(rounds, ()), Message("user", (f"<{index}>",)), answer)

    batches = iterator(
        Long(count=8, images=False), packed_length=125, too_long=too_long, bucket_budget=1, dropped=tmp_path / "a.jsonl"
    )
    if too_long == "fewer_slices":
        with pytest.raises(PipelineError, match=f"no sample .* is usable: {TOO_LONG} 24"):
            next(batches)
        return
    with caplog.at_level(logging.WARNING):
        batch, info = next(batches)
    batches.close()
    assert info.counters[TURNS_CUT] == 7 * info.read // 8 and info.counters[TOO_LONG] == info.read // 8
    assert info.counters[FEWER_SLICES] == 0 and batch.tokens[0][:125].tolist().count(ord("x")) == 40
    assert caplog.text.count("the oldest round of question and answer cut") == 7
    (listed,) = map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
    assert listed["counter"] == TOO_LONG and listed["where"].endswith("sample 2")
    assert "fits into no row" in listed["reason"] and "at most 125 tokens" in listed["reason"]


def test_samples_without_answers_are_counted():
    class OneSilent(Numbered):
        def messages(self, index):
            return super().messages(index)[: 1 if index == 5 else 2]

    batches = iterator(OneSilent(count=12), train={"packing_window": 12})
    infos = [info for _, info in take(batches, 3)]
    assert infos[-1].counters[UNTRAINED] >= 1
    batches.close()


def broken_records(tmp_path):
    """Eight samples with an image each, of which 3, 5 and 6 cannot be read."""
    rng = np.random.default_rng(0)
    names = [f"{i}.png" for i in range(8)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (120, 100, 3), np.uint8)).save(tmp_path / name)
    data = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(data[: len(data) // 2])  # header fine: found out when decoding
    (tmp_path / "5.png").write_bytes(b"nonsense")  # found out when planning
    (tmp_path / "6.png").unlink()
    records = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"<{i}>"}]},
                {"role": "assistant", "content": "x"},
            ],
            "images": [name],
        }
        for i, name in enumerate(names)
    ]
    return Records(records, folder=tmp_path)


def test_broken_images_are_skipped_counted_and_named(tmp_path, caplog):
    source = broken_records(tmp_path)
    batches = iterator(source, packed_length=64, train={"packing_window": 8})
    seen, info = [], None
    with caplog.at_level(logging.WARNING):
        while batches.get_state()["position"]["start"] < 80:
            batch, info = next(batches)
            seen += numbers_of(batch)
            assert not batch.segments.any(axis=-1).all() or 3 not in seen
    assert set(seen) == {0, 1, 2, 4, 7}
    assert info.counters[REFUSED] >= 20
    # Each once, though there were ten epochs, by its line in the file.
    said = sorted(message.split(": ")[:3] for message in caplog.messages)
    assert said == [[f"records:{i + 1}", REFUSED, f"{tmp_path}/{i}.png"] for i in (3, 5, 6)]
    state = batches.get_state()
    batches.close()
    resumed = iterator(source, packed_length=64, train={"packing_window": 8})
    resumed.set_state(state)
    assert next(resumed)[1].counters[REFUSED] >= info.counters[REFUSED]
    resumed.close()


class Silent(Numbered):
    """Every second sample has no answer."""

    def messages(self, index):
        return super().messages(index)[: 1 + index % 2]


def test_of_very_many_only_the_first_are_named(caplog):
    batches = iterator(Silent(count=120), packed_length=256, train={"packing_window": 120})
    with caplog.at_level(logging.WARNING):
        infos = [info for _, info in take(batches, 8)]
    batches.close()
    assert infos[-1].counters[UNTRAINED] >= 60
    assert len(caplog.messages) == REPORTS + 1
    assert all(f": {UNTRAINED}: no answer" in message for message in caplog.messages[:-1])
    assert caplog.messages[-1] == f"{UNTRAINED}: further ones are only counted, as data/{UNTRAINED} in the metrics"


def test_what_worker_processes_find_is_logged_here(tmp_path, caplog):
    source = broken_records(tmp_path)
    batches = iterator(source, packed_length=64, train={"packing_window": 8, "data_workers": 1})
    with caplog.at_level(logging.WARNING):
        take(batches, 3)
    batches.close()
    assert sorted(message.split(":")[1] for message in caplog.messages) == ["4", "6", "7"]


def test_a_waiting_sample_whose_image_has_gone_is_dropped_on_resume():
    class Going(Numbered):
        gone = frozenset()

        def sizes(self, index):
            if index in self.gone:
                raise ImageRefused("gone")
            return super().sizes(index)

        def messages(self, index):
            return Numbered().messages(index)

    options = {"train": {"prefetch": 0}, "buckets": (BucketConfig(slots=6, tokens=160, patches=96),)}
    batches = iterator(source := Going(), **options)
    while not (state := batches.get_state())["position"]["carried"] or state["position"]["batch"]:
        next(batches)
    source.gone = {int(batches._planner._stream[place]) for place in state["position"]["carried"]}
    resumed = iterator(source, **options)
    resumed.set_state(state)
    batch, info = next(resumed)
    assert source.gone.isdisjoint(numbers_of(batch))
    assert info.counters[REFUSED] >= len(source.gone)
    batches.close(), resumed.close()


def test_a_source_of_nothing_usable_is_an_error_not_a_hang():
    with pytest.raises(
        PipelineError, match=f"no sample of the source 'test' is usable: {TOO_LONG} .*; for example source test, sample"
    ):
        next(iterator(Numbered(answer="{}" + "x" * 200)))
    with pytest.raises(PipelineError, match="empty"):
        iterator(Numbered(count=0))


def test_images_that_do_not_match_the_messages_name_the_sample(caplog):
    class Mismatched(Numbered):
        def messages(self, index):
            return Message("user", (f"<{index}>",)), Message("assistant", ("x",))

    batches = iterator(Mismatched(), train={"packing_window": 40})
    with caplog.at_level(logging.WARNING):
        batch, info = next(batches)
    batches.close()
    assert info.counters[MALFORMED] == 30 * info.read / 40  # ten have no images
    assert not any(number % 4 for number in numbers_of(batch))
    said = [message for message in caplog.messages if message.startswith("source test, sample ")]
    assert said and all(f": {MALFORMED}: messages show the images [], but there are 1 images" in line for line in said)


def test_images_of_another_size_than_announced_name_the_sample_and_a_second_try_skips_nothing():
    class Changed(Numbered):
        changed = True

        def images(self, index):
            return [image[1:] if self.changed else image for image in super().images(index)]

    batches, reference = iterator(source := Changed()), iterator(Numbered())
    with pytest.raises(PipelineError, match="source test, sample [0-9]+: image is uint8"):
        next(batches)
    source.changed = False
    assert equal(next(batches)[0], next(reference)[0])
    batches.close(), reference.close()
