"""One order and one content for any number of hosts and workers, also where turns are cut and images are altered."""

import dataclasses
import json
import os

import numpy as np
import pytest
from pipelines import Numbered, equal, iterator, numbers_of

from uhd_jax.config import AugmentConfig, BucketConfig
from uhd_jax.data.augment import alter
from uhd_jax.data.chat import ImagePart, Message
from uhd_jax.data.sources.mixture import Mixture, MixtureOptions, MixturePart
from uhd_jax.data.windows import FEWER_SLICES, TOO_LONG, TURNS_CUT
from uhd_jax.slicing.pixels import cut_views
from uhd_jax.slicing.sizes import Size

BATCHES = 6
STAGE = {
    "augment": AugmentConfig(resize_probability=0.5, jpeg_probability=0.5, ocr_probability=0.5),
    "buckets": (BucketConfig(slots=10, tokens=160, patches=64), BucketConfig(slots=8, tokens=160, patches=96)),
}


class Talks(Numbered):
    """Conversations of up to three rounds about an image each, some of which are too large for a row of 160 tokens."""

    def sizes(self, index):
        return [Size(112 + 40 * (index % 3), 112 * (1 + index % 2))] * (1 + index % 3)

    def where(self, index):
        return f"talk {index}"

    def messages(self, index):
        rounds = len(self.sizes(index))
        turns = []
        for number in range(rounds):
            asked = f"<{index}>" if number == rounds - 1 else "so " * (index % 7)
            answer = "x" * (3 * (index % 11) + 1)
            turns += [Message("user", (ImagePart(number), asked)), Message("assistant", (answer,))]
        return tuple(turns)


def mixture():
    parts = MixturePart("few", "", weight=1.0), MixturePart("many", "", weight=3.0)
    return Mixture(MixtureOptions(parts), [Talks(15), Talks(40)])


@pytest.fixture(scope="module")
def reference():
    """Batches, infos, and the state before each of them and after the last; of one host without workers."""
    batches = iterator(mixture(), **STAGE)
    states, made = [batches.get_state()], []
    for _ in range(BATCHES):
        made.append(next(batches))
        states.append(json.loads(json.dumps(batches.get_state())))
    batches.close()
    return made, states


def check(reference, hosts, workers, start, stop):
    """Batches `start` to `stop`, from the state before them, on so many hosts with so many workers each."""
    made, states = reference
    iterators = [iterator(mixture(), (host, hosts), train={"data_workers": workers}, **STAGE) for host in range(hosts)]
    for one in iterators:
        one.set_state(states[start])
    for number in range(start, stop):
        batch, info = made[number]
        parts = [next(one) for one in iterators]
        assert {part.bucket for part, _ in parts} == {
            dataclasses.replace(batch.bucket, rows=batch.bucket.rows // hosts)
        }
        for field in dataclasses.fields(batch):
            whole = np.concatenate([getattr(part, field.name) for part, _ in parts])
            np.testing.assert_array_equal(whole, getattr(batch, field.name))
        assert all(its.counters == info.counters and its.epoch == info.epoch for _, its in parts)
        assert hosts > 1 or parts[0][1] == info
        assert all(one.get_state() == states[number + 1] for one in iterators)
    for one in iterators:
        one.close()


# With UHD_ALL_HOSTS=1 all numbers together; each worker is a process that takes seconds to start.
MANY = [(2, 2), (4, 1), (4, 2)] if os.environ.get("UHD_ALL_HOSTS") else []


@pytest.mark.parametrize(("hosts", "workers"), [(2, 0), (4, 0), (1, 1), (1, 2), (2, 1), *MANY])
def test_order_and_content_are_the_same(reference, hosts, workers):
    check(reference, hosts, workers, 0, 3)


def test_a_run_goes_on_in_the_middle_of_a_window_on_other_numbers_of_hosts(reference):
    middles = [n for n, state in enumerate(reference[1]) if state["position"]["batch"] > 0]
    assert len(middles) > 2
    for hosts, start, stop in zip((4, 1, 2), middles, [*middles[1:3], BATCHES], strict=False):
        check(reference, hosts, 0, start, stop)


def test_the_reference_has_what_is_compared(reference):
    made, states = reference
    counters = made[-1][1].counters
    assert counters[FEWER_SLICES] > 0 and counters[TURNS_CUT] > 0 and counters[TOO_LONG] == 0
    assert any(state["position"]["carried"] for state in states)
    batches = iterator(mixture(), buckets=STAGE["buckets"])  # the same without augmentation
    assert not all(equal(next(batches)[0], batch) for batch, _ in made[:3])
    batches.close()
    assert len({tuple(numbers_of(batch)) for batch, _ in made}) == BATCHES


def test_the_pixels_are_of_the_images_that_are_left():
    """Of two images of a conversation whose first round is cut, the second one, resized as it was planned."""
    batches, source = iterator(mixture(), **STAGE), mixture()
    planner = batches._planner
    kept = (planner._prepare(place, planner.buckets)[0] for place in range(200))
    prepared = next(
        one for one in kept if one.reduction.rounds and one.alterations[-1].size != one.alterations[-1].image
    )
    images = source.images(prepared.index)
    assert len(images) == prepared.first_image + len(prepared.alterations) and prepared.first_image > 0
    altered = alter(images[-1], prepared.alterations[-1])
    plan = prepared.sample.plans[-1]
    assert altered.shape == (*prepared.alterations[-1].size, 3) == (*plan.image, 3)
    expected = cut_views(altered, plan, 14)
    for view, patches in zip(planner.preparer.views(prepared)[-len(expected) :], expected, strict=True):
        np.testing.assert_array_equal(view, patches)
    batches.close()
