"""The input pipeline: nothing lost, resume bit for bit, prefetch and hosts change nothing."""

import dataclasses
import json
import threading

import numpy as np
import pytest
from pipelines import MODEL, Numbered, equal, iterator, numbers_of, take

from uhd_jax.config import (
    BucketConfig,
    ConfigError,
    PreResizeConfig,
)
from uhd_jax.data.demo import DigitPages
from uhd_jax.data.pipeline import CLOSING
from uhd_jax.data.windows import PipelineError
from uhd_jax.slicing.pixels import cut_views
from uhd_jax.slicing.plan import Size, make_plan


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
