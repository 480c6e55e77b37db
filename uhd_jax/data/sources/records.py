"""Records in memory, and small files of them that are checked whole when they are opened."""

from __future__ import annotations

import codecs
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from uhd_jax.config import ImageLimits
from uhd_jax.data.chat import Message
from uhd_jax.data.sources.conversation import parse
from uhd_jax.data.sources.paths import ImageRoot
from uhd_jax.data.sources.protocol import SourceError
from uhd_jax.slicing import image_io
from uhd_jax.slicing.plan import Size


class Records:
    """Samples from a list of records, for example the lines of a JSONL file.

    A record is `{"messages": [{"role": .., "content": ..}, ..], "images": [..]}`. Content is a string or a list of
    parts `{"type": "text", "text": ..}` and `{"type": "image"}`; the k-th image part shows the k-th image. An image is
    a path, the bytes of a file, a PIL image, or a uint8 array. Other forms of records are those of `conversation`.

    Args:
      records: the samples.
      limits: what an image may be.
      folder: where relative paths of images start.
      name: how errors call the list; the record's number from 1 follows.

    Raises:
      SourceError: a malformed record, named by its number and the field.
    """

    def __init__(
        self,
        records: Iterable[Mapping[str, Any]],
        limits: ImageLimits = ImageLimits(),
        folder: str | Path = "",
        name: str = "records",
    ):
        self._limits, self._folder, self._name = limits, folder, name
        # Of a file of records: it is not trusted with other places, and worker processes get its path alone.
        self._root: ImageRoot | None = None
        self._opened_as: tuple[str | Path, ImageLimits, str | Path] | None = None
        self._numbers: list[int] = []
        self._messages: list[tuple[Message, ...]] = []
        self._images: list[list[Any]] = []
        for number, record in enumerate(records, 1):
            self._add(number, record)

    @classmethod
    def from_jsonl(cls, path: str | Path, limits: ImageLimits = ImageLimits(), image_root: str | Path = "") -> Records:
        """One record per line of a UTF-8 file, blank lines aside.

        Images are found below `image_root`, by default the file's folder; absolute paths and `..` are refused.

        Raises:
          SourceError: the file cannot be read or holds no record, or a line is malformed; the message names file, line
            and field.
        """
        source = cls((), limits, name=str(path))
        source._root, source._opened_as = ImageRoot(image_root or Path(path).parent), (path, limits, image_root)
        for number, record in _read_lines(path):
            source._add(number, record)
        if not len(source):
            raise SourceError(f"{path}: holds no record; write one JSON object per line")
        return source

    def __reduce__(self):
        return (type(self).from_jsonl, self._opened_as) if self._opened_as else super().__reduce__()

    def _add(self, number: int, record: Any) -> None:
        try:
            messages, images = parse(record)
        except SourceError as error:
            raise SourceError(f"{self._name}:{number}: {error}") from None
        self._numbers.append(number)
        self._messages.append(messages)
        self._images.append(images)

    def __len__(self) -> int:
        return len(self._messages)

    def sizes(self, index: int) -> list[Size]:
        """Sizes from the headers of the files."""
        return [image_io.read_size(image, self._limits) for image in self._opened(index)]

    def messages(self, index: int) -> tuple[Message, ...]:
        """The conversation of a record."""
        return self._messages[index]

    def images(self, index: int) -> list[np.ndarray]:
        """The decoded images."""
        return [image_io.open_image(image, self._limits) for image in self._opened(index)]

    def pictures(self, index: int, least: Sequence[Size | None] = ()) -> list[Image.Image]:
        """As `protocol.pictures_of`."""
        images = self._opened(index)
        pairs = zip(images, least or [None] * len(images), strict=True)
        return [image_io.open_picture(image, self._limits, size) for image, size in pairs]

    def files(self, index: int) -> list[bytes]:
        """The files of the images, byte for byte."""
        return [image_io.read_bytes(image, self._limits) for image in self._opened(index)]

    def _opened(self, index: int) -> list[Any]:
        """The images as `image_io` takes them."""
        if self._root:
            return [self._root.open(image, self._limits.max_bytes) for image in self._images[index]]
        return [Path(self._folder, image) if isinstance(image, str) else image for image in self._images[index]]

    def where(self, index: int) -> str:
        """The file and its line, from 1; for records in memory their name and number."""
        return f"{self._name}:{self._numbers[index]}"


def _read_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Number, from 1, and JSON value of every line that is not blank; byte order marks are skipped."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.removeprefix(codecs.BOM_UTF8).strip():
                    continue
                try:
                    record = json.loads(line.decode("utf-8-sig"))
                except UnicodeDecodeError as error:
                    problem = f"not UTF-8 ({error.reason} at byte {error.start + 1}); save the file as UTF-8"
                    raise SourceError(f"{path}:{number}: {problem}") from None
                except (ValueError, RecursionError) as error:
                    place = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                    raise SourceError(f"{path}:{number}: not JSON ({place}); write one object per line") from None
                yield number, record
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from None


@dataclasses.dataclass(frozen=True)
class RecordsOptions:
    """Options of the source "records" (`DataConfig.options`)."""

    path: str  # of a JSONL file
    image_root: str = ""  # folder that paths of images are relative to; empty: the folder of the file
