"""How much padding a mix of image sizes costs, with how many buckets: the planner measured without data or device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from uhd_jax.config import BucketConfig, ModelConfig
from uhd_jax.data.buckets import form_batches, patch_work, plan_buckets, work_of
from uhd_jax.data.chat import Needs
from uhd_jax.data.packing import fits, row_needs
from uhd_jax.slicing.plan import Size, plan_image

SizeMix = Literal["photos", "page_scans", "log_uniform"]

_PHOTOS = (
    (3024, 4032),
    (1536, 2048),
    (1365, 2048),
    (1080, 1920),
    (768, 1024),
    (720, 1280),
    (480, 640),
    (427, 640),
    (333, 500),
)
_PAPER_INCHES = ((11.69, 8.27), (11.0, 8.5), (8.27, 5.83))
_SCAN_DPI = (72, 100, 150, 200, 300)
PLANNING_SAMPLES = 2048  # that the bucket planner sees, as in training
_CHAT_TOKENS = 12  # turn marks, image id and newlines of a conversation of one question


class Waste(NamedTuple):
    """Shares of padding over all batches, and the buckets with which they were made."""

    tokens: float
    slots: float
    patches: float  # of all patches of all slots
    work: float  # of multiply-adds in tower and decoder
    buckets: tuple[BucketConfig, ...]
    rows: int
    left_out: int  # samples that no bucket has room for


def sample_sizes(mix: SizeMix, count: int, seed: int = 0) -> list[Size]:
    """Draws image sizes.

    Args:
      mix: "photos": camera, screen and web sizes, 7 of 10 landscape, 3 of 10 cropped; "page_scans": paper sizes at 72
        to 300 dpi, cut by up to 3 %, 1 of 7 landscape; "log_uniform": both sides log-uniform in 64 to 4096, aspect
        ratio at most 10.
      count: how many.
      seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    sizes = []
    while len(sizes) < count:
        if mix == "photos":
            height, width = np.array(_PHOTOS[rng.integers(len(_PHOTOS))]) * (
                rng.uniform(0.5, 1, 2) if rng.random() < 0.3 else 1
            )
            sideways = rng.random() < 0.3
        elif mix == "page_scans":
            paper = np.array(_PAPER_INCHES[rng.integers(len(_PAPER_INCHES))])
            height, width = paper * _SCAN_DPI[rng.integers(len(_SCAN_DPI))] * rng.uniform(0.97, 1, 2)
            sideways = rng.random() < 1 / 7
        else:
            height, width = np.exp(rng.uniform(np.log(64), np.log(4096), 2))
            sideways = False
            if max(height, width) > 10 * min(height, width):
                continue
        sizes.append(Size(int(width), int(height)) if sideways else Size(int(height), int(width)))
    return sizes


def measure_waste(
    sizes: Sequence[Size],
    model: ModelConfig,
    packed_length: int,
    budget: int,
    rows: int = 16,
    window: int = 1024,
    max_slices: int | None = None,
) -> Waste:
    """Packs conversations about one image each, window by window as training does, and counts the padding.

    Text lengths are log-normal with median 80 tokens. Samples longer than a row are left out.

    Args:
      sizes: of the images.
      model: slicing, and the work of patches and tokens.
      packed_length: tokens per row.
      budget: how many buckets may be used.
      rows: rows of a batch.
      window: samples looked at together.
      max_slices: replaces the model's limit.
    """
    texts = np.random.default_rng(len(sizes)).lognormal(np.log(80), 0.8, len(sizes)).clip(4, 1500).astype(int)
    samples, patches = [], []
    for size, text in zip(sizes, texts, strict=True):
        plan = plan_image(size, model, max_slices=max_slices)
        marks = 2 * len(plan.views) + max(plan.grid.rows - 1, 0)
        tokens = plan.visual_tokens + marks + _CHAT_TOKENS + int(text)
        if tokens <= packed_length:
            samples.append(Needs(tokens, len(plan.views), max(view.patch_grid.area for view in plan.views)))
            patches.append(plan.patches)
    work = patch_work(model)
    buckets = plan_buckets(samples[:PLANNING_SAMPLES], packed_length, budget, work)
    waste = packing_waste(samples, patches, buckets, work, rows, window)
    return waste._replace(left_out=waste.left_out + len(sizes) - len(samples))


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
