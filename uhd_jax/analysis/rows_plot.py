"""A picture of packed rows: which samples share a row, and what of its tokens and view slots stays empty."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.patches import Patch, Rectangle  # noqa: E402

from uhd_jax.analysis.data_stats import StageData, StageFit  # noqa: E402
from uhd_jax.config import BucketConfig  # noqa: E402
from uhd_jax.data.buckets import choose_bucket  # noqa: E402
from uhd_jax.data.chat import Needs  # noqa: E402
from uhd_jax.data.packing import pack  # noqa: E402

_SAMPLES = ("#1f5fa8", "#7aa6d6", "#4f81b8")  # neighbours differ
_TRAINED, _EMPTY = "#c2410c", "#e4e7eb"


@dataclasses.dataclass(frozen=True)
class PackedRow:
    """One row and the samples in it."""

    bucket: BucketConfig
    samples: tuple[int, ...]
    tokens: tuple[int, ...]  # of each sample
    trained: tuple[int, ...]
    views: tuple[int, ...]
    patches: int  # of all views


def packed_rows(fit: StageFit, samples: Sequence[int]) -> list[PackedRow]:
    """The rows that samples make, as training packs a window of them: bucket by bucket, the fullest rows first.

    Args:
      fit: what a stage makes of its samples.
      samples: numbers of samples; those that are dropped are left out.
    """
    kept = [one for one in samples if fit.kept[one]]
    needs = [Needs(int(fit.tokens[one]), int(fit.views[one]), int(fit.largest[one])) for one in kept]
    chosen = [choose_bucket(need, fit.buckets) for need in needs]
    rows = []
    for bucket in fit.buckets:
        own = [number for number, choice in enumerate(chosen) if choice == bucket]
        for row in pack([needs[number] for number in own], bucket):
            members = [kept[own[number]] for number in row]
            columns = ([int(of[one]) for one in members] for of in (fit.tokens, fit.trained, fit.views))
            rows.append(PackedRow(bucket, tuple(members), *map(tuple, columns), int(fit.patches[members].sum())))
    return sorted(rows, key=lambda row: (fit.buckets.index(row.bucket), -sum(row.tokens)))


def rows_of(data: StageData, fit: StageFit, count: int, window: int) -> tuple[list[PackedRow], int]:
    """The first `count` rows of a window of the stage's samples, and how many rows there are."""
    rows = packed_rows(fit, range(min(window, len(data.index))))
    step = max(1, len(rows) // count)
    return rows[::step][:count], len(rows)


def draw(rows: Sequence[PackedRow], total: int, title: str) -> plt.Figure:
    """Draws rows one under the other.

    Args:
      rows: what is drawn.
      total: rows of the whole window.
      title: what stands on top.

    Returns:
      The figure; the caller saves and closes it.
    """
    longest = max(row.bucket.tokens for row in rows)
    slots = max(row.bucket.slots for row in rows)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 1.9 + 0.3 * len(rows)), width_ratios=(4, 1), sharey=True, layout="constrained"
    )
    for number, row in enumerate(rows):
        left.add_patch(Rectangle((0, number - 0.4), row.bucket.tokens, 0.8, facecolor=_EMPTY))
        right.add_patch(Rectangle((0, number - 0.4), row.bucket.slots, 0.8, facecolor=_EMPTY))
        at = slot = 0
        for place, (tokens, trained, views) in enumerate(zip(row.tokens, row.trained, row.views, strict=True)):
            colour = _SAMPLES[place % len(_SAMPLES)]
            left.add_patch(
                Rectangle((at, number - 0.4), tokens, 0.8, facecolor=colour, edgecolor="white", linewidth=0.6)
            )
            left.add_patch(Rectangle((at + tokens - trained, number + 0.14), trained, 0.26, facecolor=_TRAINED))
            right.add_patch(
                Rectangle((slot, number - 0.4), views, 0.8, facecolor=colour, edgecolor="white", linewidth=0.6)
            )
            at, slot = at + tokens, slot + views
    for panel, width, name in ((left, longest, "tokens"), (right, slots, "view slots")):
        filled = sum(sum(getattr(row, {"tokens": "tokens", "view slots": "views"}[name])) for row in rows)
        room = sum(row.bucket.tokens if name == "tokens" else row.bucket.slots for row in rows)
        panel.set_title(f"{name}: {100 * filled / max(1, room):.1f} % filled", fontsize=10, loc="left")
        panel.set_xlim(0, max(1, width))
        panel.set_xlabel(name)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(left=False)
    left.set_ylim(len(rows) - 0.4, -0.6)
    labels = [f"{len(row.samples)} sample{'s' * (len(row.samples) > 1)}" for row in rows]
    left.set_yticks(np.arange(len(rows)), labels, fontsize=8)
    legend = [
        Patch(color=_SAMPLES[0], label="a sample (shades tell neighbours apart)"),
        Patch(color=_TRAINED, label="so many of its tokens are trained"),
        Patch(color=_EMPTY, label="padding"),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(f"{title}: {len(rows)} of {total} rows", fontsize=11)
    return figure
