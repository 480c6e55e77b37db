"""The slicing rules: from an image's size to the grid of slices and the sizes of thumbnail and slices.

v4 and v1 are one algorithm; v4 rounds sides to the nearest multiple, v1 always down. Every view is resized to about
scale_resolution**2 pixels in its own aspect ratio; nothing is padded or cropped.
Source: spec v4 sections 3.2 and 3.3, spec v1-v2 section 1 (LLaVA-UHD, arXiv 2403.11703, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from uhd_jax.config import PreResizeConfig, SlicingConfig
from uhd_jax.slicing.sizes import Grid, Size

_UNSLICED = Grid(0, 0)


class Cut(NamedTuple):
    """What a rule decides: (0, 0) and no slices where an image is not sliced."""

    grid: Grid
    thumbnail: Size
    slices: tuple[Size, ...]  # in raster order


def cut(size: Size, slicing: SlicingConfig, max_slices: int, multiple: int) -> Cut:
    """Applies the rule of `slicing`.

    Args:
      size: of the image, after `long_side_size` and `refilled_size`.
      slicing: rule, encoding and scale_resolution. Encoding "global" has one rule only, v4's.
      max_slices: 1 means the thumbnail alone. In "v1_legacy" it limits the ideal count, so one slice more may come;
        "fixed_2x2" needs 4.
      multiple: sides of views are multiples of it.
    """
    side = slicing.scale_resolution
    if slicing.encoding == "global":
        return Cut(_UNSLICED, _global_size(size, side, max_slices, multiple), ())
    if slicing.rule == "v1_legacy":
        return _legacy_cut(size, side, max_slices, multiple)
    snap = _nearest if slicing.rule == "v4" else _below
    if slicing.rule == "fixed_2x2":
        grid = Grid(2, 2) if max_slices >= 4 else _UNSLICED
    else:
        grid = best_grid(size, side, max_slices)
    thumbnail = _fit(*size, side, multiple, snap)
    if grid == _UNSLICED:
        return Cut(grid, thumbnail, ())
    height, width = snap(size.height, grid.rows) / grid.rows, snap(size.width, grid.cols) / grid.cols
    return Cut(grid, thumbnail, (_fit(height, width, side, multiple, snap),) * grid.area)


def best_grid(size: Size, side: int, max_slices: int) -> Grid:
    """The grid of v1 and v4; (0, 0) when the image is not sliced."""
    count = min(_ideal_count(size, side), max_slices)
    if count <= 1:
        return _UNSLICED
    return nearest_grid(size, [number for number in (count - 1, count, count + 1) if 1 < number <= max_slices])


def nearest_grid(size: Size, counts: Iterable[int]) -> Grid:
    """Of all grids with one of these numbers of slices the one nearest to the image in log aspect ratio.

    float64 throughout: for squares the last bit of a logarithm decides between 2x3 and 3x2. On an exact tie more rows
    win, which is the published codes' order too: only a grid and its transpose tie, since the product of two different
    numbers of neighbouring counts is never a square.
    """
    log_ratio = math.log(size.width / size.height)
    grids = [Grid(rows, count // rows) for count in counts for rows in range(1, count + 1) if count % rows == 0]
    return min(grids, key=lambda grid: (abs(log_ratio - math.log(grid.cols / grid.rows)), -grid.rows))


def parts_of(length: int, count: int) -> list[int]:
    """v1_legacy: a side cut into `count` whole numbers of pixels; the last part takes the remainder."""
    return [length // count] * (count - 1) + [length - length // count * (count - 1)]


def long_side_size(size: Size, config: PreResizeConfig) -> Size:
    """The size with its longer side made `long_side`, truncated as in the published code (spec v1-v2 section 1.4)."""
    (height, width), long_side = size, config.long_side
    if not long_side or (config.only_enlarge and max(size) > long_side):
        return size
    if width > height:
        return Size(max(int(long_side / width * height), 1), long_side)
    return Size(long_side, max(int(long_side / height * width), 1))


def refilled_size(size: Size, slices: int, side: int) -> Size:
    """The size enlarged to the area of `slices` slices, truncated; unchanged where it has that area already."""
    area = slices * side**2
    return with_area(size, area) if area > size.height * size.width else size


def with_area(size: Size, area: int) -> Size:
    """The size in the same shape with about so many pixels; sides truncated, at least one pixel."""
    factor = math.sqrt(area / (size.height * size.width))
    return Size(max(int(size.height * factor), 1), max(int(size.width * factor), 1))


def _ideal_count(size: Size, side: int) -> int:
    return -(-size.height * size.width // side**2)


def _nearest(value: float, multiple: int) -> int:
    """Nearest multiple, ties to the even one (Python's round), never below one multiple."""
    return max(round(value / multiple) * multiple, multiple)


def _below(value: float, multiple: int) -> int:
    """Largest multiple that is not above, never below one multiple."""
    return max(math.floor(value / multiple) * multiple, multiple)


def _fit(height: float, width: float, side: float, multiple: int, snap: Callable[[float, int], int]) -> Size:
    """About side**2 pixels in the aspect ratio of height x width. Both truncations are the reference's."""
    ratio = width / height
    fitted_height = int(side / math.sqrt(ratio))
    fitted_width = int(fitted_height * ratio)
    return Size(snap(fitted_height, multiple), snap(fitted_width, multiple))


def _global_size(size: Size, side: int, max_slices: int, multiple: int) -> Size:
    area = size.height * size.width
    if area <= side**2:
        return _fit(*size, side, multiple, _nearest)
    if area > max_slices * side**2:
        return _fit(*size, side * math.sqrt(max_slices), multiple, _nearest)
    return Size(_nearest(size.height, multiple), _nearest(size.width, multiple))


def _legacy_cut(size: Size, side: int, max_slices: int, multiple: int) -> Cut:
    """The code of March 2024 (spec v1-v2 section 1.6): even a 1x1 grid has its slice beside the thumbnail."""
    thumbnail = _within_budget(*size, side, multiple)
    if max_slices == 1:
        return Cut(_UNSLICED, thumbnail, ())
    count = min(_ideal_count(size, side), max_slices)
    grid = nearest_grid(size, range(count if count <= 2 else count - 1, count + 2))
    heights, widths = parts_of(size.height, grid.rows), parts_of(size.width, grid.cols)
    slices = tuple(_within_budget(height, width, side, multiple) for height in heights for width in widths)
    return Cut(grid, thumbnail, slices)


def _within_budget(height: int, width: int, side: int, multiple: int) -> Size:
    """The legacy size of a view: at most (side / multiple)**2 cells of multiple x multiple pixels, or a row of them."""
    budget = (side // multiple) ** 2
    scale = math.sqrt(budget * (multiple / height) * (multiple / width))
    rows, cols = (min(max(math.floor(scale * length / multiple), 1), budget) for length in (height, width))
    return Size(rows * multiple, cols * multiple)
