"""A picture of where a model looked: heat over the thumbnail and over the slices, and token by token of the answer."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import colors, patheffects  # noqa: E402
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
    first = len(plan.views) - len(plan.slices)
    size = _shrunk_size(looked.image)

    def laid(maps: Maps, view: str) -> np.ndarray:
        return stretched(maps[0], size) if view == "thumbnail" else tiled(maps[first:], plan, size)

    panels = []
    for name, maps in named.items():
        for number, view in enumerate(views):
            values = laid(maps, view)
            shown = view if plan.slices else "the only view"
            panels.append((f"{name if number == 0 else ''}\n{shown}", view, values, _norm(values)))
    said = [laid(maps, views[-1]) for _, maps in looked.tokens[:TOKENS]]
    of_tokens = _norm(np.stack(said)) if said else None  # one scale, so that they compare
    tokens = [
        (f"token {number}: {ascii(text)[1:-1] or '(nothing)'}"[:40], views[-1], values, of_tokens)
        for number, ((text, _), values) in enumerate(zip(looked.tokens, said, strict=False), 1)
    ]
    columns = max(2, len(panels)) if len(panels) <= 4 else 4
    lines = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    lines += [tokens[start : start + columns] for start in range(0, len(tokens), columns)]
    width, aspect = 3.3, looked.image.shape[0] / looked.image.shape[1]
    height = max(0.7, min(4.2, width * aspect))
    figure = plt.figure(figsize=(width * columns + 0.3, (height + 0.35) * len(lines) + 1.0), layout="constrained")
    grid = figure.add_gridspec(len(lines), columns)
    for row, line in enumerate(lines):
        for column, (above, view, values, norm) in enumerate(line):
            panel = figure.add_subplot(grid[row, column])
            _heat(
                panel, looked, values, norm, bar=norm is not of_tokens or line is lines[-1] and column == len(line) - 1
            )
            if view == "slices":
                _lines(panel, plan.grid, size)
            panel.set_title(above, fontsize=9, loc="left")
    left_out = f", of which the first {TOKENS} are drawn" if len(looked.tokens) > TOKENS else ""
    figure.suptitle(
        f"{title}\nanswer: {_short(looked.answer)}   ({len(looked.tokens)} tokens{left_out}; "
        f"{looked.visual_share:.0%} of their attention goes to the image)\n"
        "white is the mean of a map; red more, blue less",
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


def _heat(panel: plt.Axes, looked: Looked, values: np.ndarray, norm: colors.LogNorm, bar: bool) -> None:
    # Of little contrast, so that a bright place of the image does not look like one of the map.
    panel.imshow(_shrunk(looked.image), cmap="gray", vmin=-160, vmax=420, aspect="equal")
    heat = panel.imshow(values, cmap="RdBu_r", alpha=0.6, norm=norm, interpolation="nearest", aspect="equal")
    if bar:
        scale = panel.figure.colorbar(heat, ax=panel, fraction=0.046, pad=0.02)
        ticks = norm.vmax ** np.array([-1, -0.5, 0, 0.5, 1])
        scale.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks], fontsize=7)
        scale.set_ticks([], minor=True)
    panel.set_xticks(())
    panel.set_yticks(())


def _norm(values: np.ndarray) -> colors.LogNorm:
    """Factors of the mean, as far below it as above, for nearly all values; noise does not look like much."""
    low, high = np.percentile(values, (1, 99))
    most = float(np.clip(max(high, 1 / max(low, 1e-3)), 1.25, 8.0))
    return colors.LogNorm(1 / most, most, clip=True)


def _lines(panel: plt.Axes, grid: Sequence[int], size: Size) -> None:
    effects = [patheffects.withStroke(linewidth=2.4, foreground="#000000")]
    for row in range(1, grid[0]):
        panel.axhline(row * size.height / grid[0] - 0.5, color=_GRID, linewidth=1, path_effects=effects)
    for col in range(1, grid[1]):
        panel.axvline(col * size.width / grid[1] - 0.5, color=_GRID, linewidth=1, path_effects=effects)


def _shrunk_size(image: np.ndarray) -> Size:
    """Its longer side `_SIDE` pixels."""
    scale = _SIDE / max(image.shape[:2])
    return Size(max(1, round(image.shape[0] * scale)), max(1, round(image.shape[1] * scale)))


def _shrunk(image: np.ndarray) -> np.ndarray:
    """Grey, uint8[`_shrunk_size`]."""
    from PIL import Image

    height, width = _shrunk_size(image)
    return np.asarray(Image.fromarray(image).convert("L").resize((width, height), Image.Resampling.BICUBIC))
