"""Buckets from sizes, and batches of one bucket."""

import itertools

import numpy as np
import pytest

from uhd_jax.batch import Bucket, empty_batch
from uhd_jax.config import BucketConfig, CompressorConfig, DecoderConfig, ModelConfig, TowerConfig
from uhd_jax.data.buckets import choose_bucket, fill_of, form_batches, patch_work, plan_buckets, work_of
from uhd_jax.data.chat import Needs
from uhd_jax.data.packing import fits, pack, row_needs


def random_samples(seed, count=300, sizes=(64, 96, 128)):
    rng = np.random.default_rng(seed)
    views = rng.integers(0, 8, count)
    text = rng.integers(5, 60, count)
    return [Needs(int(4 * v + t), int(v), int(rng.choice(sizes)) if v else 0) for v, t in zip(views, text, strict=True)]


def test_the_bucket_of_a_sample_is_the_one_with_the_smallest_views_that_has_room():
    small, large = BucketConfig(slots=9, tokens=100, patches=64), BucketConfig(slots=6, tokens=100, patches=96)
    assert choose_bucket(Needs(100, 9, 64), (small, large)) == small
    assert choose_bucket(Needs(100, 6, 65), (small, large)) == large
    assert choose_bucket(Needs(10, 0, 0), (large, small)) == small
    with pytest.raises(ValueError, match="no bucket"):
        choose_bucket(Needs(100, 7, 65), (small, large))


@pytest.mark.parametrize("budget", [1, 2, 3])
@pytest.mark.parametrize("slots", [0, 12])
def test_planned_buckets_have_room_for_all_and_keep_the_budget(budget, slots):
    samples = random_samples(budget)
    buckets = plan_buckets(samples, 256, budget, 0.3, slots)
    assert 1 <= len(buckets) <= budget
    assert all(any(fits(needs, bucket) for bucket in buckets) for needs in samples)
    assert all(bucket.tokens == 256 and (not slots or bucket.slots == slots) for bucket in buckets)
    assert [b.patches for b in buckets] == sorted(b.patches for b in buckets)
    assert buckets == plan_buckets(samples, 256, budget, 0.3, slots)


def test_a_larger_budget_never_costs_more_padded_patches():
    samples = random_samples(7, 600)
    costs = []
    for budget in (1, 2, 3):
        buckets = plan_buckets(samples, 256, budget, 1.0)
        costs.append(sum(needs.views * choose_bucket(needs, buckets).patches for needs in samples))
    assert costs[0] > costs[1] > costs[2]
    assert costs[2] == sum(needs.views * needs.patches for needs in samples)


def test_borders_between_view_sizes_are_the_best_there_are():
    samples = random_samples(11, 400, sizes=(16, 32, 80, 96, 128))
    buckets = plan_buckets(samples, 256, 2, 1.0)

    def padded(borders):
        return sum(n.views * min(b for b in borders if b >= n.patches) for n in samples)

    best = min(padded(borders) for borders in itertools.product((16, 32, 80, 96, 128), (128,)))
    assert padded([b.patches for b in buckets]) == best


def test_slots_follow_the_price_of_a_patch():
    """Where a patch costs nothing, slots are no reason for another row; where it is dear, few slots stay empty."""
    samples = [Needs(20, 1, 64)] * 40 + [Needs(60, 0, 0)] * 40
    cheap = plan_buckets(samples, 120, 1, 1e-6)[0]
    dear = plan_buckets(samples, 120, 1, 10.0)[0]

    def rows(bucket):
        return len(pack(samples, bucket))

    assert dear.slots < cheap.slots and rows(cheap) <= rows(dear)
    assert rows(dear) * work_of(dear, 10.0) < rows(cheap) * work_of(cheap, 10.0)


def test_no_samples_still_give_a_bucket():
    [bucket] = plan_buckets([], 128, 2, 1.0)
    assert bucket.tokens == 128 and bucket.slots == 1 and bucket.patches % 64 == 0


def test_batches_are_whole_of_one_bucket_and_lose_nothing():
    buckets = (BucketConfig(slots=12, tokens=256, patches=64), BucketConfig(slots=10, tokens=256, patches=128))
    for seed in range(10):
        samples = random_samples(seed, 250)
        batches, left = form_batches(samples, 0, buckets, 4, np.random.default_rng(seed))
        placed = [i for batch in batches for row in batch.rows for i in row]
        assert sorted(placed + left) == list(range(250))
        for batch in batches:
            assert len(batch.rows) == 4
            for row in batch.rows:
                assert fits(row_needs(samples[i] for i in row), batch.bucket)
                assert all(choose_bucket(samples[i], buckets) == batch.bucket for i in row)
        again = form_batches(samples, 0, buckets, 4, np.random.default_rng(seed))
        assert again == (batches, left)
        assert len(left) < 8 * 12


def test_samples_left_over_before_go_first():
    bucket = BucketConfig(slots=4, tokens=100, patches=64)
    samples = [Needs(10, 1, 64)] + [Needs(100, 1, 64)] * 6
    [emptiest] = form_batches(samples, 0, (bucket,), 3, np.random.default_rng(0))[1]
    [other] = form_batches(samples, 1, (bucket,), 3, np.random.default_rng(0))[1]
    assert emptiest == 0 and other != 0


def test_fill_counts_what_the_arrays_hold():
    batch = empty_batch(Bucket(rows=2, slots=2, tokens=8, patches=64, patch_bytes=16))
    batch.segments[0, :4] = 1
    batch.patch_grids[0, 0] = (4, 8)
    assert fill_of(batch) == (0.25, 0.25, 0.125)


def test_patch_work_is_the_ratio_of_matrix_products():
    tower = TowerConfig(width=8, mlp_width=16, layers=4, heads=2)
    decoder = DecoderConfig(vocab_size=10, width=8, mlp_width=8, layers=1, heads=2, kv_heads=1, head_dim=4)
    per_token = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 8 + 8 * 10  # q, k and v, out, mlp, head
    per_layer = 4 * 64 + 2 * 8 * 16
    model = ModelConfig(decoder=decoder, tower=tower, compressor=CompressorConfig(after_layer=1))
    assert patch_work(model) == pytest.approx(per_layer * (2 + 2 / 4) / per_token)
    model = ModelConfig(decoder=decoder, tower=tower, compressor=CompressorConfig(after_layer=1), mode="4x")
    assert patch_work(model) == pytest.approx(per_layer * 4 / per_token)
