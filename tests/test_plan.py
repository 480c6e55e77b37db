"""The plan: published examples, the float64 tie, global encoding, refusals, and what must hold for every size."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from uhd_jax.config import ImageLimits, SlicingConfig
from uhd_jax.slicing.plan import Grid, ImageRefused, Size, check_size, make_plan

EXAMPLES = json.loads((Path(__file__).parent / "golden" / "v4_partition_examples.json").read_text())["examples"]
LEVELS = {"16x": 2, "4x": 1}
SLICES = SlicingConfig()
GLOBAL = SlicingConfig(encoding="global")
TALL = ImageLimits(max_aspect_ratio=1e6)


def log_uniform_sides(largest: int):
    return st.floats(0, math.log(largest)).map(lambda x: round(math.exp(x)))


@pytest.mark.parametrize("row", EXAMPLES, ids=lambda r: f"{r['width']}x{r['height']}-{r['downsample_mode']}")
def test_published_examples(row):
    levels = LEVELS[row["downsample_mode"]]
    plan = make_plan(Size(row["height"], row["width"]), SLICES, 14, levels, row["max_slice_nums"])
    assert plan.image == (row["height"], row["width"])
    assert plan.grid == (row["grid_rows"], row["grid_cols"])
    assert plan.thumbnail.size == (row["thumbnail_h"], row["thumbnail_w"])
    assert list(plan.thumbnail.patch_grid) == row["thumbnail_patches_hw"]
    assert plan.thumbnail.visual_tokens == row["tokens_thumbnail"]
    if row["num_slices"]:
        assert plan.slice.size == (row["slice_h"], row["slice_w"])
        assert list(plan.slice.patch_grid) == row["slice_patches_hw"]
        assert plan.slice.visual_tokens == row["tokens_per_slice"]
    else:
        assert plan.slice is None and plan.refined is None
    assert len(plan.views) == row["num_views"]
    assert plan.patches == row["vit_patches_total"]
    assert plan.visual_tokens == row["tokens_visual_total"]


def test_all_published_examples_are_there():
    assert len(EXAMPLES) == 36


def test_squares_decided_by_the_last_bit_of_a_logarithm():
    # In float32 each of these would be 3x2.
    assert {make_plan(Size(side, side), SLICES, 14, 2).grid for side in range(1002, 1186)} == {Grid(2, 3)}
    assert make_plan(Size(1001, 1001), SLICES, 14, 2).grid != Grid(2, 3)
    assert make_plan(Size(1186, 1186), SLICES, 14, 2).grid != Grid(2, 3)


def test_on_an_exact_tie_more_rows_win():
    for side in (449, 500, 633):
        assert make_plan(Size(side, side), SLICES, 14, 2).grid == Grid(2, 1)
    assert make_plan(Size(5000, 5000), SLICES, 14, 2, max_slices=2).grid == Grid(2, 1)


def test_no_side_is_below_one_multiple():
    plan = make_plan(Size(10, 1000), SlicingConfig(scale_resolution=112), 14, 2)
    assert plan.thumbnail.size == Size(56, 1120) and plan.thumbnail.visual_tokens == 20


def test_one_slice_allowed_means_no_slices():
    plan = make_plan(Size(3000, 2000), SLICES, 14, 2, max_slices=1)
    assert plan.grid == Grid(0, 0) and plan.slice is None
    assert plan.thumbnail.size == Size(560, 392)


def test_max_slices_overrides_the_configuration():
    few = SlicingConfig(max_slices=2)
    size = Size(2000, 2000)
    assert make_plan(size, few, 14, 2).grid.area == 2
    assert make_plan(size, few, 14, 2, 9) == make_plan(size, SLICES, 14, 2)
    with pytest.raises(ValueError, match="max_slices=0"):
        make_plan(size, SLICES, 14, 2, 0)


@pytest.mark.parametrize(
    ("size", "view"),
    [
        (Size(1, 1), Size(448, 448)),  # enlarged to the area of a view
        (Size(40, 100), Size(280, 728)),
        (Size(448, 448), Size(448, 448)),
        (Size(600, 900), Size(616, 896)),  # own size, sides to the nearest multiple
        (Size(700, 756), Size(672, 784)),  # 12.5 and 13.5 multiples: ties go to the even one
        (Size(1344, 1344), Size(1344, 1344)),  # the whole budget of 9 views
        (Size(2688, 2688), Size(1344, 1344)),  # shrunk to it
        (Size(1500, 6000), Size(672, 2688)),
    ],
)
def test_global_encoding_is_one_view(size, view):
    plan = make_plan(size, GLOBAL, 14, 2)
    assert plan.thumbnail.size == view
    assert plan.grid == Grid(0, 0) and plan.slice is None and len(plan.views) == 1


def test_global_encoding_may_fill_the_patches_of_all_slices():
    config = SlicingConfig(encoding="global", max_view_patches=1024)
    assert make_plan(Size(4000, 4000), config, 14, 2).patches == 9 * 1024
    with pytest.raises(ImageRefused, match="a view of 392x560 would have 1120 patches, above the 1024"):
        make_plan(Size(200, 300), config, 14, 2, max_slices=1)


def test_json():
    assert make_plan(Size(1080, 1920), SLICES, 14, 2).to_json() == {
        "image": [1080, 1920],
        "resized": [1080, 1920],
        "grid": [2, 4],
        "thumbnail": [336, 616],
        "slice": [448, 448],
        "slices": [[448, 448]] * 8,
        "views": 9,
        "patches": 9248,
        "visual_tokens": 578,
    }
    unsliced = json.loads(json.dumps(make_plan(Size(1, 1), SLICES, 14, 2).to_json()))
    assert unsliced["grid"] == [0, 0] and unsliced["slice"] is None


@pytest.mark.parametrize("config", [SLICES, GLOBAL], ids=["slices", "global"])
@pytest.mark.parametrize(
    ("size", "message"),
    [
        (Size(20000, 20), r"20000x20: the aspect ratio 1000 is above max_aspect_ratio=200; crop"),
        (Size(20, 20000), r"20x20000: the aspect ratio 1000"),
        (Size(0, 10), r"0x10: .*at least one pixel"),
        (Size(10, -1), r"at least one pixel"),
        (Size(65536, 1000), r"65536x1000: .*max_side=65535; shrink"),
        (Size(60000, 60000), r"60000x60000: 3600000000 pixels are above max_pixels=178956970; shrink"),
    ],
)
def test_refused_sizes(config, size, message):
    with pytest.raises(ImageRefused, match=message):
        make_plan(size, config, 14, 2)


def test_limits_are_inclusive():
    limits = ImageLimits(max_pixels=5000, max_side=500, max_aspect_ratio=50)
    check_size(Size(500, 10), limits)
    for size in (Size(501, 11), Size(101, 50), Size(9, 451)):
        with pytest.raises(ImageRefused):
            check_size(size, limits)


def test_views_with_too_many_patches_are_refused():
    with pytest.raises(ImageRefused, match=r"1x190: a view of 56x6104 .* 1744 patches, above the 1408 .*crop"):
        make_plan(Size(1, 190), SLICES, 14, 2)
    # The slices of this image fit, its thumbnail does not.
    narrow = SlicingConfig(max_view_patches=1200, limits=TALL)
    with pytest.raises(ImageRefused, match="a view of 56x4424"):
        make_plan(Size(200, 20000), narrow, 14, 2)
    # The thumbnail fits, the slices do not.
    with pytest.raises(ImageRefused, match="a view of 560x392 would have 1120"):
        make_plan(Size(1652, 2233), SlicingConfig(max_view_patches=1100), 14, 2, max_slices=2)


@settings(max_examples=300, deadline=None)
@given(
    height=log_uniform_sides(8000),
    width=log_uniform_sides(8000),
    levels=st.integers(1, 2),
    max_slices=st.integers(1, 36),
    encoding=st.sampled_from(["slices", "global"]),
)
def test_what_holds_for_every_size(height, width, levels, max_slices, encoding):
    assume(max(height, width) <= 10 * min(height, width))
    config = SlicingConfig(encoding=encoding, max_slices=max_slices)
    plan = make_plan(Size(height, width), config, 14, levels)
    multiple = 14 * 2**levels
    for view in plan.views:
        assert view.size == (14 * view.patch_grid.rows, 14 * view.patch_grid.cols)
        assert view.size.height % multiple == view.size.width % multiple == 0
        assert view.visual_tokens * 4**levels == view.patch_grid.area
        if encoding == "slices":
            assert 800 <= view.patch_grid.area <= 1200
        else:
            assert view.patch_grid.area <= 1.2 * max_slices * 1024
    assert plan.visual_tokens == sum(view.visual_tokens for view in plan.views)
    assert plan.patches == sum(view.patch_grid.area for view in plan.views) == plan.visual_tokens * 4**levels
    assert plan.grid.area <= max_slices and plan.grid.area != 1
    if plan.slice:
        assert len(plan.views) == 1 + plan.grid.area
        assert plan.refined == (plan.slice.size.height * plan.grid.rows, plan.slice.size.width * plan.grid.cols)
    # The picture is stretched by rounding only, never by padding or cropping.
    for size in (plan.thumbnail.size, plan.refined or plan.thumbnail.size):
        stretch = (size.width / size.height) / (width / height)
        assert 1 / 1.25 < stretch < 1.25
