"""A picture of where a model looked: heat over the thumbnail and over the slices, and token by token of the answer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import patheffects  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402

from uhd_jax.analysis.looking import Looked, Maps, stretched, tiled  # noqa: E402
from uhd_jax.slicing.plan import Size  # noqa: E402

TOKENS = 12  # of the answer, drawn one by one; more are only in the mean
_SIDE = 420  # pixels of the longer side of a panel's image
_GRID = "#ffffff"


def draw(looked: Looked, title: str) -> plt.Figure:
    """Draws the maps.

    Args:
      looked: image and maps.
      title: what stands on top.

    Returns:
      The figure; the caller saves and closes it.
    """
    plan = looked.plan
    views = ["thumbnail"] * (plan.thumbnail is not None) + ["slices"] * bool(plan.slices)
    named = {**looked.inside, _answering(looked): looked.answering}
    tokens = [(text, maps) for text, maps in looked.tokens][:TOKENS]
    columns = max(len(views), min(4, max(2, len(tokens))))
    aspect = looked.image.shape[0] / looked.image.shape[1]
    width = 2.9
    lines = math.ceil(len(tokens) / columns)
    height = max(0.7, min(4.2, width * aspect))
    rows = len(named) + lines
    figure = plt.figure(figsize=(width * columns + 0.6, (height + 0.55) * rows + 1.0), layout="constrained")
    grid = figure.add_gridspec(rows, columns)
    for row, (name, maps) in enumerate(named.items()):
        for column, view in enumerate(views):
            panel = figure.add_subplot(grid[row, column])
            _heat(panel, looked, maps, view)
            shown = view if plan.slices else "the only view"
            panel.set_title(f"{name}\n{shown}" if column == 0 else f"\n{shown}", fontsize=9, loc="left")
    for number, (text, maps) in enumerate(tokens):
        panel = figure.add_subplot(grid[len(named) + number // columns, number % columns])
        _heat(panel, looked, maps, views[-1], bar=False)
        panel.set_title(f"token {number + 1}: {ascii(text)[1:-1] or '(nothing)'}"[:40], fontsize=9, loc="left")
    left_out = f", of which the first {TOKENS} are drawn" if len(looked.tokens) > TOKENS else ""
    figure.suptitle(
        f"{title}\nanswer: {_short(looked.answer)}   ({len(looked.tokens)} tokens{left_out}; "
        f"{looked.visual_share:.0%} of their attention goes to the image)\n1 is the mean, darker less, brighter more",
        fontsize=10,
        ha="left",
        x=0.01,
    )
    return figure


def _answering(looked: Looked) -> str:
    return f"answer: mean over {len(looked.tokens)} tokens, layers, heads"


def _short(text: str) -> str:
    text = " ".join(ascii(text)[1:-1].split())
    return text if len(text) <= 60 else text[:57] + "..."


def _heat(panel: plt.Axes, looked: Looked, maps: Maps, view: str, bar: bool = True) -> None:
    plan = looked.plan
    image, size = _shrunk(looked.image)
    first = len(plan.views) - len(plan.slices)
    values = stretched(maps[0], size) if view == "thumbnail" else tiled(maps[first:], plan, size)
    # Of little contrast, so that a bright place of the image does not look like a bright one of the map.
    panel.imshow(image, cmap="gray", vmin=-160, vmax=420, aspect="equal")
    high = max(float(np.percentile(values, 99.5)), 1.0 + 1e-3)
    heat = panel.imshow(values, cmap="inferno", alpha=0.62, vmin=0, vmax=high, interpolation="nearest", aspect="equal")
    if view == "slices":
        _lines(panel, plan.grid, size)
    if bar:
        panel.figure.colorbar(heat, ax=panel, fraction=0.046, pad=0.02).ax.tick_params(labelsize=7)
    panel.set_xticks(())
    panel.set_yticks(())


def _lines(panel: plt.Axes, grid: Sequence[int], size: Size) -> None:
    effects = [patheffects.withStroke(linewidth=2.4, foreground="#000000")]
    for row in range(1, grid[0]):
        panel.axhline(row * size.height / grid[0] - 0.5, color=_GRID, linewidth=1, path_effects=effects)
    for col in range(1, grid[1]):
        panel.axvline(col * size.width / grid[1] - 0.5, color=_GRID, linewidth=1, path_effects=effects)


def _shrunk(image: np.ndarray) -> tuple[np.ndarray, Size]:
    """Grey, its longer side `_SIDE` pixels."""
    from PIL import Image

    scale = _SIDE / max(image.shape[:2])
    size = Size(max(1, round(image.shape[0] * scale)), max(1, round(image.shape[1] * scale)))
    grey = Image.fromarray(image).convert("L").resize((size.width, size.height), Image.Resampling.BICUBIC)
    return np.asarray(grey), size
