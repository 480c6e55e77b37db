"""Everything decided from an image's size alone: grid, view sizes, patch grids, visual tokens.

Pure integers and float64 logarithms; no pixels, no JAX. One `Plan` serves the tokenizer, the model, the cost model, the
viewer and the server, so placeholder counts and feature counts cannot disagree.
Source: LLaVA-UHD v4 (arXiv 2605.08985) and the MiniCPM-V 4.6 image processor (spec v4 section 3.2).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

from uhd_jax.config import ImageLimits, ModelConfig, SlicingConfig


class Size(NamedTuple):
    """An image or view size in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


class Grid(NamedTuple):
    """A number of rows and columns: of slices, or of patches in a view."""

    rows: int
    cols: int

    @property
    def area(self) -> int:
        """rows x cols."""
        return self.rows * self.cols

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}"


class ImageRefused(ValueError):
    """The image cannot be used: unreadable, hostile, or of a size outside the configured limits."""


@dataclasses.dataclass(frozen=True)
class ViewPlan:
    """One view: its size in pixels, its patch grid, and how many visual tokens it becomes."""

    size: Size
    patch_grid: Grid
    visual_tokens: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What becomes of one image. `grid` is (0, 0) when the image is not sliced; then `slice` is None."""

    image: Size
    levels: int  # 2x2 merges between patches and visual tokens
    grid: Grid
    thumbnail: ViewPlan
    slice: ViewPlan | None

    @property
    def views(self) -> tuple[ViewPlan, ...]:
        """Thumbnail first, then slices in raster order."""
        return (self.thumbnail,) + (self.slice,) * self.grid.area

    @property
    def refined(self) -> Size | None:
        """Size to which the image is resized before it is cut into slices."""
        if self.slice is None:
            return None
        return Size(self.slice.size.height * self.grid.rows, self.slice.size.width * self.grid.cols)

    @property
    def patches(self) -> int:
        """Patches of all views together."""
        return sum(view.patch_grid.area for view in self.views)

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of all views together."""
        return sum(view.visual_tokens for view in self.views)

    def to_json(self) -> dict[str, Any]:
        """JSON types only: sizes as [height, width], grids as [rows, cols], `views` as their number."""
        return {
            "image": list(self.image),
            "grid": list(self.grid),
            "thumbnail": list(self.thumbnail.size),
            "slice": list(self.slice.size) if self.slice else None,
            "views": len(self.views),
            "patches": self.patches,
            "visual_tokens": self.visual_tokens,
        }


def check_size(size: Size, limits: ImageLimits) -> None:
    """Raises `ImageRefused` when an image of `size` breaks the limits on sides, pixels or aspect ratio."""
    height, width = size
    if min(size) < 1:
        raise ImageRefused(f"size {height}x{width}: an image needs at least one pixel on each side")
    if max(size) > limits.max_side:
        raise ImageRefused(f"size {height}x{width}: a side is above max_side={limits.max_side}; shrink the image")
    if height * width > limits.max_pixels:
        raise ImageRefused(
            f"size {height}x{width}: {height * width} pixels are above max_pixels={limits.max_pixels}; shrink the image"
        )
    if max(size) > min(size) * limits.max_aspect_ratio:
        raise ImageRefused(
            f"size {height}x{width}: the aspect ratio {max(size) / min(size):.0f} is above "
            f"max_aspect_ratio={limits.max_aspect_ratio:g}; crop the image or cut it into several"
        )


def plan_image(size: Size, model: ModelConfig, mode: str | None = None, max_slices: int | None = None) -> Plan:
    """Decides how an image of `size` becomes views of a model; arguments and errors as of `make_plan`."""
    levels, queries = model.merge_levels(mode), model.connector.queries
    return make_plan(size, model.slicing, model.tower.patch_size, levels, max_slices, queries)


