"""Static shapes from sizes: which few programs to compile, and which samples run in which of them.

Every bucket is one compiled program, so there are few; every row is padded to its bucket, so the few are chosen to
waste little. Slots are padded to the largest view of a bucket, so a bucket is a class of view sizes. All of it follows
from needs (sizes and texts) alone: all hosts of a pod choose the same bucket without talking.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from uhd_jax.batch import Batch
from uhd_jax.config import BucketConfig, ModelConfig
from uhd_jax.data.balance import balanced_order, patches_of
from uhd_jax.data.chat import Needs
from uhd_jax.data.packing import fits, pack, row_needs

_PATCH_MULTIPLE = 64  # of the largest bucket: room for views a little larger than those seen; 4**levels divides it
_CANDIDATES = 10  # borders between view sizes that the planner tries; and twice as many numbers of slots
_PACKED_SAMPLES = 1024  # packed by the planner for every number of slots it tries


class Fill(NamedTuple):
    """Shares of a batch's arrays that hold data; one minus these is the padding waste."""

    tokens: float
    slots: float
    patches: float  # of all patches of all slots


def fill_of(batch: Batch) -> Fill:
    """How full a batch is."""
    patches = batch.patch_grids.prod(axis=-1)
    return Fill(
        float((batch.segments > 0).mean()), float((patches > 0).mean()), float(patches.mean() / batch.bucket.patches)
    )


def patch_work(model: ModelConfig) -> float:
    """Work of a patch in tower over work of a token in decoder: multiply-adds of matrix products, attention aside."""
    tower, decoder = model.tower, model.decoder
    per_layer = 4 * tower.width**2 + 2 * tower.width * tower.mlp_width
    compresses = model.compressor.kind != "none" and model.mode == "16x"
    full_layers = model.compressor.after_layer + 1 if compresses else tower.layers
    patch = per_layer * (full_layers + (tower.layers - full_layers) / 4)
    attention = decoder.width * decoder.head_dim * 2 * (decoder.heads + decoder.kv_heads)
    token = decoder.layers * (attention + 3 * decoder.width * decoder.mlp_width) + decoder.width * decoder.vocab_size
    return patch / token


def work_of(bucket: BucketConfig, patch_work: float) -> float:
    """Work of one row of a bucket, padding included, in decoder tokens."""
    return bucket.tokens + bucket.slots * bucket.patches * patch_work


def choose_bucket(needs: Needs, buckets: Sequence[BucketConfig]) -> BucketConfig:
    """The bucket of a sample: of those with room for it the one with the smallest views.

    Raises:
      ValueError: no bucket has room.
    """
    room = [bucket for bucket in buckets if fits(needs, bucket)]
    if not room:
        raise ValueError(f"no bucket of {list(buckets)} has room for {needs}")
    return min(room, key=lambda bucket: (bucket.patches, bucket.slots, bucket.tokens))


class PackedBatch(NamedTuple):
    """Which samples share a batch, row by row in `balanced_order`, and its bucket."""

    rows: tuple[tuple[int, ...], ...]
    bucket: BucketConfig


def form_batches(
    samples: Sequence[Needs], urgent: int, buckets: Sequence[BucketConfig], rows: int, rng: np.random.Generator
) -> tuple[list[PackedBatch], list[int]]:
    """Packs samples into rows, bucket by bucket, and rows into whole batches.

    Args:
      samples: what to pack.
      urgent: so many of the first samples are placed before others stay behind.
      buckets: the static shapes; each sample fits into a row of one.
      rows: rows of a batch.
      rng: decides which rows of a bucket meet, and the order of the batches.

    Returns:
      Batches of indices into `samples`, and the indices left over: the emptiest rows, fewer than `rows` per bucket.
    """
    chosen = [choose_bucket(needs, buckets) for needs in samples]
    batches, left = [], []
    for bucket in buckets:
        members = [index for index, choice in enumerate(chosen) if choice == bucket]
        packed = [[members[i] for i in row] for row in pack([samples[i] for i in members], bucket)]
        packed.sort(key=lambda row: (min(row) >= urgent, -row_needs(samples[i] for i in row).tokens))
        whole = len(packed) // rows * rows
        order = rng.permutation(whole)
        for start in range(0, whole, rows):
            met = [packed[r] for r in order[start : start + rows]]
            patches = [patches_of(samples[i] for i in row) for row in met]
            batches.append(PackedBatch(tuple(tuple(met[r]) for r in balanced_order(patches)), bucket))
        left += [index for row in packed[whole:] for index in row]
    return [batches[i] for i in rng.permutation(len(batches))], sorted(left)


def plan_buckets(
    samples: Sequence[Needs], packed_length: int, budget: int, patch_work: float, slots: int = 0
) -> tuple[BucketConfig, ...]:
    """Chooses at most `budget` buckets that waste little when samples like these are packed.

    Args:
      samples: needs of some of the data; each fits into `packed_length`. The more of them, the surer that the largest
        view of the data is among them.
      packed_length: tokens per row, the same in every bucket.
      budget: how many programs may be compiled.
      patch_work: see the function of this name.
      slots: views per row; 0 leaves the choice here, at least the views of the neediest sample.

    Returns:
      Buckets in order of their patches per view; the last takes the largest view of `samples` and a little more.
    """
    if not samples:
        return (BucketConfig(slots=max(1, slots), tokens=packed_length, patches=_PATCH_MULTIPLE),)
    patches = np.array([needs.patches for needs in samples])
    views = np.array([needs.views for needs in samples])
    inner = _spread(patches)[:-1]
    largest = max(-(-int(patches.max()) // _PATCH_MULTIPLE), 1) * _PATCH_MULTIPLE

    def padded(borders: tuple[int, ...]) -> int:
        """Patches of all slots when each sample's views are padded to the next border."""
        return int((views * np.array(borders)[np.searchsorted(borders, patches)]).sum())

    options = [(*chosen, largest) for count in range(budget) for chosen in itertools.combinations(inner, count)]
    borders = min(options, key=lambda option: (padded(option), len(option)))
    buckets = []
    for low, high in itertools.pairwise((-1, *borders)):
        members = [needs for needs, size in zip(samples, patches, strict=True) if low < size <= high]
        bucket = BucketConfig(slots=max(1, slots), tokens=packed_length, patches=high)
        buckets.append(bucket if slots else _with_slots(members, bucket, patch_work))
    return tuple(buckets)


def _with_slots(samples: Sequence[Needs], bucket: BucketConfig, patch_work: float) -> BucketConfig:
    """The bucket with the number of slots that makes the least work of packing `samples`."""
    fewest = max(1, *(needs.views for needs in samples))
    samples = samples[:_PACKED_SAMPLES]
    tokens, views, _ = row_needs(samples)
    even = bucket.tokens * views / tokens  # slots with which tokens and slots would run out together
    candidates = [
        dataclasses.replace(bucket, slots=slots)
        for slots in sorted({max(fewest, round(even * factor)) for factor in np.linspace(0.9, 1.5, 2 * _CANDIDATES)})
    ]
    return min(candidates, key=lambda b: len(pack(samples, b)) * work_of(b, patch_work))


def _spread(values: Sequence[int]) -> list[int]:
    """At most `_CANDIDATES` of the values, evenly spread by rank, the largest among them."""
    ranks = np.linspace(0, 1, _CANDIDATES + 1)[1:]
    return sorted({int(value) for value in np.quantile(values, ranks, method="higher") if value > 0})
