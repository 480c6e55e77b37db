"""Pictures of a run and of costs, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib import ticker  # noqa: E402

_LINE = "#1f5fa8"
_FEW = 20  # points; a stage that has fewer shows each


def losses(records: Sequence[Mapping[str, Any]], title: str) -> plt.Figure:
    """Draws the training loss, one panel per stage, all on one logarithmic scale.

    Args:
      records: metrics in the order of training, each with `stage`, `step` and `loss` (None: not finite).
      title: what stands above the panels.

    Returns:
      The figure; the caller saves and closes it.
    """
    stages: dict[str, list[tuple[int, float | None]]] = {}
    for record in records:
        stages.setdefault(record["stage"], []).append((record["step"], record["loss"]))
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, panels = plt.subplots(
            1, len(stages), sharey=True, squeeze=False, figsize=(1.2 + 2.6 * len(stages), 3.4), layout="constrained"
        )
        for panel, (name, points) in zip(panels[0], stages.items(), strict=True):
            steps, values = np.array(points, np.float64).T
            finite = np.isfinite(values)
            marker = "o" if len(points) < _FEW else None  # one point makes no line
            panel.set_yscale("log")
            panel.plot(steps, values, color=_LINE, alpha=0.3, linewidth=1)
            panel.plot(steps[finite], _smooth(values[finite]), color=_LINE, linewidth=2, marker=marker, markersize=4)
            lost = f", {(~finite).sum()} not finite" if not finite.all() else ""
            panel.set_title(f"{name}\nlast {values[-1]:.3g}{lost}", fontsize=10)
            beyond = max(0.9, 0.05 * (steps[-1] - steps[0]))
            panel.set_xlim(steps[0] - beyond, steps[-1] + beyond)  # also where no loss was finite
            panel.grid(alpha=0.25)
            panel.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True, min_n_ticks=1))
            panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            panel.yaxis.set_minor_formatter(ticker.NullFormatter())
        panels[0, 0].set_ylabel("loss per trained token")
        figure.supxlabel("step", fontsize=10)
        figure.suptitle(title, fontsize=11)
    return figure


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a tenth of the curve, cut at its ends."""
    reach = len(values) // 20
    return np.array([values[max(i - reach, 0) : i + reach + 1].mean() for i in range(len(values))])


_PANELS = (
    ("visual tokens", "visual_tokens", 1),
    ("tower, TFLOPs", "tower_gflops", 1e3),
    ("connector, TFLOPs", "connector_gflops", 1e3),
    ("together with the decoder, TFLOPs", "total_gflops", 1e3),
)


def costs(series: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> plt.Figure:
    """Draws costs over the size of the image, configurations side by side.

    Args:
      series: name of a configuration -> what `analysis.costs` says of it at each size: `image` and the keys of _PANELS.
      title: what stands above the panels.

    Returns:
      The figure; the caller saves and closes it.
    """
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, panels = plt.subplots(2, 2, sharex=True, figsize=(9, 6.4), layout="constrained")
        for panel, (label, key, unit) in zip(panels.flat, _PANELS, strict=True):
            for number, (name, points) in enumerate(series.items()):
                width = 1.2 + 0.7 * (len(series) - 1 - number)  # where lines coincide, each is still seen
                sides, values = [max(point["image"]) for point in points], [point[key] / unit for point in points]
                panel.plot(sides, values, label=name, linewidth=width, drawstyle="steps-mid")
            panel.set_title(label, fontsize=10)
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.25)
        for panel in panels[1]:
            panel.set_xlabel("longer side of the image, pixels")
        handles = panels[0, 0].get_lines()
        figure.legend(handles=handles, loc="outside lower center", ncols=len(series), frameon=False)
        figure.suptitle(title, fontsize=11)
    return figure
