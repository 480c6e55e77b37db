"""What a source of samples is, and the error of a sample that is not as it should be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from uhd_jax.data.chat import Message
from uhd_jax.slicing.plan import Size


class SourceError(ValueError):
    """A record is malformed, or a file of records is; the message names its place and the field."""


class Source(Protocol):
    """Samples by number. Rows are planned from `sizes` and `messages`, so these two should be cheap. Several threads
    ask at once.

    Worker processes get a pickled copy: a source of files pickles as their names and opens them again.
    """

    def __len__(self) -> int:
        """Number of samples."""

    def sizes(self, index: int) -> list[Size]:
        """Sizes of the images of a sample, pixels unread. Raises `SourceError` and `ImageRefused`."""

    def messages(self, index: int) -> Sequence[Message]:
        """The conversation of a sample. Raises `SourceError`."""

    def images(self, index: int) -> list[np.ndarray]:
        """The images of a sample: uint8[H, W, 3] each, of the sizes announced. Raises as `sizes`."""

    def files(self, index: int) -> list[bytes]:
        """The files of the images of a sample, byte for byte; PNG of those that have none. Raises as `sizes`."""

    def where(self, index: int) -> str:
        """Where a sample comes from, for messages: `path/to/file.jsonl:17`."""


def pictures_of(source: Source, index: int, least: Sequence[Size | None] = ()) -> list[Image.Image | np.ndarray]:
    """The images of a sample as `slicing.pixels` takes them: pictures where the source has `pictures`, else arrays.

    Args:
      source: may have a method `pictures(index, least)` beside those of the protocol.
      index: of the sample.
      least: for each image, as of `image_io.open_picture`; empty: decoded as they are.
    """
    pictures = getattr(source, "pictures", None)
    return pictures(index, least) if pictures else source.images(index)
