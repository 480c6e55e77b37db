"""A picture of the data of every stage: image sizes, lengths, views, what is dropped, and padding by bucket list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib import ticker  # noqa: E402

from uhd_jax.analysis.data_stats import StageData, StageFit  # noqa: E402

_LINE, _LIGHT, _ACCENT = "#1f5fa8", "#a9c7e8", "#c2410c"
_PADDING = {"tokens": "#1f5fa8", "slots": "#7aa6d6", "patches": "#c2410c", "work": "#1f2933"}


def stages(found: Sequence[tuple[StageData, StageFit, dict[str, Any]]], title: str) -> plt.Figure:
    """Draws a row of panels per stage.

    Args:
      found: data, fit and report (`data_stats.stage_report`) of each.
      title: what stands above the panels.

    Returns:
      The figure; the caller saves and closes it.
    """
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, panels = plt.subplots(
            len(found), 4, squeeze=False, figsize=(15, 0.5 + 3.3 * len(found)), layout="constrained"
        )
        for row, (data, fit, report) in zip(panels, found, strict=True):
            _sizes(row[0], data, report)
            _tokens(row[1], data, fit)
            _views(row[2], fit)
            _padding(row[3], report)
        figure.suptitle(title, fontsize=11)
    return figure


def _sizes(panel: plt.Axes, data: StageData, report: dict[str, Any]) -> None:
    kept, samples, images = report["kept"], report["samples"], report["images"]
    panel.set_title(f"{report['stage']}\n{kept:,} of {samples:,} samples kept, {images:,} images", fontsize=10)
    panel.set_xlabel("width of an image, pixels")
    panel.set_ylabel("height, pixels")
    sizes = data.index.sizes
    if not len(sizes):
        panel.text(0.5, 0.5, "no images", ha="center", transform=panel.transAxes)
        return
    low, high = sizes.min() / 1.3, sizes.max() * 1.3
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.plot([low, high], [low, high], color="#cbd2d9", linewidth=1, zorder=0)
    grid = panel.hexbin(
        sizes[:, 1],
        sizes[:, 0],
        xscale="log",
        yscale="log",
        gridsize=30,
        bins="log",
        cmap="Blues",
        mincnt=1,
        extent=(*np.log10([low, high]), *np.log10([low, high])),
    )
    grid.set_clim(0.3, None)
    panel.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
        axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.set_minor_formatter(ticker.NullFormatter())


def _tokens(panel: plt.Axes, data: StageData, fit: StageFit) -> None:
    tokens, trained = fit.tokens[fit.kept], fit.trained[fit.kept]
    length = data.stage.packed_length
    end = min(length, 1.15 * max(tokens, default=length))
    bins = np.linspace(0, end, 31)
    panel.hist(tokens, bins, color=_LIGHT, label="all of a sample")
    panel.hist(trained, bins, histtype="step", color=_LINE, linewidth=1.5, label="trained ones")
    panel.axvline(length, color=_ACCENT, linewidth=1, label=f"a row: {length}")
    panel.set_title(_dropped(fit), fontsize=9)
    panel.set(xlabel="tokens", ylabel="samples", xlim=(0, 1.03 * end), yscale="log" if len(tokens) > 1 else "linear")
    panel.legend(frameon=False, fontsize=8)


def _dropped(fit: StageFit) -> str:
    lines = [f"{name.removeprefix('samples_').replace('_', ' ')}: {count:,}" for name, count in fit.counters.items()]
    return "\n".join(lines) or "every sample is trained on as it is"


def _views(panel: plt.Axes, fit: StageFit) -> None:
    views = fit.views[fit.kept]
    panel.hist(views, np.arange(-0.5, max(views, default=1) + 1), color=_LIGHT, edgecolor="white", linewidth=0.5)
    panel.set(xlabel="views of a sample", ylabel="samples")
    panel.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    shapes = "\n".join(f"{b.slots} views of {b.patches} patches" for b in fit.buckets)
    panel.set_title(f"buckets: rows of {fit.buckets[0].tokens} tokens\n{shapes}", fontsize=10)


def _padding(panel: plt.Axes, report: dict[str, Any]) -> None:
    lists = [one for one in report["bucket_lists"] if one["padding"]["work"] is not None]
    panel.set_title("padding by list of buckets", fontsize=10)
    if not lists:
        panel.text(0.5, 0.5, "not one batch", ha="center", transform=panel.transAxes)
        return
    width = 0.8 / len(_PADDING)
    for number, (key, colour) in enumerate(_PADDING.items()):
        places = np.arange(len(lists)) + (number - (len(_PADDING) - 1) / 2) * width
        bars = panel.bar(places, [100 * one["padding"][key] for one in lists], width, color=colour, label=key)
        panel.bar_label(bars, fmt="%.0f", fontsize=7)
    labels = [f"{one['name'].replace(', ', chr(10))}\n{len(one['buckets'])} used" for one in lists]
    panel.set_xticks(range(len(lists)), labels, fontsize=8)
    panel.set_ylabel("padding, %")
    panel.set_ylim(0, 1.3 * panel.get_ylim()[1])  # room for the legend
    panel.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", columnspacing=1, handlelength=1)
