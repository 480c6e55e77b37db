"""Mixtures: shares that hold early and late, every part through its own epochs, one order for every host and worker."""

import dataclasses
import pickle

import numpy as np
import pytest
from pipelines import Numbered, equal, iterator, numbers_of, take

from uhd_jax.config import AugmentConfig, ConfigError, DataConfig
from uhd_jax.data.chat import Message
from uhd_jax.data.sources import SOURCES, SourceKind, check_data, make_source
from uhd_jax.data.sources.mixture import _SMALL, Mixture, MixtureOptions, MixturePart, Stream
from uhd_jax.slicing.sizes import Size


@dataclasses.dataclass(frozen=True)
class CountOptions:
    count: int
    first: int = 0


class Counted(Numbered):
    """Numbered samples that begin with a number of their own."""

    def __init__(self, options, limits=None):
        super().__init__(options.count)
        self._first = options.first

    def messages(self, index):
        user, _ = super().messages(index)
        answer = str(index + self._first)
        return Message("user", (*user.parts[:-1], f"<{answer}>")), Message("assistant", (answer,))

    def where(self, index):
        return f"counted {index}"


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    monkeypatch.setitem(SOURCES, "counted", SourceKind(CountOptions, Counted))


def part(name, count, first=0, **share):
    return {"name": name, "source": "counted", "options": {"count": count, "first": first}} | share


def mixture(*parts):
    return make_source(DataConfig("mixture", {"parts": list(parts)}))


def numbers(source, places, seed=0):
    """The part of every place, and the number of the sample in it."""
    stream = source.stream(seed)
    found = np.array([stream[place] for place in range(places)])
    which = np.searchsorted(source._ends, found, side="right")
    return which, found - np.concatenate([[0], source._ends])[which]


def test_weights_are_shares_of_the_stream():
    source = mixture(part("a", 1000, weight=5), part("b", 400, weight=3), part("c", 70, weight=2))
    which, sample = numbers(source, 10_500)
    for places in (1000, 10_500):
        shares = np.bincount(which[:places], minlength=3) / places
        np.testing.assert_allclose(shares, (0.5, 0.3, 0.2), atol=0.03)
    whole = len(which) // source.stream(0).epoch * source.stream(0).epoch
    np.testing.assert_allclose(np.bincount(which[:whole]) / whole, (0.5, 0.3, 0.2), atol=1e-3)
    for number, count in enumerate((1000, 400, 70)):  # each part goes through its own samples evenly
        seen = np.bincount(sample[which == number], minlength=count)
        assert seen.max() - seen.min() <= 2


def test_epochs_count_how_often_a_round_shows_every_sample():
    source = mixture(part("a", 30, epochs=1), part("b", 10, epochs=3), part("c", 8, epochs=0.5))
    stream = source.stream(0)
    assert stream.epoch == 30 + 30 + 4
    which, sample = numbers(source, 2 * stream.epoch)
    for places, half in ((slice(0, 64), 1), (slice(64, 128), 1)):
        np.testing.assert_array_equal(np.bincount(sample[places][which[places] == 0], minlength=30), half)
        np.testing.assert_array_equal(np.bincount(sample[places][which[places] == 1], minlength=10), 3)
    np.testing.assert_array_equal(np.bincount(sample[which == 2], minlength=8), 1)  # half of it in each round


def test_small_shares_of_small_parts_are_kept():
    source = mixture(part("large", 50, weight=0.999), part("small", 3, weight=0.001))
    stream = source.stream(0)
    assert stream.epoch == pytest.approx(100 / 0.001, rel=0.01) and stream._places[1] == 100


def test_order_follows_from_the_seed_and_the_place_alone():
    parts = part("a", 40, weight=1), part("b", 60, 100, weight=2)
    one, same = mixture(*parts).stream(7), pickle.loads(pickle.dumps(mixture(*parts).stream(7)))
    places = np.random.default_rng(0).integers(0, 2000, 300).tolist()
    assert [one[place] for place in places] == [same[place] for place in reversed(places)][::-1]
    other = mixture(*parts).stream(8)
    assert [one[place] for place in range(50)] != [other[place] for place in range(50)]
    rounds = [[one[place] for place in range(start, start + one.epoch)] for start in (0, one.epoch)]
    assert rounds[0] != rounds[1]


