"""What sources of rows in files have in common: a row is read when it is asked for, and may turn out to be broken."""

from __future__ import annotations

import abc
import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from uhd_jax.config import ImageLimits
from uhd_jax.data.chat import Message
from uhd_jax.data.sources.conversation import parse
from uhd_jax.data.sources.paths import ImageRoot
from uhd_jax.data.sources.protocol import SourceError
from uhd_jax.slicing import image_io
from uhd_jax.slicing.plan import ImageRefused, Size

_PLANNED = 8192  # samples of which the images' paths are kept between planning and decoding


@dataclasses.dataclass(frozen=True)
class FileOptions:
    """Options of the sources that read rows from files (`DataConfig.options`)."""

    path: str  # a file; or a folder or a pattern, whose files are read in the order of their names
    image_root: str = ""  # folder that paths of images are relative to; empty: of each file its own folder


class RowSource(abc.ABC):
    """Samples from rows of files: pickled by its options, opened anew by whoever unpickles it."""

    suffixes: tuple[str, ...] = ()  # of its files in a folder; see `find_files`

    def __init__(self, options: FileOptions, limits: ImageLimits):
        self._options, self._limits = options, limits
        self._roots: dict[str, ImageRoot] = {}  # by folder
        self._local = threading.local()
        self._planned: OrderedDict[int, list[str]] = OrderedDict()  # files of samples whose sizes were asked for

    def __reduce__(self):
        return type(self), (self._options, self._limits)

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abc.abstractmethod
    def _row(self, index: int) -> Mapping[str, Any]:
        """A row in a form of `conversation`. Raises `SourceError` without the place."""

    @abc.abstractmethod
    def where(self, index: int) -> str:
        """The file and the row in it, from 1."""

    def _folder(self, index: int) -> str:
        """The folder of the file that a row stands in; sources whose images are never paths have none."""
        return ""

    def sizes(self, index: int) -> list[Size]:
        """Sizes from the headers of the images."""
        opened = self._opened(index)
        sizes = [image_io.read_size(image, self._limits) for image in opened]
        if all(isinstance(image, str) for image in opened):  # not bytes: a window of samples would fill the memory
            self._planned[index] = opened
            if len(self._planned) > _PLANNED:
                self._planned.popitem(last=False)
        return sizes

    def messages(self, index: int) -> tuple[Message, ...]:
        """The conversation of a row."""
        return self._sample(index)[0]

    def images(self, index: int) -> list[np.ndarray]:
        """The decoded images."""
        return [image_io.open_image(image, self._limits) for image in self._opened(index)]

    def pictures(self, index: int, least: Sequence[Size | None] = ()) -> list[Image.Image]:
        """As `protocol.pictures_of`."""
        images = self._planned.pop(index, None)
        images = self._opened(index) if images is None else images
        pairs = zip(images, least or [None] * len(images), strict=True)
        return [image_io.open_picture(image, self._limits, size) for image, size in pairs]

    def files(self, index: int) -> list[bytes]:
        """The files of the images, byte for byte."""
        return [image_io.read_bytes(image, self._limits) for image in self._opened(index)]

    def _parse(self, index: int) -> tuple[tuple[Message, ...], list[Any]]:
        return parse(self._row(index))

    def _sample(self, index: int) -> tuple[tuple[Message, ...], list[Any]]:
        """Messages and images. A thread keeps its last: sizes and messages are asked for one after the other."""
        last = getattr(self._local, "last", None)
        if last is None or last[0] != index:
            if not 0 <= index < len(self):
                raise IndexError(index)
            try:
                last = (index, self._parse(index))
            except SourceError as error:
                raise SourceError(f"{self.where(index)}: {error}") from None
            self._local.last = last
        return last[1]

    def _opened(self, index: int) -> list[Any]:
        """The images as `image_io` takes them."""
        opened = []
        for number, image in enumerate(self._sample(index)[1]):
            try:
                if isinstance(image, str):
                    image = self._root(index).open(image, self._limits.max_bytes)
                opened.append(image)
            except ImageRefused as error:
                raise ImageRefused(f"image {number + 1}: {error}") from None
        return opened

    def _root(self, index: int) -> ImageRoot:
        folder = self._options.image_root or self._folder(index)
        if folder not in self._roots:
            self._roots[folder] = ImageRoot(folder)
        return self._roots[folder]
