"""The order of a batch's rows: what devices get of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uhd_jax.config import BucketConfig, DecoderConfig, ModelConfig, SlicingConfig
from uhd_jax.config.presets import QWEN3_8B
from uhd_jax.data.balance import balanced_order, imbalance, patches_of
from uhd_jax.data.buckets import form_batches
from uhd_jax.data.chat import Needs
from uhd_jax.slicing.plan import plan_image
from uhd_jax.slicing.sizes import Size


@given(st.lists(st.integers(0, 10**6), max_size=48))
def test_every_row_once_and_the_same_everywhere(weights):
    order = balanced_order(weights)
    assert sorted(order) == list(range(len(weights)))
    assert order == balanced_order(list(weights))


@pytest.mark.parametrize("parts", [2, 4, 8, 24])
def test_parts_of_parts_are_balanced(parts):
    """Sums of parts differ by no more than one row."""
    weights = np.random.default_rng(0).integers(0, 1000, 24).tolist()
    ordered = [weights[index] for index in balanced_order(weights)]
    share = len(weights) // parts
    sums = [sum(ordered[start : start + share]) for start in range(0, len(ordered), share)]
    assert max(sums) - min(sums) <= max(weights)


def test_imbalance():
    assert imbalance([1, 1, 1, 1], 2) == imbalance([0, 0], 2) == imbalance([3, 1], 1) == 0
    assert imbalance([3, 1], 4) == 2  # two devices have nothing to do
    assert imbalance([3, 1], 2) == imbalance([3, 0, 0, 1], 2) == 0.5
    assert patches_of([Needs(9, 2, 16), Needs(1, 0, 0), Needs(9, 1, 4)]) == 36


def size_mix(count, random):
    """A third each of photos, page scans, and images of any size and shape, with short texts; some have none."""
    model = ModelConfig(DecoderConfig(**QWEN3_8B), slicing=SlicingConfig())
    for kind in random.integers(0, 4, count):
        words = int(random.integers(40, 400))
        if kind == 3:
            yield Needs(4 * words, 0, 0)
            continue
        height, width = ((480, 640), (2200, 1700), np.exp(random.uniform(np.log(100), np.log(3000), 2)))[kind]
        views = plan_image(Size(int(height), int(width)), model, max_slices=9).views
        patches = max(view.patch_grid.area for view in views)
        yield Needs(words + sum(view.patch_grid.area for view in views) // 16, len(views), patches)


def test_devices_have_about_the_same_number_of_patches():
    """Before and after, over 16 parts of 64 rows; `pytest -s` shows the figures that docs/sharding.md has."""
    needs = list(size_mix(3000, np.random.default_rng(0)))
    buckets = (BucketConfig(slots=12, tokens=4096, patches=2048),)
    before, after = [], []
    for batch in form_batches(needs, 0, buckets, 64, np.random.default_rng(0))[0]:
        weights = [patches_of(needs[i] for i in row) for row in batch.rows]
        after.append(imbalance(weights, 16))
        before.append(imbalance(np.random.default_rng(len(before)).permutation(weights).tolist(), 16))
    print(f"\nimbalance over 16 parts: {np.mean(before):.3f} in any order, {np.mean(after):.3f} balanced")
    assert len(after) >= 4
    assert np.mean(after) < 0.5 * np.mean(before)
