"""Augmentation: sizes as the scripts draw them, the same for every host, and pixels of the size that was announced."""

import dataclasses

import numpy as np
import pytest

from uhd_jax.config import AugmentConfig, ConfigError, SlicingConfig
from uhd_jax.data.augment import Alteration, alter, draw, resized_counts, worn
from uhd_jax.slicing.sizes import Size

RECIPE = AugmentConfig(resize_probability=0.5, jpeg_probability=0.2, ocr_probability=0.7)
SLICING = SlicingConfig()


def squares(count):
    """A size of about so many views of 448 x 448."""
    return Size(448, 448 * count)


@pytest.mark.parametrize(
    ("own", "counts"),
    [
        (1, [1, 2, 3]),
        (2, [2, 3, 4, 5]),
        (4, [4, 5, 6, 7, 8]),
        (6, [5, 6, 7, 8]),
        (8, [7, 8]),
        (9, [7, 8]),
        (30, [8]),
    ],
)
def test_areas_that_an_image_may_be_given(own, counts):
    """By hand from the released function: from the image's own count to min(2 * own + 2, 9), 9 left out."""
    assert resized_counts(squares(own), 448, 9) == counts
    assert resized_counts(Size(100, 100), 448, 9) == [1, 2, 3]
    assert resized_counts(squares(4), 448, 3) == []


def test_half_of_the_images_are_resized_to_areas_drawn_evenly():
    sizes = [Size(440, 890), Size(300, 500)] * 1000  # never of the area that they have
    drawn = draw(sizes, RECIPE, SLICING, 9, (0, 0, 0))
    changed = [(size, d.alteration) for size, d in zip(sizes, drawn, strict=True) if d.alteration.size != size]
    assert 0.46 < len(changed) / len(sizes) < 0.54
    areas = [
        alteration.size.height * alteration.size.width / 448**2 for size, alteration in changed if size.height == 440
    ]
    found, counts = np.unique(np.ceil(areas), return_counts=True)
    assert set(found) <= {2, 3, 4, 5} and counts.min() > 0.2 * len(areas) * 0.8
    for size, alteration in changed:
        ratio = alteration.size.width / alteration.size.height
        assert ratio == pytest.approx(size.width / size.height, rel=0.01)
    qualities = [alteration.jpeg_quality for _, alteration in changed if alteration.jpeg_quality]
    assert 0.16 < len(qualities) / len(changed) < 0.24 and (min(qualities), max(qualities)) == (75, 95)
    assert not any(d.alteration.jpeg_quality for size, d in zip(sizes, drawn, strict=True) if d.alteration.size == size)
    assert 0.67 < np.mean([d.alteration.ocr_seed >= 0 for d in drawn]) < 0.73


def test_draws_follow_from_seed_sample_and_epoch_alone():
    def of(*key, count=3):
        return draw([squares(2)] * count, RECIPE, SLICING, 9, key)

    assert of(1, 2, 3) == of(1, 2, 3) and of(1, 2, 3, count=2) == of(1, 2, 3)[:2]
    assert len({tuple(of(*key)) for key in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4))}) == 4


def test_enhancement_can_be_for_some_parts_of_a_mixture():
    only = dataclasses.replace(RECIPE, ocr_probability=1.0, ocr_parts=("pages",))
    for part, seeds in (("pages", True), ("photos", False), ("", False)):
        drawn = draw([squares(1)] * 4, only, SLICING, 9, (0, 0, 0), part)
        assert all((d.alteration.ocr_seed >= 0) == seeds for d in drawn)


def test_nothing_configured_changes_nothing():
    sizes = [squares(count) for count in range(1, 10)]
    assert [d.alteration for d in draw(sizes, AugmentConfig(), SLICING, 9, (0, 0, 0))] == [
        Alteration(size, size) for size in sizes
    ]
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    assert alter(image, Alteration(Size(20, 30), Size(20, 30))) is image


def test_pixels_have_the_size_that_was_announced_and_the_same_key_gives_the_same():
    rows = np.linspace(0, 255, 60).astype(np.uint8)
    image = np.broadcast_to(rows[:, None, None], (60, 90, 3)).copy()
    image[:, 45:] = 255 - image[:, 45:]
    for seed in range(12):
        alteration = Alteration(Size(60, 90), Size(83, 120), jpeg_quality=6 + 5 * seed, ocr_seed=seed)
        altered = alter(image, alteration)
        assert altered.dtype == np.uint8 and altered.shape == (83, 120, 3)
        np.testing.assert_array_equal(altered, alter(image, alteration))
        still = np.corrcoef(
            altered[..., 1].ravel(), alter(image, Alteration(Size(60, 90), Size(83, 120)))[..., 1].ravel()
        )[0, 1]
        assert still > 0.5  # still the same picture
    coarse, fine = (
        alter(image, Alteration(Size(60, 90), Size(60, 90), quality)).astype(int) - image for quality in (6, 95)
    )
    assert np.abs(coarse).mean() > 2 * np.abs(fine).mean() > 0
    with pytest.raises(ValueError, match=r"image is uint8\[60, 90, 3\], announced was uint8\[60, 91, 3\]"):
        alter(image, Alteration(Size(60, 91), Size(60, 90)))


def test_wear_is_of_several_kinds():
    image = np.random.default_rng(0).integers(60, 200, (40, 50, 3), np.uint8)
    differences = [np.abs(worn(image, seed).astype(int) - image).mean() for seed in range(40)]
    assert sum(d == 0 for d in differences) < 20 < sum(d > 5 for d in differences) + 15
    assert len(set(differences)) > 15


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (dict(resize_probability=1.5), "resize_probability: 1.5 is not a probability"),
        (dict(ocr_probability=-0.1), "ocr_probability: -0.1"),
        (dict(jpeg_quality=(95, 75)), r"jpeg_quality: \[95, 75\] must be the lowest and the highest"),
        (dict(jpeg_quality=(75,)), "jpeg_quality"),
    ],
)
def test_impossible_values_are_named(changes, complaint):
    with pytest.raises(ConfigError, match=complaint):
        AugmentConfig(**changes)
