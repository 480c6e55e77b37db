"""A folder of images without text: for the pre-training of a pyramid, which only looks at them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from uhd_jax.config import ImageLimits
from uhd_jax.config.checks import require_at_least
from uhd_jax.data.chat import ImagePart, Message
from uhd_jax.slicing import image_io
from uhd_jax.slicing.plan import Size

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class NoImages(ValueError):
    """A folder has no images; the message names it."""


@dataclasses.dataclass(frozen=True)
class ImagesOptions:
    """Options of the source "images" (`DataConfig.options`)."""

    path: str  # of the folder
    crop: int = 0  # pixels per side of the largest square in the middle, resized to this; 0: images as they are

    def __post_init__(self):
        require_at_least(self, 0, "crop")


class ImageFolder:
    """Every image below a folder, in the order of their paths. Links are followed; files without a suffix of `SUFFIXES`
    are not images.

    Raises:
      NoImages: there is no such folder, or no image in it.
    """

    def __init__(self, options: ImagesOptions, limits: ImageLimits = ImageLimits()):
        self._crop, self._limits = options.crop, limits
        self._folder = Path(options.path)
        if not self._folder.is_dir():
            raise NoImages(f"{self._folder}: there is no such folder; name one with images")
        self._names = images_below(self._folder)
        if not self._names:
            raise NoImages(f"{self._folder}: holds no file named {', '.join('*' + suffix for suffix in SUFFIXES)}")

    def __len__(self) -> int:
        return len(self._names)

    def sizes(self, index: int) -> list[Size]:
        """The size of the one image of a sample, from the header of its file."""
        size = image_io.read_size(self._file(index), self._limits)
        return [Size(self._crop, self._crop) if self._crop else size]

    def messages(self, index: int) -> tuple[Message, ...]:
        """The image, and an empty answer: every prompt form has a place for it."""
        return Message("user", (ImagePart(0),)), Message("assistant", ())

    def images(self, index: int) -> list[np.ndarray]:
        """The image: uint8[H, W, 3]. A crop is resized by Pillow's antialiased bicubic filter."""
        return [np.asarray(picture) for picture in self.pictures(index)]

    def pictures(self, index: int, least: Sequence[Size | None] = ()) -> list[Image.Image]:
        """As `protocol.pictures_of`; a crop is decoded as it is."""
        if not self._crop:
            return [image_io.open_picture(self._file(index), self._limits, *least)]
        picture = image_io.open_picture(self._file(index), self._limits)
        side = min(picture.size)
        left, top = (picture.width - side) / 2, (picture.height - side) / 2
        box = (left, top, left + side, top + side)
        return [picture.resize((self._crop, self._crop), Image.Resampling.BICUBIC, box=box)]

    def files(self, index: int) -> list[bytes]:
        """The file as it is; a PNG of a crop."""
        return [image_io.read_bytes(self.images(index)[0] if self._crop else self._file(index), self._limits)]

    def where(self, index: int) -> str:
        """The file."""
        return str(self._file(index))

    def _file(self, index: int) -> Path:
        return self._folder / self._names[index]


def images_below(folder: str | os.PathLike) -> list[str]:
    """Sorted paths relative to the folder. A folder reached again, through a link, is not entered again."""
    found, entered = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        entered.add(os.path.realpath(place))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(place, name)) not in entered]
        relative = Path(place).relative_to(folder)
        found += [str(relative / name) for name in files if Path(name).suffix.lower() in SUFFIXES]
    return sorted(found)
