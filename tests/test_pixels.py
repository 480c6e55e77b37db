"""Views as patches: bit-equal to the published processor, and in merge order."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from uhd_jax.config import SlicingConfig
from uhd_jax.slicing.image_io import open_image
from uhd_jax.slicing.pixels import cut_views, merge_order, view_pixels
from uhd_jax.slicing.plan import Grid, Size, make_plan

FOLDER = Path(__file__).parent / "golden" / "v4_preprocess"
CASES = json.loads((FOLDER / "meta.json").read_text())["cases"]
LEVELS = {"16x": 2, "4x": 1}


def noise(height, width):
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def raster_patches(view, patch_size):
    """[H, W, 3] -> [P, 3 * patch_size**2] in raster order, one patch after another."""
    height, width, _ = view.shape
    return np.stack(
        [
            view[y : y + patch_size, x : x + patch_size].transpose(2, 0, 1).reshape(-1)
            for y in range(0, height, patch_size)
            for x in range(0, width, patch_size)
        ]
    )


@pytest.mark.parametrize("number", range(len(CASES)))
def test_golden_patches(number):
    case = CASES[number]
    arguments = case["kwargs"]
    levels = LEVELS[arguments.get("downsample_mode", "16x")]
    config = SlicingConfig(scale_resolution=112, max_slices=arguments.get("max_slice_nums", 9))
    image = open_image(FOLDER / case["file"])
    plan = make_plan(Size(*image.shape[:2]), config, 14, levels)
    assert arguments["scale_resolution"] == 112
    assert list(plan.grid) == case["grid"] and len(plan.views) == case["num_views"]

    expected = load_file(FOLDER / f"case_{number}.safetensors")["pixel_values_u8"]  # [1, 3, 14, 14 * patches]
    expected = expected[0].reshape(3, 14, plan.patches, 14).transpose(2, 0, 1, 3).reshape(plan.patches, -1)
    start = 0
    for view, patches in zip(plan.views, cut_views(image, plan, 14), strict=True):
        raster = np.empty_like(patches)
        raster[merge_order(view.patch_grid, levels)] = patches
        np.testing.assert_array_equal(raster, expected[start : start + len(patches)])
        start += len(patches)
    assert start == plan.patches


def test_merge_order_of_one_level():
    assert merge_order(Grid(2, 4), 1).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


def test_merge_order_of_two_levels():
    assert merge_order(Grid(4, 8), 2)[:16].tolist() == [0, 1, 8, 9, 2, 3, 10, 11, 16, 17, 24, 25, 18, 19, 26, 27]
    assert merge_order(Grid(4, 8), 2)[16:].tolist() == [4, 5, 12, 13, 6, 7, 14, 15, 20, 21, 28, 29, 22, 23, 30, 31]


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_merging_leaves_raster_order(levels):
    """Taking every fourth of the merged, `levels` times, walks the coarse grid in raster order."""
    rows, cols = 3 * 2**levels, 5 * 2**levels
    order = merge_order(Grid(rows, cols), levels)
    assert order.dtype == np.int32 and sorted(order) == list(range(rows * cols))
    corners = order[:: 4**levels]
    np.testing.assert_array_equal(corners // cols // 2**levels * 5 + corners % cols // 2**levels, np.arange(15))


def test_merge_order_is_shared_and_read_only():
    order = merge_order(Grid(4, 4), 2)
    assert merge_order(Grid(4, 4), 2) is order
    with pytest.raises(ValueError, match="read-only"):
        order[0] = 1


def test_merge_order_needs_whole_windows():
    with pytest.raises(ValueError, match=r"4x6 is no multiple of 4"):
        merge_order(Grid(4, 6), 2)


@pytest.mark.parametrize("size", [Size(1, 1), Size(300, 500), Size(760, 410), Size(336, 2000)])
@pytest.mark.parametrize("levels", [1, 2])
def test_patches_are_the_views_in_merge_order(size, levels):
    image = noise(*size)
    plan = make_plan(size, SlicingConfig(scale_resolution=224), 14, levels)
    views = view_pixels(image, plan)
    assert [view.shape for view in views] == [(*view.size, 3) for view in plan.views]
    for view, pixels, patches in zip(plan.views, views, cut_views(image, plan, 14), strict=True):
        assert patches.dtype == np.uint8 and patches.shape == (view.patch_grid.area, 3 * 14**2)
        assert patches.flags.c_contiguous and patches.flags.owndata or patches.base.flags.owndata
        np.testing.assert_array_equal(patches, raster_patches(pixels, 14)[merge_order(view.patch_grid, levels)])


@pytest.mark.parametrize("size", [Size(600, 800), Size(1000, 300), Size(449, 448)])
def test_slices_tile_the_refined_image(size):
    image = noise(*size)
    plan = make_plan(size, SlicingConfig(), 14, 2)
    thumbnail, *slices = view_pixels(image, plan)
    rows, cols = plan.grid
    tiled = np.concatenate([np.concatenate(slices[row * cols : (row + 1) * cols], axis=1) for row in range(rows)])
    assert tiled.shape == (*plan.refined, 3)
    picture = Image.fromarray(image)
    for pixels in (tiled, thumbnail):
        height, width, _ = pixels.shape
        np.testing.assert_array_equal(pixels, np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)))


def test_global_encoding_shows_the_whole_image():
    image = noise(448, 896)
    plan = make_plan(Size(448, 896), SlicingConfig(encoding="global"), 14, 2)
    (view,) = view_pixels(image, plan)
    np.testing.assert_array_equal(view, image)


def test_an_image_of_another_size_is_an_error():
    plan = make_plan(Size(300, 400), SlicingConfig(), 14, 2)
    with pytest.raises(ValueError, match=r"uint8\[400, 300, 3\].*uint8\[300, 400, 3\]"):
        cut_views(noise(400, 300), plan, 14)
    with pytest.raises(ValueError, match=r"float32"):
        cut_views(noise(300, 400).astype(np.float32), plan, 14)
    with pytest.raises(ValueError, match=r"no .* patches of 7 pixels"):
        cut_views(noise(300, 400), plan, 7)
