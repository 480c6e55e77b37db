"""Views as patches: bit-equal to the published processor, and in merge order."""

import json
from pathlib import Path

import numpy as np
import pytest
from image_files import channels_first
from PIL import Image
from safetensors.numpy import load_file

from uhd_jax.config import PreResizeConfig, SlicingConfig
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
        raster = np.empty((len(patches), 588), np.uint8)
        raster[merge_order(view.patch_grid, levels)] = channels_first(patches)
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
        assert patches.dtype == np.uint8 and patches.shape == (view.patch_grid.area, 4 * 14**2)
        assert patches.flags.c_contiguous and patches.flags.owndata or patches.base.flags.owndata
        expected = raster_patches(pixels, 14)[merge_order(view.patch_grid, levels)]
        np.testing.assert_array_equal(channels_first(patches), expected)


@pytest.mark.parametrize("size", [Size(600, 800), Size(1000, 300), Size(449, 448)])
@pytest.mark.parametrize(("rule", "levels"), [("v4", 2), ("v1", 0), ("fixed_2x2", 0)])
def test_slices_tile_the_refined_image(size, rule, levels):
    """No overlap, no gap, no padding."""
    image = noise(*size)
    plan = make_plan(size, SlicingConfig(rule=rule), 14, levels)
    assert plan.refined.height % plan.grid.rows == plan.refined.width % plan.grid.cols == 0
    thumbnail, *slices = view_pixels(image, plan)
    rows, cols = plan.grid
    tiled = np.concatenate([np.concatenate(slices[row * cols : (row + 1) * cols], axis=1) for row in range(rows)])
    assert tiled.shape == (*plan.refined, 3)
    picture = Image.fromarray(image)
    for pixels in (tiled, thumbnail):
        height, width, _ = pixels.shape
        np.testing.assert_array_equal(pixels, np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)))


def resized(image, size, resample=Image.Resampling.BICUBIC):
    return np.asarray(Image.fromarray(image).resize((size.width, size.height), resample))


def test_without_overview_the_slices_are_the_views():
    image = noise(600, 800)
    with_overview = make_plan(Size(600, 800), SlicingConfig(rule="v1"), 14, 0)
    without = make_plan(Size(600, 800), SlicingConfig(rule="v1", overview=False), 14, 0)
    views = cut_views(image, without, 14)
    assert len(views) == without.grid.area > 1
    for view, expected in zip(views, cut_views(image, with_overview, 14)[1:], strict=True):
        np.testing.assert_array_equal(view, expected)


def test_legacy_slices_are_cut_from_the_image_and_resized_each_to_its_size():
    image = noise(489, 531)
    plan = make_plan(Size(489, 531), SlicingConfig(rule="v1_legacy", scale_resolution=336), 14, 0)
    assert plan.grid == (2, 2) and len({view.size for view in plan.slices}) == 3
    tiles = [image[:244, :265], image[:244, 265:], image[244:, :265], image[244:, 265:]]
    views = view_pixels(image, plan)
    for view, pixels, tile in zip(plan.views, views, [image, *tiles], strict=True):
        np.testing.assert_array_equal(pixels, resized(tile, view.size, Image.Resampling.LANCZOS))
    alone = make_plan(Size(489, 531), SlicingConfig(rule="v1_legacy", scale_resolution=336), 14, 0, 1)
    (view,) = view_pixels(image, alone)
    np.testing.assert_array_equal(view, views[0])


@pytest.mark.parametrize("rule", ["v4", "v1", "v1_legacy"])
def test_resizing_before_slicing(rule):
    """Bicubic, as published; then everything is as for an image of the new size."""
    image = noise(90, 160)
    before = SlicingConfig(rule=rule, scale_resolution=112, pre_resize=PreResizeConfig(long_side=320))
    plan = make_plan(Size(90, 160), before, 14, 0)
    assert plan.resized == (180, 320) and plan.slices
    enlarged = resized(image, Size(180, 320))
    direct = make_plan(Size(180, 320), SlicingConfig(rule=rule, scale_resolution=112), 14, 0)
    for view, expected in zip(view_pixels(image, plan), view_pixels(enlarged, direct), strict=True):
        np.testing.assert_array_equal(view, expected)


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
