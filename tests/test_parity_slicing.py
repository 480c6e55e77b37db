"""Live comparison with transformers' Pillow image processor of MiniCPM-V 4.6."""

import math
import random

import numpy as np
import pytest
from image_files import channels_first

from uhd_jax.config import SlicingConfig
from uhd_jax.slicing.pixels import cut_views, merge_order
from uhd_jax.slicing.plan import Size, make_plan

pytest.importorskip("torch")
reference = pytest.importorskip("transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6")
LEVELS = {"16x": 2, "4x": 1}


@pytest.fixture(scope="module")
def processor():
    return reference.MiniCPMV4_6ImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3)


def reference_sizes(processor, size, max_slices, mode):
    """Grid, thumbnail size and refined size, from the processor's own functions."""
    grid = processor.get_sliced_grid(size, max_slices, 448)
    thumbnail = processor.find_best_resize(size, 448, 14, downsample_mode=mode, allow_upscale=grid is None)
    refined = grid and processor.get_refine_size(size, grid, 448, 14, downsample_mode=mode, allow_upscale=True)
    return tuple(grid or (0, 0)), thumbnail, refined


def test_sizes(processor):
    draw = random.Random(0)
    sliced = 0
    for _ in range(2000):
        height = draw.uniform(math.log(10), math.log(6000))
        width = min(max(height + draw.uniform(-1, 1) * math.log(60), 0), math.log(6000))
        size = Size(round(math.exp(height)), round(math.exp(width)))
        if draw.random() < 0.05:  # squares, where grids tie
            size = Size(size.height, size.height)
        max_slices = draw.choice([1, 2, 4, 9, 16, 36])
        for mode, levels in LEVELS.items():
            plan = make_plan(size, SlicingConfig(), 14, levels, max_slices)
            expected = reference_sizes(processor, size, max_slices, mode)
            assert (plan.grid, plan.thumbnail.size, plan.refined) == expected, (size, max_slices, mode)
        sliced += plan.slice is not None
    assert 500 < sliced < 1500


@pytest.mark.parametrize("mode", LEVELS)
@pytest.mark.parametrize(("size", "max_slices"), [(Size(333, 777), 9), (Size(90, 40), 9), (Size(1024, 1024), 4)])
def test_pixels(processor, size, max_slices, mode):
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    output = processor(image, max_slice_nums=max_slices, downsample_mode=mode, return_tensors="np")
    plan = make_plan(size, SlicingConfig(), 14, LEVELS[mode], max_slices)
    assert [tuple(grid) for grid in output["target_sizes"]] == [view.patch_grid for view in plan.views]
    pixels = np.rint((output["pixel_values"][0] + 1) * 127.5).astype(np.uint8)
    raster = pixels.reshape(3, 14, plan.patches, 14).transpose(2, 0, 1, 3).reshape(plan.patches, -1)
    starts = np.cumsum([0] + [view.patch_grid.area for view in plan.views])
    for view, patches, start in zip(plan.views, cut_views(image, plan, 14), starts, strict=False):
        order = merge_order(view.patch_grid, plan.levels)
        np.testing.assert_array_equal(channels_first(patches), raster[start : start + len(order)][order])
