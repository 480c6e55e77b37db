"""Pictures cut without a copy: the same patches as from arrays, wherever Pillow's memory lies."""

import io

import numpy as np
import pytest
from image_files import encode, photo, with_orientation
from PIL import Image

from uhd_jax.config import ImageLimits, PreResizeConfig, SlicingConfig
from uhd_jax.slicing.image_io import open_image, open_picture
from uhd_jax.slicing.memory import pixels_of
from uhd_jax.slicing.pixels import cut_views, least_size, view_pixels
from uhd_jax.slicing.plan import Size, make_plan


def noise(height, width):
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


class Unshared:
    """A Pillow that does not share its memory."""

    def __get__(self, *_):
        raise AttributeError


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (130, 57)])
@pytest.mark.parametrize("shared", [True, False])
def test_the_pixels_are_those_of_the_picture(size, shared, monkeypatch):
    pixels, copies = noise(*size), []
    monkeypatch.setattr(Image.Image, "tobytes", lambda *args, real=Image.Image.tobytes: copies.append(1) or real(*args))
    if not shared:
        monkeypatch.setattr(Image.Image, "__arrow_c_array__", Unshared())
    found = pixels_of(Image.fromarray(pixels))  # the picture is gone; its memory must not be
    assert found.shape == (*size, 4) and found.dtype == np.uint8 and bool(copies) == (not shared)
    np.testing.assert_array_equal(found[..., :3], pixels)
    with pytest.raises(ValueError, match="read-only"):
        found[0, 0, 0] = 1


def test_pixels_of_memory_in_pieces():
    pixels = noise(2300, 2000)
    Image.core.set_block_size(2**20)  # of 18 MB
    try:
        found = pixels_of(Image.fromarray(pixels))
    finally:
        Image.core.set_block_size(2**24)
    np.testing.assert_array_equal(found[..., :3], pixels)


@pytest.mark.parametrize("size", [Size(224, 224), Size(300, 500), Size(448, 448)])
def test_a_picture_is_cut_like_its_array_and_into_given_memory(size):
    pixels = noise(*size)
    plan = make_plan(size, SlicingConfig(scale_resolution=224), 14, 2)
    expected = cut_views(pixels, plan, 14)
    rooms = np.full((len(expected), 512, 784), 7, np.uint8)
    into = [room[: len(view)] for room, view in zip(rooms, expected, strict=True)]
    for view, given in zip(cut_views(Image.fromarray(pixels), plan, 14, into), into, strict=True):
        assert view is given
    for room, view in zip(rooms, expected, strict=True):
        np.testing.assert_array_equal(room[: len(view)], view)
        assert (room[len(view) :] == 7).all()
    for picture in (Image.fromarray(pixels).convert("RGBA"), Image.fromarray(pixels[1:])):
        with pytest.raises(ValueError, match="the plan is for RGB"):
            cut_views(picture, plan, 14)
    with pytest.raises(ValueError, match="contiguous"):
        cut_views(pixels, plan, 14, [np.zeros((len(view), 800), np.uint8)[:, :784] for view in expected])


def test_a_picture_has_the_pixels_of_the_array():
    for data in (encode(photo()), encode(photo(), "JPEG"), with_orientation("JPEG", 6), encode(photo().convert("LA"))):
        picture = open_picture(data)
        assert picture.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(picture), open_image(data))


def jpeg(height, width, **options):
    buffer = io.BytesIO()
    photo(height, width).save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("least", "decoded"),
    [
        ((202, 100), (403, 200)),
        ((101, 50), (202, 100)),
        ((50, 25), (51, 25)),
        ((1, 1), (51, 25)),
        ((500, 1), (403, 200)),
    ],
)
def test_a_jpeg_may_be_decoded_smaller(least, decoded):
    data = jpeg(403, 200)
    picture = open_picture(data, least=Size(*least))
    assert (picture.height, picture.width) == decoded
    shrunk = photo(403, 200).resize(picture.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(picture, int) - np.asarray(shrunk, int)).mean() < 3  # of 255: the same picture
    assert open_picture(encode(photo(403, 200)), least=Size(1, 1)).size == (200, 403)  # a PNG is as it is


def test_a_turned_jpeg_is_decoded_as_small():
    exif = Image.Exif()
    exif[274] = 6
    assert open_picture(jpeg(400, 200, exif=exif), least=Size(50, 200)).size == (200, 100)


def test_views_of_a_smaller_picture():
    """No view is made of fewer pixels than it has, and all look the same."""
    data = jpeg(1600, 1200)
    plan = make_plan(Size(1600, 1200), SlicingConfig(scale_resolution=112), 14, 2)
    least = least_size(plan)
    assert least == max((plan.refined, plan.thumbnail.size))
    picture = open_picture(data, ImageLimits(), least)
    assert picture.size == (600, 800) and 300 < least.width <= 600  # a half, since a quarter would be too small
    whole, small = cut_views(open_picture(data), plan, 14), cut_views(picture, plan, 14, reduced=True)
    for view, its in zip(whole, small, strict=True):
        assert not np.array_equal(view, its)  # as documented: pixels change
        assert np.abs(view.astype(int) - its).mean() < 2
    with pytest.raises(ValueError, match="the plan is for RGB"):
        cut_views(picture, plan, 14)
    before = SlicingConfig(scale_resolution=112, pre_resize=PreResizeConfig(long_side=800))
    assert least_size(make_plan(Size(1600, 1200), before, 14, 2)) == Size(800, 600)
    legacy = SlicingConfig(rule="v1_legacy", scale_resolution=112)
    assert least_size(make_plan(Size(1600, 1200), legacy, 14, 0)) == Size(1600, 1200)
    assert [view.shape[:2] for view in view_pixels(open_picture(data), plan)] == [view.size for view in plan.views]
