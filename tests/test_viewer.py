"""The picture of a plan: everything of it is drawn, at every size and shape."""

import os

import numpy as np
import pytest
from PIL import Image

from uhd_jax.config import PreResizeConfig, SlicingConfig
from uhd_jax.slicing.plan import Size, make_plan
from uhd_jax.slicing.viewer import PAGE_WIDTH, draw_slices

WHITE = [255, 255, 255]


def mosaic(size, grid):
    """An image whose slices each have a colour of their own, and the colours."""
    rows, cols = grid.rows or 1, grid.cols or 1
    draw = np.random.default_rng(0)
    colours = draw.choice(np.arange(20, 220, 5), size=(rows, cols, 3)).astype(np.uint8)
    picture = Image.fromarray(colours).resize((size.width, size.height), Image.Resampling.NEAREST)
    return np.asarray(picture), colours.reshape(-1, 3)


def pixels_of(colour, page):
    return np.argwhere((page == colour).all(axis=-1))


@pytest.mark.parametrize(
    "size",
    [Size(40, 60), Size(1, 1), Size(1080, 1920), Size(3000, 4000), Size(2000, 300), Size(200, 20000), Size(60, 2000)],
    ids=str,
)
def test_every_view_is_drawn(size):
    plan = make_plan(size, SlicingConfig(), 14, 2)
    image, colours = mosaic(size, plan.grid)
    picture = draw_slices(image, plan, title="a file.png")
    page = np.asarray(picture)
    assert picture.mode == "RGB" and picture.width == PAGE_WIDTH and 300 < picture.height < 2000
    for border in (page[:30], page[-30:], page[:, :30], page[:, -30:]):
        assert (border == WHITE).all()
    assert len(np.unique(page[40:80, 40:400])) > 10, "no title"
    for colour in colours:
        places = pixels_of(colour, page)
        assert len(places) > (800 if plan.slice else 200), (colour, len(places))


@pytest.mark.parametrize(
    "options",
    [
        {"overview": False},
        {"rule": "v1", "overview": False, "pre_resize": PreResizeConfig(long_side=700)},
        {"rule": "v1_legacy"},
        {"rule": "fixed_2x2"},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [Size(489, 531), Size(2000, 300), Size(300, 2000)], ids=str)
def test_every_view_of_other_rules_is_drawn(size, options):
    plan = make_plan(size, SlicingConfig(scale_resolution=112, **options), 14, 0)
    image, colours = mosaic(size, plan.grid)
    page = np.asarray(draw_slices(image, plan))
    for border in (page[:30], page[-30:], page[:, :30], page[:, -30:]):
        assert (border == WHITE).all()
    for colour in colours:
        assert len(pixels_of(colour, page)) > 800


def test_slices_of_several_sizes_are_all_described():
    size = Size(489, 531)
    plan = make_plan(size, SlicingConfig(rule="v1_legacy", scale_resolution=336), 14, 0)
    assert plan.slice is None and len(set(plan.slices)) == 3
    equal = make_plan(Size(490, 532), SlicingConfig(rule="v1_legacy", scale_resolution=336), 14, 0)
    pages = [draw_slices(np.full((*p.image, 3), 90, np.uint8), p) for p in (plan, equal)]
    assert pages[0].height > pages[1].height + 30  # two more lines


def test_slices_stand_in_raster_order():
    size = Size(900, 900)
    plan = make_plan(size, SlicingConfig(), 14, 2)
    assert plan.grid == (2, 2)
    image, colours = mosaic(size, plan.grid)
    page = np.asarray(draw_slices(image, plan))
    sheet = page[page.shape[0] // 2 :]
    centres = [np.median(pixels_of(colour, sheet), axis=0) for colour in colours]
    assert centres[0][0] == pytest.approx(centres[1][0], abs=20) and centres[0][1] < centres[1][1] - 200
    assert centres[2][0] == pytest.approx(centres[3][0], abs=20) and centres[2][0] > centres[0][0] + 200


def test_the_grid_is_drawn_over_the_image_only():
    size = Size(900, 1800)
    plan = make_plan(size, SlicingConfig(), 14, 2)
    page = np.asarray(draw_slices(np.full((*size, 3), 90, np.uint8), plan))
    accent = (page == [194, 65, 12]).all(axis=-1)
    inside = (page == 90).all(axis=-1)
    vertical = accent.sum(axis=0) > 150
    assert vertical.sum() >= 2 * (plan.grid.cols - 1)
    assert np.flatnonzero(vertical).max() < PAGE_WIDTH / 2 < np.flatnonzero(inside.any(axis=0)).max()


def test_a_title_of_any_length_fits():
    plan = make_plan(Size(50, 50), SlicingConfig(), 14, 2)
    image = np.zeros((50, 50, 3), np.uint8)
    short, long = draw_slices(image, plan, "a.png"), draw_slices(image, plan, "line\n" * 300 + "x" * 10_000)
    assert short.size == long.size
    assert (np.asarray(long)[:, -40:] == WHITE).all()
    assert draw_slices(image, plan).height < short.height
    assert draw_slices(image, plan, os.fsdecode(b"\xff.png")).size == short.size  # a name that is not UTF-8


def test_an_image_of_another_size_is_an_error():
    plan = make_plan(Size(50, 60), SlicingConfig(), 14, 2)
    with pytest.raises(ValueError, match="the plan is for"):
        draw_slices(np.zeros((60, 50, 3), np.uint8), plan)