@pytest.mark.parametrize("count", [_SMALL, _SMALL + 1])
def test_a_stream_shows_every_sample_once_in_an_epoch(count):
    """Also one that is too large to be shuffled as a whole, which Grain does place by place."""
    stream = Stream(count, seed=3)
    assert stream.epoch == count
    epochs = [[stream[place] for place in range(first, first + count)] for first in (0, count)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(count))
    assert epochs[0] != epochs[1] != epochs[0][::-1] and epochs[0] != list(range(count))
    assert stream.visit(count + 5) == (epochs[1][5], 1)
    assert [pickle.loads(pickle.dumps(stream))[place] for place in (7, 5)] == [epochs[0][7], epochs[0][5]]
    assert [Stream(count, seed=4)[place] for place in range(50)] != epochs[0][:50]


def test_samples_are_those_of_the_parts():
    source = mixture(part("a", 3, epochs=1), part("b", 4, 100, epochs=1))
    assert len(source) == 7
    assert [source.messages(index)[1].parts[0] for index in range(7)] == ["0", "1", "2", "100", "101", "102", "103"]
    assert source.where(4) == "b: counted 1" and source.sizes(4) == Numbered().sizes(1)
    np.testing.assert_array_equal(source.images(4)[0], Numbered().images(1)[0])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_see_one_order(hosts):
    """More of this, with worker processes: test_pipeline_order.py."""
    source = mixture(part("a", 30, weight=3), part("b", 20, 500, weight=1))
    reference = iterator(source)
    expected = [numbers_of(batch) for batch, _ in take(reference, 4)]
    reference.close()
    iterators = [iterator(source, (host, hosts)) for host in range(hosts)]
    for numbers_expected in expected:
        rows = [numbers_of(next(one)[0]) for one in iterators]
        assert sum(rows, []) == numbers_expected
    for one in iterators:
        one.close()


def test_resume_is_exact_and_another_mixture_is_refused():
    parts = part("a", 30, weight=3), part("b", 20, 500, weight=1)
    batches = iterator(mixture(*parts))
    take(batches, 3)
    state = batches.get_state()
    following = next(batches)[0]
    batches.close()
    resumed = iterator(mixture(*parts), (0, 1))
    resumed.set_state(state)
    assert equal(next(resumed)[0], following)
    resumed.close()


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        ([], r"data\.options\.parts: is empty"),
        ([part("a", 1)], r"data\.options\.parts\[0\]\.weight: give the part either a weight or epochs"),
        ([part("a", 1, weight=1, epochs=1)], r"parts\[0\]\.weight: give the part either"),
        ([part("a", 1, weight=-1)], r"parts\[0\]\.weight: must be at least 0"),
        ([part("a", 1, weight=1), part("b", 1, epochs=1)], r"parts: give all parts a weight, or all of them epochs"),
        ([part("a", 1, weight=1), part("a", 1, weight=1)], r"parts: names repeat"),
        ([part("a", 1, weight=1) | {"source": "x"}], r"data\.options\.parts\[0\]\.source: 'x' is not one of"),
        ([part("a", 1, weight=1) | {"source": "mixture"}], r"parts\[0\]\.source: a mixture cannot be part of another"),
        ([part("a", 1, weight=1) | {"options": {"counts": 1}}], r"data\.options\.parts\[0\]\.options\.counts: unknown"),
    ],
)
def test_impossible_mixtures_are_named(parts, complaint):
    with pytest.raises(ConfigError, match=complaint):
        check_data(DataConfig("mixture", {"parts": parts}))


def test_enhancement_names_parts_of_the_mixture():
    source = mixture(part("pages", 30, weight=1), part("photos", 30, weight=1))
    images = {}
    for parts in (("pages",), ("photos",), ()):
        batches = iterator(source, augment=AugmentConfig(ocr_probability=1.0, ocr_parts=parts))
        images[parts] = {
            int(index): batches._planner.preparer.drawn(index, 0, [Size(9, 9)])[0].alteration.ocr_seed >= 0
            for index in (0, 29, 30, 59)
        }
        batches.close()
    assert list(images["pages",].values()) == [True, True, False, False]
    assert list(images["photos",].values()) == [False, False, True, True] and all(images[()].values())
    augment = AugmentConfig(ocr_parts=("scans",))
    with pytest.raises(ConfigError, match="stage 's': augment.ocr_parts: 'scans': the parts .* are pages, photos"):
        iterator(source, augment=augment)
    with pytest.raises(ConfigError, match="'scans': its data is no mixture"):
        iterator(Numbered(), augment=augment)


def test_an_empty_part_is_named():
    with pytest.raises(ConfigError, match="the part 'b' has no samples"):
        options = MixtureOptions((MixturePart("a", "x", weight=1), MixturePart("b", "x", weight=1)))
        Mixture(options, [Numbered(3), Numbered(0)])
