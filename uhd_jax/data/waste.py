"""How much padding samples cost in a list of buckets: the packing of training, without pixels or a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from uhd_jax.config import BucketConfig
from uhd_jax.data.buckets import form_batches, work_of
from uhd_jax.data.chat import Needs
from uhd_jax.data.packing import fits, row_needs


class Waste(NamedTuple):
    """Shares of padding over all batches, and the buckets with which they were made."""

    tokens: float
    slots: float
    patches: float  # of all patches of all slots
    work: float  # of multiply-adds in tower and decoder
    buckets: tuple[BucketConfig, ...]
    rows: int
    left_out: int  # samples that no bucket has room for


def packing_waste(
    samples: Sequence[Needs],
    patches: Sequence[int],
    buckets: Sequence[BucketConfig],
    patch_work: float,
    rows: int,
    window: int,
) -> Waste:
    """Packs samples window by window, as training does, and counts the padding.

    Args:
      samples: needs of each; those that no bucket has room for are left out.
      patches: of all views of each.
      buckets: the static shapes.
      patch_work: see the function of this name.
      rows: rows of a batch.
      window: samples looked at together.

    Returns:
      The shares of padding in whole batches; zeros where the samples do not fill one.
    """
    usable = [i for i, needs in enumerate(samples) if any(fits(needs, bucket) for bucket in buckets)]
    rng = np.random.default_rng(0)
    used, allocated = np.zeros(4), np.zeros(4)
    batches, carried = 0, []
    for start in range(0, len(usable), window):
        here = carried + usable[start : start + window]
        formed, left = form_batches([samples[i] for i in here], len(carried), buckets, rows, rng)
        carried = [here[i] for i in left]
        batches += len(formed)
        for batch in formed:
            members = [here[i] for row in batch.rows for i in row]
            tokens, views, _ = row_needs(samples[i] for i in members)
            held = sum(patches[i] for i in members)
            used += (tokens, views, held, tokens + held * patch_work)
            tokens, slots, most = batch.bucket.tokens, batch.bucket.slots, batch.bucket.patches
            allocated += np.multiply((tokens, slots, slots * most, work_of(batch.bucket, patch_work)), rows)
    shares = 1 - used / np.where(allocated, allocated, 1) if batches else np.zeros(4)
    return Waste(*shares.tolist(), tuple(buckets), batches * rows, len(samples) - len(usable))
