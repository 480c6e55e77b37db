"""From an image and its plan to the patches of every view, in merge order.

Merge order lays patches out so that the four of every 2x2 window are neighbours, the four windows of every 4x4 block
are neighbours, and so on up to the plan's levels: on device each merge is then a reshape [.., P, D] -> [.., P/4, 4, D],
and the visual tokens come out in raster order. Attention inside a view does not depend on the order.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from uhd_jax.slicing.memory import PIXEL_BYTES, pixels_of
from uhd_jax.slicing.plan import Grid, Plan, Size
from uhd_jax.slicing.rules import parts_of

_SCALES = (1, 2, 4, 8)  # 1/N of its size at which a JPEG may be decoded


@functools.lru_cache(maxsize=4096)
def merge_order(grid: Grid, levels: int) -> np.ndarray:
    """Raster index of each patch of a patch grid, in merge order.

    Returns:
      int32[P], read-only: `raster[merge_order(grid, levels)]` is in merge order.

    Raises:
      ValueError: a side of the grid is no multiple of 2**levels.
    """
    rows, cols = grid
    order = np.empty((rows * cols, 1), np.int32)
    _to_merge_order(np.arange(rows * cols, dtype=np.int32).reshape(rows, cols, 1), 1, levels, order)
    order.setflags(write=False)
    return order.reshape(-1)


def view_pixels(image: np.ndarray | Image.Image, plan: Plan) -> list[np.ndarray]:
    """The views as pixels: uint8[height, width, 3] each, in the order of `Plan.views`.

    Thumbnail and slices are resized from the original, not from each other, with Pillow's antialiased bicubic filter
    on uint8: bit-equal to the published processors. A plan that was resized before slicing begins with that resize, in
    the same way; one of v1_legacy cuts first and uses the Lanczos filter.

    Raises:
      ValueError: `image` is not RGB, uint8, and of the size the plan was made for.
    """
    return [np.ascontiguousarray(view[..., :3]) for view in _cut(image, plan)]


def cut_views(
    image: np.ndarray | Image.Image,
    plan: Plan,
    patch_size: int,
    into: Sequence[np.ndarray] | None = None,
    reduced: bool = False,
) -> list[np.ndarray]:
    """The patches of every view: uint8[P, 4 * patch_size**2], in the order of `Plan.views`.

    Patches are in merge order, values inside a patch in (y, x, channel) order: red, green, blue, and a fourth that
    means nothing. So Pillow keeps pixels, and its memory is copied once, in pieces of a patch's width.

    Args:
      image: an RGB picture, or uint8[H, W, 3].
      plan: made for its size.
      patch_size: that the plan was made with.
      into: contiguous arrays of these shapes that are written to and returned; None for new ones.
      reduced: the picture may be one that was decoded at a half, a quarter or an eighth of its size (`least_size`).

    Raises:
      ValueError: as `view_pixels`; or `patch_size` is not the one the plan was made with.
    """
    for view in plan.views:
        if view.size != (view.patch_grid.rows * patch_size, view.patch_grid.cols * patch_size):
            raise ValueError(f"a view of {view.size} has no {view.patch_grid} patches of {patch_size} pixels")
    if into is None:
        into = [np.empty((view.patch_grid.area, PIXEL_BYTES * patch_size**2), np.uint8) for view in plan.views]
    for view, patches in zip(_cut(image, plan, reduced), into, strict=True):
        _to_merge_order(view, patch_size, plan.levels, patches)
    return list(into)


def least_size(plan: Plan) -> Size:
    """The size below which a picture, decoded smaller than it is, would have too few pixels for the plan's views."""
    if plan.cut_first:
        return plan.image
    if plan.resized != plan.image:
        return plan.resized
    sizes = [view.size for view in (plan.thumbnail,) if view] + [size for size in (plan.refined,) if size]
    return Size(max(size.height for size in sizes), max(size.width for size in sizes))


def _cut(image: np.ndarray | Image.Image, plan: Plan, reduced: bool = False) -> Iterator[np.ndarray]:
    """The views, one after the other: uint8[H, W, 4] as of `pixels_of`."""
    picture = image if isinstance(image, Image.Image) else _picture(image, plan)
    sizes = [tuple(-(-side // scale) for side in plan.image[::-1]) for scale in (_SCALES if reduced else (1,))]
    if picture.mode != "RGB" or picture.size not in sizes:
        given = f"{picture.mode} of {Size(picture.height, picture.width)}"
        raise ValueError(f"image is {given}, the plan is for RGB of {plan.image}")
    if plan.resized != plan.image:
        picture = _resize(picture, plan.resized)
    resample = Image.Resampling.LANCZOS if plan.cut_first else Image.Resampling.BICUBIC
    if plan.thumbnail:
        yield pixels_of(_resize(picture, plan.thumbnail.size, resample))
    if plan.slices and plan.cut_first:
        boxes = _boxes(parts_of(picture.height, plan.grid.rows), parts_of(picture.width, plan.grid.cols))
        for box, view in zip(boxes, plan.slices, strict=True):
            yield pixels_of(_resize(picture.crop(box), view.size, resample))
    elif plan.refined:
        pixels, (height, width) = pixels_of(_resize(picture, plan.refined)), plan.slices[0].size
        for left, top, right, bottom in _boxes([height] * plan.grid.rows, [width] * plan.grid.cols):
            yield pixels[top:bottom, left:right]


def _picture(image: np.ndarray, plan: Plan) -> Image.Image:
    if image.dtype != np.uint8 or image.shape != (*plan.image, 3):
        raise ValueError(f"image is {image.dtype}{list(image.shape)}, the plan is for uint8{[*plan.image, 3]}")
    return Image.fromarray(image)


def _resize(picture: Image.Image, size: Size, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """The picture in another size; itself where it has that size, of which Pillow would make a copy."""
    wanted = (size.width, size.height)
    return picture if picture.size == wanted else picture.resize(wanted, resample)


def _boxes(heights: Sequence[int], widths: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of tiles of these heights and widths, row after row."""
    ends = [tuple(itertools.accumulate(sides, initial=0)) for sides in (heights, widths)]
    rows, cols = (tuple(itertools.pairwise(sides)) for sides in ends)
    return [(left, top, right, bottom) for top, bottom in rows for left, right in cols]


def _to_merge_order(pixels: np.ndarray, patch_size: int, levels: int, patches: np.ndarray) -> None:
    """Writes a view [H, W, C] into patches[P, patch_size**2 * C].

    The pixels of a row that share a patch move as one item: many times faster than one by one.
    """
    height, width, channels = pixels.shape
    block = patch_size * 2**levels
    if height % block or width % block:
        raise ValueError(f"{height}x{width} is no multiple of {block} = {patch_size} * 2**{levels} on both sides")
    if not patches.flags.c_contiguous:
        raise ValueError("patches are written to contiguous arrays only")
    halves = (2,) * levels
    item = np.dtype((np.void, patch_size * channels * pixels.itemsize))
    rows = patches.view(item).reshape(height // block, width // block, *(2,) * (2 * levels), patch_size)
    split = pixels.reshape(height, width * channels).view(item)
    split = split.reshape(height // block, *halves, patch_size, width // block, *halves)
    y = levels + 1
    windows = [axis for level in range(levels + 1) for axis in (level, y + 1 + level)]
    rows[...] = split.transpose(*windows, y)
