"""From an image and its plan to the patches of every view, in merge order.

Merge order lays patches out so that the four of every 2x2 window are neighbours, the four windows of every 4x4 block
are neighbours, and so on up to the plan's levels: on device each merge is then a reshape [.., P, D] -> [.., P/4, 4, D],
and the visual tokens come out in raster order. Attention inside a view does not depend on the order.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from uhd_jax.slicing.plan import Grid, Plan, Size
from uhd_jax.slicing.rules import parts_of


@functools.lru_cache(maxsize=4096)
def merge_order(grid: Grid, levels: int) -> np.ndarray:
    """Raster index of each patch of a patch grid, in merge order.

    Returns:
      int32[P], read-only: `raster[merge_order(grid, levels)]` is in merge order.

    Raises:
      ValueError: a side of the grid is no multiple of 2**levels.
    """
    rows, cols = grid
    order = _to_merge_order(np.arange(rows * cols, dtype=np.int32).reshape(rows, cols, 1), 1, levels).reshape(-1)
    order.setflags(write=False)
    return order


def view_pixels(image: np.ndarray, plan: Plan) -> list[np.ndarray]:
    """The views as pixels: uint8[height, width, 3] each, in the order of `Plan.views`.

    Thumbnail and slices are resized from the original, not from each other, with Pillow's antialiased bicubic filter
    on uint8: bit-equal to the published processors. A plan that was resized before slicing begins with that resize, in
    the same way; one of v1_legacy cuts first and uses the Lanczos filter.

    Raises:
      ValueError: `image` is not uint8[H, W, 3] of the size the plan was made for.
    """
    if image.dtype != np.uint8 or image.shape != (*plan.image, 3):
        raise ValueError(f"image is {image.dtype}{list(image.shape)}, the plan is for uint8{[*plan.image, 3]}")
    picture = Image.fromarray(image)
    if plan.resized != plan.image:
        picture = _resize(picture, plan.resized)
    resample = Image.Resampling.LANCZOS if plan.cut_first else Image.Resampling.BICUBIC
    views = [_resize(picture, plan.thumbnail.size, resample)] if plan.thumbnail else []
    if plan.slices and plan.cut_first:
        boxes = _boxes(parts_of(picture.height, plan.grid.rows), parts_of(picture.width, plan.grid.cols))
        views += [_resize(picture.crop(b), v.size, resample) for b, v in zip(boxes, plan.slices, strict=True)]
    elif plan.refined:
        refined, (height, width) = _resize(picture, plan.refined), plan.slices[0].size
        views += [refined.crop(box) for box in _boxes([height] * plan.grid.rows, [width] * plan.grid.cols)]
    return [np.asarray(view) for view in views]


def cut_views(image: np.ndarray, plan: Plan, patch_size: int) -> list[np.ndarray]:
    """The patches of every view: uint8[P, 3 * patch_size**2], in the order of `Plan.views`.

    Patches are in merge order, values inside a patch in (channel, y, x) order.

    Raises:
      ValueError: as `view_pixels`; or `patch_size` is not the one the plan was made with.
    """
    for view in plan.views:
        if view.size != (view.patch_grid.rows * patch_size, view.patch_grid.cols * patch_size):
            raise ValueError(f"a view of {view.size} has no {view.patch_grid} patches of {patch_size} pixels")
    return [_to_merge_order(view, patch_size, plan.levels) for view in view_pixels(image, plan)]


def _resize(picture: Image.Image, size: Size, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    return picture.resize((size.width, size.height), resample)


def _boxes(heights: Sequence[int], widths: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of tiles of these heights and widths, row after row."""
    ends = [tuple(itertools.accumulate(sides, initial=0)) for sides in (heights, widths)]
    rows, cols = (tuple(itertools.pairwise(sides)) for sides in ends)
    return [(left, top, right, bottom) for top, bottom in rows for left, right in cols]


def _to_merge_order(pixels: np.ndarray, patch_size: int, levels: int) -> np.ndarray:
    """[H, W, C] -> [P, C * patch_size**2]; one copy."""
    height, width, channels = pixels.shape
    block = patch_size * 2**levels
    if height % block or width % block:
        raise ValueError(f"{height}x{width} is no multiple of {block} = {patch_size} * 2**{levels} on both sides")
    halves = (2,) * levels
    split = pixels.reshape(height // block, *halves, patch_size, width // block, *halves, patch_size, channels)
    y, x = levels + 1, 2 * levels + 3
    windows = [axis for level in range(levels + 1) for axis in (level, y + 1 + level)]
    return split.transpose(*windows, x + 1, y, x).reshape(-1, channels * patch_size**2)
