"""Whole samples into rows, and rows into a `Batch`.

A row holds as many whole samples as its tokens and its view slots allow; a sample is never split, so a visual block is
never cut. Attention, positions and loss weights keep samples apart, so what stands in a sample's part of the arrays
depends on nothing but the sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from uhd_jax.batch import Batch, Bucket, empty_batch
from uhd_jax.config import BucketConfig
from uhd_jax.data.chat import EncodedSample, Needs
from uhd_jax.slicing.plan import Plan

_IMBALANCE = 4  # measured on mixes of image sizes: 2 to 4 % padding where other heuristics leave 4 to 9 %


def fits(needs: Needs, row: BucketConfig) -> bool:
    """Whether a row of this shape has room for `needs`."""
    return needs.tokens <= row.tokens and needs.views <= row.slots and needs.patches <= row.patches


def row_needs(samples: Iterable[Needs]) -> Needs:
    """What samples ask of the row they share."""
    tokens, views, patches = zip(*samples, strict=True)
    return Needs(sum(tokens), sum(views), max(patches))


def pack(samples: Sequence[Needs], row: BucketConfig) -> list[list[int]]:
    """Distributes samples over rows so that tokens and slots run out together.

    Row by row: the neediest sample opens a row; then follows, as long as one fits, the sample after which the least is
    left of the row, where an imbalance between tokens and slots counts several times.

    Returns:
      Rows of indices into `samples`, each index in exactly one row; ties go to the lower index.

    Raises:
      ValueError: a sample does not fit into an empty row.
    """
    for index, needs in enumerate(samples):
        if not fits(needs, row):
            raise ValueError(f"sample {index} needs {needs}, more than a whole row {row}")
    # Scaled so that a whole row is `size` of either; integers, because every host must come to the same rows.
    slots = max(row.slots, 1)
    size = row.tokens * slots
    tokens = np.array([needs.tokens * slots for needs in samples], np.int64)
    views = np.array([needs.views * row.tokens for needs in samples], np.int64)
    waiting = np.argsort(-np.maximum(tokens, views), kind="stable")
    rows = []
    while len(waiting):
        its_tokens, its_views = tokens[waiting], views[waiting]
        free_tokens = free_views = size
        places, place = [], 0
        while place is not None:
            places.append(place)
            free_tokens -= its_tokens[place]
            free_views -= its_views[place]
            its_tokens[place] = size + 1  # never fits again
            place = _best_fit(free_tokens - its_tokens, free_views - its_views)
        rows.append(waiting[places].tolist())
        waiting = np.delete(waiting, places)
    return rows


def _best_fit(left_tokens: np.ndarray, left_views: np.ndarray) -> int | None:
    """Which sample to take, by what it would leave of the row: int64[N] each; None when none fits."""
    waste = left_tokens + left_views + _IMBALANCE * np.abs(left_tokens - left_views)
    waste[np.minimum(left_tokens, left_views) < 0] = np.iinfo(np.int64).max
    best = int(waste.argmin())
    return best if min(left_tokens[best], left_views[best]) >= 0 else None


def fill_batch(
    rows: Sequence[Sequence[tuple[EncodedSample, Sequence[np.ndarray]]]],
    bucket: Bucket,
    slot_tokens: int,
    sample_weight_power: float = 1.0,
    batch: Batch | None = None,
) -> Batch:
    """Writes samples into the arrays of a batch.

    Args:
      rows: for each row its samples, each with its views: uint8[P_view, patch_bytes] in merge order, images in order.
      bucket: the static shapes; missing rows stay padding.
      slot_tokens: visual tokens of a slot (`ModelConfig.visual_tokens` of the bucket's patches).
      sample_weight_power: a sample of L trained tokens weighs L**power, each of its tokens L**(power - 1).
      batch: what is filled in; its views may be there already (`rooms_for_views`). None: a new one.

    Raises:
      ValueError: a row does not fit into the bucket.
    """
    if len(rows) > bucket.rows:
        raise ValueError(f"{len(rows)} rows do not fit into bucket {bucket}")
    batch = batch or empty_batch(bucket)
    shape = BucketConfig(slots=bucket.slots, tokens=bucket.tokens, patches=bucket.patches)
    for number, row in enumerate(rows):
        if row and not fits(row_needs(sample.needs for sample, _ in row), shape):
            raise ValueError(f"row {number} of {len(row)} samples does not fit into bucket {bucket}")
        start = slot = 0
        for segment, (sample, views) in enumerate(row, 1):
            place = (number, slice(start, start + len(sample.tokens)))
            first = (sample.view + slot) * slot_tokens
            trained = sample.trained.sum()
            batch.tokens[place] = sample.tokens
            batch.positions[place] = np.arange(len(sample.tokens))
            batch.segments[place] = segment
            batch.loss_weights[place] = sample.trained * float(max(trained, 1)) ** (sample_weight_power - 1)
            batch.visual_index[place] = np.where(sample.view >= 0, first + sample.view_token, -1)
            grids = [view.patch_grid for plan in sample.plans for view in plan.views]
            for view, (grid, patches) in enumerate(zip(grids, views, strict=True), slot):
                batch.patches[number, view, : grid.area] = patches  # onto itself: nothing is copied
                batch.patch_grids[number, view] = grid
            start += len(sample.tokens)
            slot += len(grids)
    return batch


def clear_padding(batch: Batch, rows: Sequence[Sequence[Sequence[Plan]]]) -> None:
    """Zeros wherever `fill_batch` puts no view: of each row's samples the plans of their images."""
    for number, row in enumerate(rows):
        slot = 0
        for area in (view.patch_grid.area for plans in row for plan in plans for view in plan.views):
            batch.patches[number, slot, area:] = 0
            slot += 1
        batch.patches[number, slot:] = 0
    batch.patches[len(rows) :] = 0


def rooms_for_views(batch: Batch, rows: Sequence[Sequence[Sequence[Plan]]]) -> list[list[list[np.ndarray]]]:
    """Where `fill_batch` puts views, from the plans of each row's samples: for each row, sample and view
    uint8[P_view, patch_bytes] of `batch`.

    Writing them there at once saves a copy of all pixels.
    """
    rooms = []
    for number, row in enumerate(rows):
        slots = iter(batch.patches[number])
        areas = [[view.patch_grid.area for plan in plans for view in plan.views] for plans in row]
        rooms.append([[next(slots)[:area] for area in views] for views in areas])
    return rooms
