"""Rows of whole samples and the arrays of a batch."""

import numpy as np
import pytest

from uhd_jax.batch import Bucket
from uhd_jax.config import BucketConfig, ChatConfig, SlicingConfig
from uhd_jax.data.chat import ImagePart, Message, Needs, encode_chat
from uhd_jax.data.packing import fill_batch, fits, pack, row_needs
from uhd_jax.data.tokenizer import byte_tokenizer
from uhd_jax.slicing.pixels import cut_views
from uhd_jax.slicing.plan import Size, make_plan

SLICING = SlicingConfig(scale_resolution=112)
TOKENIZER, CHAT = byte_tokenizer(), ChatConfig()
LEVELS, PATCH = 2, 14


def sample(rng, sizes, answer="seven", max_slices=None):
    """An encoded sample with random pixels, and its views."""
    plans = [make_plan(Size(*size), SLICING, PATCH, LEVELS, max_slices) for size in sizes]
    messages = [
        Message("user", (*map(ImagePart, range(len(sizes))), "Which digit?")),
        Message("assistant", (answer,)),
    ]
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    views = [view for image, plan in zip(images, plans, strict=True) for view in cut_views(image, plan, PATCH)]
    return encode_chat(messages, plans, TOKENIZER, CHAT), views


def random_needs(rng, count, row):
    return [
        Needs(int(t), int(v), 1)
        for t, v in zip(rng.integers(1, row.tokens + 1, count), rng.integers(0, row.slots + 1, count), strict=True)
    ]


def test_every_sample_is_in_exactly_one_row_and_no_row_overflows():
    rng = np.random.default_rng(0)
    for _ in range(30):
        row = BucketConfig(slots=int(rng.integers(1, 20)), tokens=int(rng.integers(10, 500)), patches=1)
        samples = random_needs(rng, int(rng.integers(0, 80)), row)
        rows = pack(samples, row)
        assert sorted(i for members in rows for i in members) == list(range(len(samples)))
        assert all(fits(row_needs(samples[i] for i in members), row) for members in rows)
        assert rows == pack(samples, row)


def test_packing_comes_close_to_the_lower_bound():
    rng = np.random.default_rng(1)
    row = BucketConfig(slots=58, tokens=5000, patches=1)
    samples = [
        Needs(65 * v + int(text), v, 1)
        for v, text in zip(rng.integers(1, 11, 600), rng.lognormal(4.4, 0.8, 600), strict=True)
    ]
    tokens, views, _ = row_needs(samples)
    bound = max(tokens / row.tokens, views / row.slots)
    assert len(pack(samples, row)) <= 1.02 * bound + 1


def test_rows_of_text_alone_need_no_slots():
    row = BucketConfig(slots=0, tokens=10, patches=0)
    assert pack([Needs(6, 0, 0), Needs(6, 0, 0), Needs(4, 0, 0)], row) == [[0, 2], [1]]


def test_a_sample_larger_than_a_row_is_an_error():
    with pytest.raises(ValueError, match="sample 1 needs"):
        pack([Needs(1, 1, 1), Needs(11, 1, 1)], BucketConfig(slots=2, tokens=10, patches=1))


