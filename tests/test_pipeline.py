"""The input pipeline: nothing lost, resume bit for bit, prefetch and hosts change nothing, bad samples are counted."""

import dataclasses
import json
import logging
import threading

import numpy as np
import pytest
from PIL import Image

from uhd_jax.config import (
    BucketConfig,
    CompressorConfig,
    ConfigError,
    DataConfig,
    DecoderConfig,
    ModelConfig,
    PreResizeConfig,
    SlicingConfig,
    StageConfig,
    TowerConfig,
    TrainConfig,
)
from uhd_jax.data.chat import ImagePart, Message
from uhd_jax.data.demo import DigitPages
from uhd_jax.data.pipeline import CLOSING, REPORTS, make_iterator
from uhd_jax.data.sources import Records
from uhd_jax.data.tokenizer import byte_tokenizer
from uhd_jax.data.windows import FEWER_SLICES, MALFORMED, REFUSED, TOO_LONG, TURNS_CUT, UNTRAINED, PipelineError
from uhd_jax.slicing.pixels import cut_views
from uhd_jax.slicing.plan import ImageRefused, Size, make_plan

TOKENIZER = byte_tokenizer()
MODEL = ModelConfig(
    decoder=DecoderConfig(vocab_size=288, width=32, mlp_width=64, layers=2, heads=2, kv_heads=2, head_dim=16),
    tower=TowerConfig(width=32, mlp_width=64, layers=3, heads=2),
    compressor=CompressorConfig(after_layer=0),
    slicing=SlicingConfig(scale_resolution=112),
)


class Numbered:
    """Samples that say their number, with images of several sizes."""

    def __init__(self, count=40, images=True, answer="{}"):
        self._count, self._images, self._answer = count, images, answer

    def __len__(self):
        return self._count

    def sizes(self, index):
        return [Size(112, 112 * (1 + index % 3))] if self._images and index % 4 else []

    def messages(self, index):
        parts = tuple(map(ImagePart, range(len(self.sizes(index)))))
        return Message("user", (*parts, f"<{index}>")), Message("assistant", (self._answer.format(index),))

    def images(self, index):
        return [np.random.default_rng(index).integers(0, 256, (*size, 3), np.uint8) for size in self.sizes(index)]


def iterator(source, process=(0, 1), model=MODEL, train=None, dropped=None, told=False, **stage):
    options = {"packed_length": 160, "rows": 4, "bucket_budget": 2} | stage
    stage = StageConfig(
        name="s",
        data=DataConfig("test"),
        steps=1,
        learning_rate=1.0,
        learning_rate_min=0.0,
        trainable=("tower",),
        **options,
    )
    train = TrainConfig(stages=(stage,), **({"packing_window": 24} | (train or {})))
    return make_iterator(stage, model, train, source, TOKENIZER, process, dropped, told)


def numbers_of(batch):
    """The numbers of the samples in a batch, in reading order."""
    found = []
    for tokens, segments in zip(batch.tokens, batch.segments, strict=True):
        for segment in range(1, segments.max() + 1):
            found.append(int(TOKENIZER.decode(tokens[segments == segment]).split("<")[1].split(">")[0]))
    return found


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True))


def take(batches, count):
    return [next(batches) for _ in range(count)]


def test_every_sample_of_an_epoch_comes_exactly_once_and_epochs_differ():
    batches = iterator(Numbered())
    seen, orders = [], []
    while len(seen) < 400:
        batch, info = next(batches)
        numbers = numbers_of(batch)
        assert info.samples == len(numbers) and info.bucket == batch.bucket and info.bucket in batches.buckets
        orders.append(numbers)
        seen += numbers
    state = batches.get_state()["position"]
    done = state["start"] // 40  # whole epochs that were read; what waits in `carried` was not seen yet
    counts = np.bincount(seen, minlength=40)
    assert counts.min() >= done - 1 and counts.max() <= done + 2
    assert counts.sum() <= info.read and len(set(map(tuple, orders))) > len(orders) / 2
    batches.close()


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


@pytest.mark.parametrize("prefetch", [0, 3])
def test_resume_at_any_batch_gives_the_same_batches_bit_for_bit(prefetch):
    reference = iterator(Numbered(), train={"prefetch": prefetch})
    states, expected = [reference.get_state()], []
    for _ in range(6):
        expected.append(next(reference))
        states.append(json.loads(json.dumps(reference.get_state())))
    assert max(len(json.dumps(state)) for state in states) < 1000
    for start in range(6):
        resumed = iterator(Numbered(), train={"prefetch": 2})
        next(resumed)
        resumed.set_state(states[start])
        for (batch, info), (again, its_info) in zip(expected[start:], take(resumed, 6 - start), strict=True):
            assert equal(batch, again) and info == its_info
        assert resumed.get_state() == states[6]
        resumed.close()
    reference.close()


def test_hosts_share_the_rows_and_choose_the_same_bucket():
    whole = iterator(Numbered())
    hosts = [iterator(Numbered(), process=(i, 2)) for i in range(2)]
    for _ in range(6):
        batch, info = next(whole)
        parts = [next(host) for host in hosts]
        assert len({part.bucket for part, _ in parts}) == 1 and parts[0][0].bucket.rows == 2
        for name in ("tokens", "segments", "patches", "patch_grids", "visual_index", "loss_weights"):
            joined = np.concatenate([getattr(part, name) for part, _ in parts])
            np.testing.assert_array_equal(joined, getattr(batch, name))
        assert sum(its.samples for _, its in parts) == info.samples
    assert len({json.dumps(host.get_state()) for host in hosts}) == 1
    for it in (whole, *hosts):
        it.close()
    with pytest.raises(ConfigError, match="3 hosts cannot share 4 rows"):
        iterator(Numbered(), process=(0, 3))


