"""Everything decided from an image's size alone: grid, view sizes, patch grids, visual tokens.

Pure integers and float64 logarithms; no pixels, no JAX. One `Plan` serves the tokenizer, the model, the cost model, the
viewer and the server, so placeholder counts and feature counts cannot disagree.
Source: LLaVA-UHD v4 (arXiv 2605.08985) and the MiniCPM-V 4.6 image processor (spec v4 section 3.2).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

from uhd_jax.config import SlicingConfig


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


@functools.lru_cache(maxsize=65_536)
def make_plan(size: Size, slicing: SlicingConfig, patch_size: int, levels: int, max_slices: int | None = None) -> Plan:
    """Decides how an image of `size` is cut.

    Args:
      size: (height, width) in pixels, after any EXIF rotation.
      slicing: the rule and its limits.
      patch_size: side of a patch in pixels.
      levels: number of 2x2 merges up to the visual tokens (`ModelConfig.merge_levels`); view sides are multiples of
        patch_size * 2**levels.
      max_slices: replaces slicing.max_slices, e.g. by a stage's or a request's own limit.

    Raises:
      ImageRefused: a side below 1, an aspect ratio above the limit, or a view of more patches than allowed.
    """
    raise NotImplementedError
