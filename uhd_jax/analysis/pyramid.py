"""A picture of the inverse semantic pyramid: what VDIM makes of a photograph, beside plain enlargement.

    python -m uhd_jax.analysis.pyramid PHOTO --checkpoint=runs/uhd_v2_vdim --out=pyramid.png

Colours are the first three principal components of the tower's features in this view; the same for all panels.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from uhd_jax.checkpoint import load_model
from uhd_jax.config import ConfigError, ModelConfig
from uhd_jax.models import uhd
from uhd_jax.models.patches import normalise_patches
from uhd_jax.models.pyramid import Pyramid
from uhd_jax.slicing.image_io import open_image
from uhd_jax.slicing.pixels import cut_views, view_pixels
from uhd_jax.slicing.plan import Size, plan_image

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402


def view_levels(
    params: dict[str, Any], config: ModelConfig, image: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """The first view of an image, and its pyramid made in two ways.

    Args:
      params: the model's parameters.
      config: the model; its connector has a pyramid.
      image: uint8[H, W, 3].

    Returns:
      uint8[h, w, 3], and the levels from 0 to the pyramid's highest, float32[rows, cols, C] each: as the model makes
      them, and by bilinear interpolation.

    Raises:
      ConfigError: the model has no pyramid.
      ImageRefused: as of `plan_image`.
    """
    pyramid = config.connector.pyramid
    top = max(pyramid.levels)
    if top == 0:
        raise ConfigError("model.connector.pyramid: the model uses level 0 alone; there is nothing to draw")
    plan = plan_image(Size(*image.shape[:2]), config)
    view = plan.views[0]
    patches = jnp.asarray(cut_views(image, plan, config.tower.patch_size)[0])[None]
    grids = jnp.asarray([view.patch_grid], jnp.int32)
    ways = (
        dataclasses.replace(pyramid, feature_scale_mask=2 ** (top + 1) - 1),
        dataclasses.replace(pyramid, feature_scale_mask=2 ** (top + 1) - 1, upsampling="bilinear"),
    )

    @jax.jit
    def levels(params):
        pixels = normalise_patches(patches, config.tower)
        features, _ = uhd.tower(config).apply({"params": params["tower"]}, pixels, grids, levels=0, compress=False)
        weights = {"params": params["connector"].get("upsampler", {})}
        modules = (Pyramid(way, jnp.float32) for way in ways)
        return [[level for level, _ in module.apply(weights, features, grids, pixels)] for module in modules]

    def to_map(level: int, features: jax.Array) -> np.ndarray:
        rows, cols = view.patch_grid
        return np.asarray(features[0], np.float32).reshape(2**level * rows, 2**level * cols, -1)

    made, plain = ([to_map(*pair) for pair in enumerate(way)] for way in levels(params))
    return view_pixels(image, plan)[0], made, plain


def principal_colours(maps: list[np.ndarray]) -> list[np.ndarray]:
    """float32[rows, cols, C] each -> float32[rows, cols, 3] in 0..1; the components are those of the first map."""
    first = maps[0].reshape(-1, maps[0].shape[-1])
    mean = first.mean(axis=0)
    axes = np.linalg.svd(first - mean, full_matrices=False)[2][:3]
    low, high = np.quantile((first - mean) @ axes.T, (0.02, 0.98), axis=0)
    return [np.clip(((features - mean) @ axes.T - low) / np.maximum(high - low, 1e-6), 0, 1) for features in maps]


def draw_pyramid(view: np.ndarray, made: list[np.ndarray], plain: list[np.ndarray], title: str = "") -> plt.Figure:
    """Draws a view and its pyramid; arguments as `view_levels` returns them.

    Returns:
      The figure; the caller saves and closes it.
    """
    colours = principal_colours([*made, *plain[1:]])
    made, plain = colours[: len(made)], colours[len(made) :]
    rows = [[("the view", view), *((f"bilinear, {2**n}x", c) for n, c in enumerate(plain, 1))]]
    rows.append([("the tower", made[0]), *((f"the model, {2**n}x", c) for n, c in enumerate(made[1:], 1))])
    height = 3.4 * view.shape[0] / view.shape[1] + 0.4
    with plt.rc_context({"font.size": 10}):
        figure, panels = plt.subplots(
            2, len(rows[0]), squeeze=False, figsize=(3.4 * len(rows[0]), 2 * height), layout="constrained"
        )
        for panel, (name, picture) in zip(panels.flat, [*rows[0], *rows[1]], strict=True):
            panel.imshow(picture, interpolation="nearest")
            panel.set_title(f"{name}: {picture.shape[0]}x{picture.shape[1]}", fontsize=10)
            panel.set_axis_off()
        figure.suptitle(title, fontsize=11)
    return figure


def main(argv: list[str] | None = None) -> None:
    """Draws the pyramid of a photograph."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("--checkpoint", required=True, help="a saved model, or the folder of a run")
    parser.add_argument("--out", type=Path, required=True, help="a PNG file")
    arguments = parser.parse_args(argv)
    params, config = load_model(arguments.checkpoint)
    image = open_image(arguments.image, config.slicing.limits)
    figure = draw_pyramid(*view_levels(params, config, image), title=arguments.image.name)
    figure.savefig(arguments.out, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