def test_batches_hold_the_right_pixels():
    source = Numbered(count=12)
    batch, info = next(batches := iterator(source))
    batches.close()
    for row in range(4):
        slot = 0
        for number in numbers_of(
            dataclasses.replace(batch, tokens=batch.tokens[row : row + 1], segments=batch.segments[row : row + 1])
        ):
            for image in source.images(number):
                plan = make_plan(Size(*image.shape[:2]), MODEL.slicing, 14, 2)
                for view in cut_views(image, plan, 14):
                    np.testing.assert_array_equal(batch.patches[row, slot, : len(view)], view)
                    slot += 1
        assert (batch.patch_grids[row].prod(axis=-1) > 0).sum() == slot
    assert info.views == (batch.patch_grids.prod(axis=-1) > 0).sum() and info.tokens == (batch.segments > 0).sum()
    assert info.trained_tokens == (batch.loss_weights > 0).sum()
    assert info.fill.tokens == (batch.segments > 0).mean()


def test_another_seed_or_stage_name_shuffles_differently_and_states_do_not_mix():
    first, second = iterator(Numbered()), iterator(Numbered(), train={"seed": 1})
    assert numbers_of(next(first)[0]) != numbers_of(next(second)[0])
    with pytest.raises(PipelineError, match="another data configuration"):
        second.set_state(first.get_state())
    for it in (first, second):
        it.close()


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


def test_closing_does_not_wait_for_a_sample_that_hangs():
    class Hanging(Numbered):
        reached, released = threading.Event(), threading.Event()

        def images(self, index):
            self.reached.set()
            self.released.wait()
            return super().images(index)

    batches = iterator(source := Hanging())
    fetching = threading.Thread(target=lambda: next(batches, None), daemon=True)
    fetching.start()
    source.reached.wait()
    state = batches.get_state()
    before = set(threading.enumerate())  # on a busy machine a test before may still be closing
    batches.close()
    (closing,) = (thread for thread in set(threading.enumerate()) - before if thread.name == CLOSING)
    source.released.set()
    closing.join()
    resumed, reference = iterator(Numbered()), iterator(Numbered())
    resumed.set_state(state)
    assert equal(next(resumed)[0], next(reference)[0])  # nothing was skipped
    batches.close(), resumed.close(), reference.close()


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


def test_given_buckets_are_used_and_checked():
    buckets = (BucketConfig(slots=6, tokens=128, patches=64), BucketConfig(slots=3, tokens=160, patches=96))
    batches = iterator(Numbered(), buckets=buckets)
    assert [(b.slots, b.tokens, b.patches) for b in batches.buckets] == [(6, 128, 64), (3, 160, 96)]
    assert {info.bucket.tokens for _, info in take(batches, 4)} <= {128, 160}
    batches.close()
    for broken, complaint in (
        (BucketConfig(6, 161, 64), "packed_length 160"),
        (BucketConfig(6, 128, 56), "multiple of 16"),
    ):
        with pytest.raises(ConfigError, match=f"buckets: .*{complaint}"):
            iterator(Numbered(), buckets=(broken,))


def test_slots_of_the_stage_are_kept_and_text_alone_works():
    batches = iterator(Numbered(), slots=7)
    assert {bucket.slots for bucket in batches.buckets} == {7}
    batches.close()
    batches = iterator(Numbered(images=False))
    batch, info = next(batches)
    assert info.views == 0 and (batch.visual_index == -1).all() and info.samples > 4
    batches.close()


def test_a_batch_holds_sixteen_pages_of_24_digits():
    pages = DigitPages({"task": "page", "shapes": [[2, 3]]})
    batches = iterator(pages, rows=16, packed_length=128, train={"packing_window": 256, "prefetch": 0})
    assert sum(info.samples for _, info in take(batches, 15)) == 15 * 16
    batches.close()


def test_a_tokenizer_with_more_ids_than_the_decoder_is_refused():
    small = dataclasses.replace(MODEL, decoder=dataclasses.replace(MODEL.decoder, vocab_size=200))
    with pytest.raises(ConfigError, match="vocab_size: tokenizer bytes has 268 ids, the decoder only 200"):
        iterator(Numbered(), model=small)


class Squares(Numbered):
    """One image of one view each."""

    def sizes(self, index):
        return [Size(112, 112)]


def test_small_images_are_refilled_by_chance_and_alike_in_every_run():
    pre_resize = PreResizeConfig(refill_probability=0.5, refill_slices=2)
    refilling = dataclasses.replace(MODEL, slicing=dataclasses.replace(MODEL.slicing, pre_resize=pre_resize))
    runs = [iterator(Squares(), model=refilling) for _ in range(2)]
    seen = {number: set() for number in range(40)}
    for _ in range(20):
        (batch, _), (again, _) = (next(run) for run in runs)
        assert equal(batch, again)
        visual = [
            int((index[segments == segment] >= 0).sum())
            for index, segments in zip(batch.visual_index, batch.segments, strict=True)
            for segment in range(1, segments.max() + 1)
        ]
        for number, tokens in zip(numbers_of(batch), visual, strict=True):
            seen[number].add(tokens)
    for run in runs:
        run.close()
    assert set.union(*seen.values()) == {4, 4 + 2 * 3}  # one view, or a thumbnail and two slices
    assert {4, 10} in seen.values()  # drawn anew in every epoch
