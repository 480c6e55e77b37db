"""Everything decided from an image's size alone: grid, view sizes, patch grids, visual tokens.

Pure integers and float64 logarithms; no pixels, no JAX. One `Plan` serves the tokenizer, the model, the cost model, the
viewer and the server, so placeholder counts and feature counts cannot disagree. The rules are in `slicing.rules`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from uhd_jax.config import ModelConfig, SlicingConfig
from uhd_jax.slicing import rules
from uhd_jax.slicing.sizes import Grid, ImageRefused, Size, check_size


@dataclasses.dataclass(frozen=True)
class ViewPlan:
    """One view: its size in pixels, its patch grid, and how many visual tokens it becomes."""

    size: Size
    patch_grid: Grid
    visual_tokens: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What becomes of one image. `grid` is (0, 0) and `slices` is empty when the image is not sliced."""

    image: Size
    resized: Size  # to which the image is resized before all else (SlicingConfig.pre_resize), mostly its own size
    levels: int  # 2x2 merges between patches and visual tokens
    grid: Grid
    thumbnail: ViewPlan | None  # None: a sliced image without overview
    slices: tuple[ViewPlan, ...]  # in raster order
    cut_first: bool  # v1_legacy: slices are cut out and then resized, each to its own size

    def __hash__(self) -> int:
        # Plans are keys of what is kept for each; a hash of all views would take longer than to look that up.
        return hash((self.image, self.resized, self.levels, self.grid))

    @property
    def views(self) -> tuple[ViewPlan, ...]:
        """Thumbnail first, if there is one, then slices in raster order."""
        return (self.thumbnail, *self.slices) if self.thumbnail else self.slices

    @property
    def slice(self) -> ViewPlan | None:
        """What all slices are like; None when there are none or they differ."""
        return self.slices[0] if len(set(self.slices)) == 1 else None

    @property
    def refined(self) -> Size | None:
        """Size to which the image is resized before it is cut into slices; None when it is not."""
        if self.slice is None or self.cut_first:
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
            "resized": list(self.resized),
            "grid": list(self.grid),
            "thumbnail": list(self.thumbnail.size) if self.thumbnail else None,
            "slice": list(self.slice.size) if self.slice else None,
            "slices": [list(view.size) for view in self.slices],
            "views": len(self.views),
            "patches": self.patches,
            "visual_tokens": self.visual_tokens,
        }


def plan_image(
    size: Size, model: ModelConfig, mode: str | None = None, max_slices: int | None = None, draw: float = 1.0
) -> Plan:
    """Decides how an image of `size` becomes views of a model; other arguments and errors as of `make_plan`.

    Args:
      size: (height, width) in pixels, after any EXIF rotation.
      model: slicing, tower, compressor and connector.
      mode: "16x" or "4x"; None for the model's.
      max_slices: replaces the limit of `model.slicing`.
      draw: a number from [0, 1). In training it is random, and below pre_resize.refill_probability an image too small
        for pre_resize.refill_slices slices is enlarged to their area; the default never is.
    """
    levels, queries = model.merge_levels(mode), model.connector.queries
    refill = draw < model.slicing.pre_resize.refill_probability
    return make_plan(size, model.slicing, model.tower.patch_size, levels, max_slices, queries, refill)


@functools.lru_cache(maxsize=65_536)
def make_plan(
    size: Size,
    slicing: SlicingConfig,
    patch_size: int,
    levels: int,
    max_slices: int | None = None,
    queries: int = 0,
    refill: bool = False,
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
      max_slices: replaces slicing.max_slices, e.g. by a stage's or a request's own limit; see `rules.cut`.
      queries: visual tokens of every view, where they do not depend on its size; 0: patches / 4**levels.
      refill: an image with fewer than pre_resize.refill_slices slices is first enlarged to their area.

    Raises:
      ImageRefused: the size breaks slicing.limits, or a view has more patches than allowed.
      ValueError: max_slices below 1.
    """
    max_slices = slicing.max_slices if max_slices is None else max_slices
    if max_slices < 1:
        raise ValueError(f"max_slices={max_slices}: must be at least 1")
    size = Size(*size)
    check_size(size, slicing.limits)
    multiple = patch_size * 2**levels

    def view(size: Size) -> ViewPlan:
        patch_grid = Grid(size.height // patch_size, size.width // patch_size)
        return ViewPlan(size, patch_grid, queries or patch_grid.area // 4**levels)

    resized = rules.long_side_size(size, slicing.pre_resize)
    cut = rules.cut(resized, slicing, max_slices, multiple)
    if refill and cut.grid.area < slicing.pre_resize.refill_slices:
        resized = rules.refilled_size(resized, slicing.pre_resize.refill_slices, slicing.scale_resolution)
        cut = rules.cut(resized, slicing, max_slices, multiple)
    thumbnail = view(cut.thumbnail) if slicing.overview or not cut.slices else None
    slices = tuple(view(size) for size in cut.slices)
    plan = Plan(size, resized, levels, cut.grid, thumbnail, slices, cut_first=slicing.rule == "v1_legacy")
    allowed = slicing.max_view_patches * (max_slices if slicing.encoding == "global" else 1)
    largest = max(plan.views, key=lambda view: view.patch_grid.area)
    if largest.patch_grid.area > allowed:
        raise ImageRefused(
            f"size {size}: a view of {largest.size} would have {largest.patch_grid.area} patches, above the {allowed} "
            "allowed; crop the image or raise slicing.max_view_patches"
        )
    return plan