@functools.lru_cache(maxsize=65_536)
def make_plan(
    size: Size,
    slicing: SlicingConfig,
    patch_size: int,
    levels: int,
    max_slices: int | None = None,
    queries: int = 0,
) -> Plan:
    """Decides how an image of `size` is cut.

    With encoding "slices" an image above scale_resolution**2 pixels becomes a thumbnail and a grid of slices, a smaller
    one is enlarged to a single view of about that area. With encoding "global" (the paper's GE) there is one view: the
    whole image at its own size, shrunk when it has more than max_slices * scale_resolution**2 pixels and enlarged as
    above when it has fewer than scale_resolution**2. Sides are rounded to multiples, so areas are near these values.

    Args:
      size: (height, width) in pixels, after any EXIF rotation.
      slicing: the rule and its limits; max_view_patches is for a view of scale_resolution**2 pixels, so the one view
        of encoding "global" may have max_slices times as many.
      patch_size: side of a patch in pixels.
      levels: number of 2x2 merges up to the visual tokens (`ModelConfig.merge_levels`); view sides are multiples of
        patch_size * 2**levels.
      max_slices: replaces slicing.max_slices, e.g. by a stage's or a request's own limit.
      queries: visual tokens of every view, where they do not depend on its size; 0: patches / 4**levels.

    Raises:
      ImageRefused: the size breaks slicing.limits, or a view has more patches than allowed.
      ValueError: max_slices below 1.
    """
    max_slices = slicing.max_slices if max_slices is None else max_slices
    if max_slices < 1:
        raise ValueError(f"max_slices={max_slices}: must be at least 1")
    size = Size(*size)
    check_size(size, slicing.limits)
    side, multiple = slicing.scale_resolution, patch_size * 2**levels

    def view(size: Size) -> ViewPlan:
        patch_grid = Grid(size.height // patch_size, size.width // patch_size)
        return ViewPlan(size, patch_grid, queries or patch_grid.area // 4**levels)

    if slicing.encoding == "global":
        grid, thumbnail = Grid(0, 0), _global_size(size, side, max_slices, multiple)
        allowed = slicing.max_view_patches * max_slices
    else:
        grid, thumbnail = _best_grid(size, side, max_slices), _fit(*size, side, multiple)
        allowed = slicing.max_view_patches
    slice_plan = view(_slice_size(size, grid, side, multiple)) if grid.area else None
    plan = Plan(size, levels, grid, view(thumbnail), slice_plan)
    largest = max(plan.views, key=lambda view: view.patch_grid.area)
    if largest.patch_grid.area > allowed:
        raise ImageRefused(
            f"size {size}: a view of {largest.size} would have {largest.patch_grid.area} patches, above the {allowed} "
            "allowed; crop the image or raise slicing.max_view_patches"
        )
    return plan


def _round_to(value: float, multiple: int) -> int:
    """Nearest multiple, ties to the even one (Python's round), never below one multiple."""
    return max(round(value / multiple) * multiple, multiple)


def _fit(height: float, width: float, side: float, multiple: int) -> Size:
    """About side**2 pixels in the aspect ratio of height x width. Both truncations are the reference's."""
    ratio = width / height
    fitted_height = int(side / math.sqrt(ratio))
    fitted_width = int(fitted_height * ratio)
    return Size(_round_to(fitted_height, multiple), _round_to(fitted_width, multiple))


def _global_size(size: Size, side: int, max_slices: int, multiple: int) -> Size:
    area = size.height * size.width
    if area <= side**2:
        return _fit(*size, side, multiple)
    if area > max_slices * side**2:
        return _fit(*size, side * math.sqrt(max_slices), multiple)
    return Size(_round_to(size.height, multiple), _round_to(size.width, multiple))


def _best_grid(size: Size, side: int, max_slices: int) -> Grid:
    """The grid whose shape is nearest to the image's in log aspect ratio; (0, 0) when the image is not sliced.

    float64 throughout: for squares between 1002 and 1185 pixels the last bit of a logarithm decides.
    """
    count = min(-(-size.height * size.width // side**2), max_slices)
    if count <= 1:
        return Grid(0, 0)
    log_ratio = math.log(size.width / size.height)
    candidates = [
        Grid(rows, number // rows)
        for number in (count - 1, count, count + 1)
        if 1 < number <= max_slices
        for rows in range(1, number + 1)
        if number % rows == 0
    ]
    return min(candidates, key=lambda grid: (abs(log_ratio - math.log(grid.cols / grid.rows)), -grid.rows))


def _slice_size(size: Size, grid: Grid, side: int, multiple: int) -> Size:
    height = _round_to(size.height, grid.rows) / grid.rows
    width = _round_to(size.width, grid.cols) / grid.cols
    return _fit(height, width, side, multiple)
