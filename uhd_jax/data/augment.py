"""Changes to images in training: another area, JPEG compression, and what scanning and photographing do to pages.

Source: the released scripts (spec v4 section 1.10). What happens to an image is drawn from seed, sample and epoch
before it is decoded, so its new size is known when rows are planned, and is the same on every host and in every worker.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from uhd_jax.config import AugmentConfig, SlicingConfig
from uhd_jax.slicing.rules import with_area
from uhd_jax.slicing.sizes import Size

_MOST_RESIZED = 10  # slices; the scripts count no further
_DRAWS = 6  # numbers per image


class Alteration(NamedTuple):
    """What is done to an image before it is sliced."""

    image: Size  # as announced
    size: Size  # to which it is resized; its own where it is not
    jpeg_quality: int = 0  # 0: not compressed
    ocr_seed: int = -1  # of `worn`; -1: not done

    @property
    def changes(self) -> bool:
        """Whether anything is done at all."""
        return bool(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """JSON types only; nothing for an image that stays as it is."""
        facts: dict[str, Any] = {"resized": list(self.size)} if self.size != self.image else {}
        facts |= {"jpeg_quality": self.jpeg_quality} if self.jpeg_quality else {}
        return facts | ({"ocr_seed": self.ocr_seed} if self.ocr_seed >= 0 else {})


class Drawn(NamedTuple):
    """What chance decides about an image."""

    alteration: Alteration
    refill: float  # `draw` of `slicing.plan.plan_image`


def draw(
    sizes: Sequence[Size],
    augment: AugmentConfig,
    slicing: SlicingConfig,
    max_slices: int,
    key: tuple[int, int, int],
    part: str = "",
) -> list[Drawn]:
    """Draws what becomes of the images of a sample.

    Half of the images (`resize_probability`) are given the area of c views, where c is drawn from their own number of
    slices r and the numbers up to min(2 r + 1, max_slices - 1), from r - 1 on for r above 5, and from r - 2 on for r
    above 8.

    Args:
      sizes: of its images.
      augment: probabilities.
      slicing: scale_resolution is the side of a view.
      max_slices: of the stage.
      key: seed of the stage, number of the sample, epoch.
      part: name of the part of a mixture that the sample is from.
    """
    worn = augment.ocr_probability if not augment.ocr_parts or part in augment.ocr_parts else 0.0
    if not (worn or augment.resize_probability or slicing.pre_resize.refill_probability):
        return [Drawn(Alteration(size, size), 1.0) for size in sizes]  # nothing is left to chance
    numbers = np.random.default_rng((*key, 1)).random((len(sizes), _DRAWS))  # 1: apart from other uses of the key
    low, high = augment.jpeg_quality
    drawn = []
    for size, (refill, resize, count, jpeg, quality, ocr) in zip(sizes, numbers.tolist(), strict=True):
        counts = resized_counts(size, slicing.scale_resolution, max_slices)
        resizes = resize < augment.resize_probability and counts
        alteration = Alteration(
            size,
            with_area(size, counts[int(count * len(counts))] * slicing.scale_resolution**2) if resizes else size,
            low + int(quality * (high - low + 1)) if resizes and jpeg < augment.jpeg_probability else 0,
            int(ocr / worn * 2**31) if ocr < worn else -1,
        )
        drawn.append(Drawn(alteration, refill))
    return drawn


def resized_counts(size: Size, side: int, max_slices: int) -> list[int]:
    """The numbers of views of side**2 pixels whose area an image may be given; may be none."""
    own = min(math.ceil(size.height * size.width / side**2), _MOST_RESIZED)
    first = own - (own > 5) - (own > 8)
    return list(range(first, min(2 * own + 2, max_slices)))


def alter(image: np.ndarray, alteration: Alteration) -> np.ndarray:
    """Does it: resize (bicubic), compress, wear.

    Args:
      image: uint8[H, W, 3].
      alteration: see there.

    Returns:
      uint8 of `alteration.size`.

    Raises:
      ValueError: the image is not of the size that was announced.
    """
    if image.dtype != np.uint8 or image.shape != (*alteration.image, 3):
        raise ValueError(f"image is {image.dtype}{list(image.shape)}, announced was uint8{[*alteration.image, 3]}")
    height, width = alteration.size
    if alteration.size != alteration.image:
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    if alteration.jpeg_quality:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=alteration.jpeg_quality)
        image = np.asarray(Image.open(file, formats=("JPEG",)))
    return worn(image, alteration.ocr_seed) if alteration.ocr_seed >= 0 else image


def worn(image: np.ndarray, seed: int) -> np.ndarray:
    """An image as if scanned or photographed badly: uint8[H, W, 3] to the same.

    After what the scripts do to images of documents, with Pillow's filters: noise (1 of 2), blur (1 of 10), one of
    brightness with contrast, colour, and equalised values (3 of 10), sharpness (1 of 10), hue (1 of 5).
    """
    rng = np.random.default_rng(seed)
    if rng.random() < 0.5:
        deviation = 255 * rng.uniform(0.1, 0.2)
        noise = rng.standard_normal(image.shape, np.float32) * deviation
        image = (image + noise).clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(image)
    if rng.random() < 0.1:
        picture = picture.filter(ImageFilter.BoxBlur(1))
    if rng.random() < 0.3:
        kind = rng.integers(3)
        if kind == 0:
            picture = ImageEnhance.Brightness(picture).enhance(rng.uniform(0.7, 1.3))
            picture = ImageEnhance.Contrast(picture).enhance(rng.uniform(0.8, 1.2))
        elif kind == 1:
            picture = ImageEnhance.Color(picture).enhance(rng.uniform(0.8, 1.2))
        else:
            picture = ImageOps.equalize(picture)
    if rng.random() < 0.1:
        picture = ImageEnhance.Sharpness(picture).enhance(rng.uniform(1.2, 2.0))
    if rng.random() < 0.2:
        hue, saturation, value = picture.convert("HSV").split()
        shift = int(rng.integers(-14, 15))  # of 256, a circle of hues
        picture = Image.merge("HSV", (hue.point(lambda h: (h + shift) % 256), saturation, value)).convert("RGB")
    return np.asarray(picture)
