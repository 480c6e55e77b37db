"""How much there is to compute, as sums that add up over views, samples, rows and batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from uhd_jax.batch import Batch, Bucket
from uhd_jax.ops.roi_align import MAX_BINS
from uhd_jax.slicing.plan import Plan

# Bins of a window (height, width), of which the nearest to a view in aspect ratio is taken: as `ops.roi_align`, whose
# arrays are on a device (spec v1-v2 section 3.2).
_BINS = np.array([(2, 4), (2, 3), (3, 4), (3, 3), (4, 2), (3, 2), (4, 3)])


@dataclasses.dataclass(frozen=True)
class Work:
    """Views and samples, counted."""

    views: int = 0
    patches: int = 0
    patch_pairs: int = 0  # sum over views of patches**2
    bins: int = 0  # sum over views of the RoI bins of one window, chosen by the view's aspect ratio
    tokens: int = 0  # of the decoder, visual tokens included
    token_pairs: int = 0  # sum over samples of tokens * (tokens + 1) / 2

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def work(patch_grids: Iterable[tuple[int, int]], sample_tokens: Iterable[int]) -> Work:
    """Work of views of so many patches (rows, cols) and of samples of so many tokens."""
    grids = np.array([*patch_grids], np.int64).reshape(-1, 2)
    samples = list(sample_tokens)
    patches = grids.prod(axis=-1)
    return Work(
        views=len(grids),
        patches=int(patches.sum()),
        patch_pairs=int((patches**2).sum()),
        bins=int(window_bins(grids).sum()),
        tokens=sum(samples),
        token_pairs=sum(n * (n + 1) // 2 for n in samples),
    )


def window_bins(patch_grids: np.ndarray) -> np.ndarray:
    """Bins of a window in each view, int[V], from int[V, 2] patch rows and columns, none of them 0."""
    ratios = np.log(patch_grids[:, 1] / patch_grids[:, 0])
    nearest = np.abs(ratios[:, None] - np.log(_BINS[:, 1] / _BINS[:, 0])).argmin(axis=1)
    return _BINS.prod(axis=1)[nearest]


def plan_work(plan: Plan, text_tokens: int = 0) -> Work:
    """Work of one image in one sample with `text_tokens` others."""
    return work((view.patch_grid for view in plan.views), [plan.visual_tokens + text_tokens])


def batch_work(batch: Batch) -> Work:
    """The real work in a batch (NumPy): padding patches, empty slots and padding tokens left out."""
    grids = batch.patch_grids.reshape(-1, 2)
    lengths = [np.bincount(row, minlength=1)[1:] for row in batch.segments]
    return work(grids[grids.prod(axis=-1) > 0].tolist(), np.concatenate(lengths).tolist())


def bucket_work(bucket: Bucket) -> Work:
    """The work a full batch would hold: every slot a view of all its patches, every row one sample."""
    views, samples = bucket.rows * bucket.slots, work([], [bucket.tokens] * bucket.rows)
    return dataclasses.replace(
        samples,
        views=views,
        patches=views * bucket.patches,
        patch_pairs=views * bucket.patches**2,
        bins=views * MAX_BINS,
    )
