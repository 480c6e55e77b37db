"""Sources of samples: what a `DataConfig` can name, and records of the user's own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from uhd_jax.config import ConfigError, DataConfig, ImageLimits, from_config_dict
from uhd_jax.data.chat import ROLES, ImagePart, Message
from uhd_jax.data.demo import DigitPages
from uhd_jax.slicing.image_io import open_image, read_size
from uhd_jax.slicing.plan import Size


class SourceError(ValueError):
    """A record is malformed; the message names it."""


class Source(Protocol):
    """Samples by number. Rows are planned from `sizes` and `messages`, so these two should be cheap."""

    def __len__(self) -> int:
        """Number of samples."""

    def sizes(self, index: int) -> list[Size]:
        """Sizes of the images of a sample, pixels unread. Raises `ImageRefused`."""

    def messages(self, index: int) -> Sequence[Message]:
        """The conversation of a sample."""

    def images(self, index: int) -> list[np.ndarray]:
        """The images of a sample: uint8[H, W, 3] each, of the sizes announced. Raises `ImageRefused`."""


class Records:
    """Samples from a list of records, for example the lines of a JSONL file.

    A record is `{"messages": [{"role": .., "content": ..}, ..], "images": [..]}`. Content is a string or a list of
    parts `{"type": "text", "text": ..}` and `{"type": "image"}`; the k-th image part shows the k-th image. An image is
    whatever `open_image` takes: a path, the bytes of a file, a PIL image, or a uint8 array.

    Args:
      records: the samples.
      limits: what an image may be.
      folder: where relative paths of images start.
      name: how errors call the list; the record's number from 1 follows.

    Raises:
      SourceError: a malformed record, named by its number.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        limits: ImageLimits = ImageLimits(),
        folder: str | Path = "",
        name: str = "records",
    ):
        self._limits = limits
        self._messages: list[tuple[Message, ...]] = []
        self._images: list[list[Any]] = []
        for number, record in enumerate(records, 1):
            try:
                images = [
                    Path(folder, image) if isinstance(image, str) else image for image in record.get("images", ())
                ]
                self._messages.append(_parse_messages(record["messages"], len(images)))
            except (KeyError, TypeError, AttributeError, SourceError) as error:
                problem = f"the key {error} is missing" if isinstance(error, KeyError) else error
                raise SourceError(f"{name}:{number}: {problem}") from None
            self._images.append(images)

    @classmethod
    def from_jsonl(cls, path: str | Path, limits: ImageLimits = ImageLimits()) -> Records:
        """One record per line; relative image paths start at the file's folder.

        Raises:
          SourceError: the file cannot be read, or a line is malformed; the message names file and line.
        """
        records = []
        try:
            with open(path, encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    try:
                        records.append(json.loads(line))
                    except json.JSONDecodeError as error:
                        raise SourceError(f"{path}:{number}: not JSON ({error})") from None
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"{path}: cannot be read ({error})") from None
        return cls(records, limits, Path(path).parent, str(path))

    def __len__(self) -> int:
        return len(self._messages)

    def sizes(self, index: int) -> list[Size]:
        """Sizes from the headers of the files."""
        return [read_size(image, self._limits) for image in self._images[index]]

    def messages(self, index: int) -> tuple[Message, ...]:
        """The conversation of a record."""
        return self._messages[index]

    def images(self, index: int) -> list[np.ndarray]:
        """The decoded images."""
        return [open_image(image, self._limits) for image in self._images[index]]


def _parse_messages(messages: Sequence[Mapping[str, Any]], images: int) -> tuple[Message, ...]:
    parsed, shown = [], 0
    for message in messages:
        if message["role"] not in ROLES:
            raise SourceError(f"role {message['role']!r} is not one of {ROLES}")
        content = message["content"]
        parts: list[str | ImagePart] = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                parts.append(part["text"])
            elif part["type"] == "image":
                parts.append(ImagePart(shown))
                shown += 1
            else:
                raise SourceError(f"content part of type {part['type']!r}; known are 'text' and 'image'")
        parsed.append(Message(message["role"], tuple(parts)))
    if not parsed:
        raise SourceError("no messages")
    if shown != images:
        raise SourceError(f"{shown} image parts in the messages, but {images} images")
    return tuple(parsed)


@dataclasses.dataclass(frozen=True)
class RecordsOptions:
    """Options of the source "records"."""

    path: str


def _records(options: Mapping[str, Any], limits: ImageLimits) -> Records:
    return Records.from_jsonl(from_config_dict(options, RecordsOptions, "data.options").path, limits)


# By the name that `DataConfig.source` uses; programs may add their own.
SOURCES: dict[str, Callable[[Mapping[str, Any], ImageLimits], Source]] = {
    "digit_pages": lambda options, limits: DigitPages(options),
    "records": _records,
}


def make_source(data: DataConfig, limits: ImageLimits = ImageLimits()) -> Source:
    """The source that a config names.

    Raises:
      ConfigError: an unknown source or option.
      SourceError: a file of the source is unreadable or malformed.
    """
    if data.source not in SOURCES:
        raise ConfigError(f"data.source: {data.source!r} is not one of {', '.join(SOURCES)}")
    return SOURCES[data.source](data.options, limits)