def test_arrays_of_a_batch():
    rng = np.random.default_rng(0)
    first, first_views = sample(rng, [(112, 224)], answer="ab")
    text, _ = sample(rng, [])
    second, second_views = sample(rng, [(112, 112), (224, 224)], answer="c")
    bucket = Bucket(rows=3, slots=10, tokens=256, patches=96, patch_bytes=784)
    batch = fill_batch(
        [
            [(first, first_views), (text, []), (second, second_views)],
            [(second, second_views)],
        ],
        bucket,
        bucket.patches // 16,
        0.5,
    )
    assert batch.bucket == bucket
    a, b, c = (len(s.tokens) for s in (first, text, second))
    segments = np.repeat([1, 2, 3, 0], [a, b, c, 256 - a - b - c])
    np.testing.assert_array_equal(batch.segments[0], segments)
    np.testing.assert_array_equal(batch.positions[0][: a + b + c], np.r_[:a, :b, :c])
    np.testing.assert_array_equal(batch.tokens[0][a + b : a + b + c], second.tokens)
    assert not batch.segments[2].any() and (batch.visual_index[2] == -1).all() and not batch.patch_grids[2].any()
    # visual tokens: slot * (96 // 16) + token, in slots 0.. of the row
    tokens = [view.visual_tokens for s in (first, second) for plan in s.plans for view in plan.views]
    expected = [6 * slot + token for slot, count in enumerate(tokens) for token in range(count)]
    assert batch.visual_index[0][batch.visual_index[0] >= 0].tolist() == expected
    for slot, view in enumerate([*first_views, *second_views]):
        assert batch.patch_grids[0, slot].prod() == len(view)
        np.testing.assert_array_equal(batch.patches[0, slot, : len(view)], view)
        assert not batch.patches[0, slot, len(view) :].any()
    # "ab" and its end of turn: three trained tokens, sqrt(3) in all
    np.testing.assert_allclose(batch.loss_weights[0][:a].sum(), np.sqrt(3), rtol=1e-6)
    np.testing.assert_array_equal(batch.loss_weights[0][:a] > 0, first.trained)
    assert not (batch.loss_weights[0] > 0)[batch.visual_index[0] >= 0].any()


def test_a_power_of_one_weighs_every_trained_token_alike():
    rng = np.random.default_rng(0)
    made = sample(rng, [], "long answer"), sample(rng, [], "x")
    batch = fill_batch([made], Bucket(1, 1, 256, 16, 784), 1)
    assert set(batch.loss_weights.ravel().tolist()) == {0.0, 1.0}
    assert batch.loss_weights.sum() == sum(s.trained.sum() for s, _ in made)


def test_a_samples_arrays_do_not_depend_on_neighbours_row_slot_or_bucket():
    rng = np.random.default_rng(3)
    target, views = sample(rng, [(150, 300)])
    others = [sample(rng, [size]) for size in ((112, 112), (300, 150), (336, 224))]
    buckets = [Bucket(2, 24, 512, 64, 784), Bucket(1, 40, 768, 96, 784)]
    seen = []
    for bucket in buckets:
        for before in ([], others[:1], others):
            row = [*before, (target, views), *others[1:2]]
            batch = fill_batch([[]] * (bucket.rows - 1) + [row], bucket, bucket.patches // 16, 0.5)
            at = batch.segments[-1] == len(before) + 1
            visual = batch.visual_index[-1][at]
            slot, token = np.divmod(visual[visual >= 0], bucket.patches // 16)
            grids = batch.patch_grids[-1][np.unique(slot)]
            patches = [batch.patches[-1][s][: g.prod()] for s, g in zip(np.unique(slot), grids, strict=True)]
            seen.append(
                [
                    batch.tokens[-1][at],
                    batch.positions[-1][at],
                    batch.loss_weights[-1][at],
                    slot - slot.min(),
                    token,
                    grids,
                    *patches,
                ]
            )
    for other in seen[1:]:
        for array, same in zip(seen[0], other, strict=True):
            np.testing.assert_array_equal(array, same)


def test_rows_that_do_not_fit_are_refused():
    made = sample(np.random.default_rng(0), [(224, 224)])
    for bucket in (Bucket(1, 4, 256, 64, 784), Bucket(1, 5, 32, 64, 784), Bucket(1, 5, 256, 48, 784)):
        with pytest.raises(ValueError, match="row 0 of 1 samples does not fit"):
            fill_batch([[made]], bucket, bucket.patches // 16)
    with pytest.raises(ValueError, match="2 rows do not fit"):
        fill_batch([[made], [made]], Bucket(1, 5, 256, 64, 784), 4)
