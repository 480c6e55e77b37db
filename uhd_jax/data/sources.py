"""Sources of samples: what a `DataConfig` can name, and records of the user's own."""

from __future__ import annotations

import codecs
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from uhd_jax.config import ConfigError, DataConfig, ImageLimits, from_config_dict
from uhd_jax.data.chat import ROLES, ImagePart, Message
from uhd_jax.data.demo import DigitPages, DigitPagesOptions
from uhd_jax.data.images import ImageFolder, ImagesOptions
from uhd_jax.slicing import image_io
from uhd_jax.slicing.plan import Size


class SourceError(ValueError):
    """A record is malformed; the message names its place and the field."""


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

    def where(self, index: int) -> str:
        """Where a sample comes from, for messages: `path/to/file.jsonl:17`."""


class Records:
    """Samples from a list of records, for example the lines of a JSONL file.

    A record is `{"messages": [{"role": .., "content": ..}, ..], "images": [..]}`. Content is a string or a list of
    parts `{"type": "text", "text": ..}` and `{"type": "image"}`; the k-th image part shows the k-th image. An image is
    a path, the bytes of a file, a PIL image, or a uint8 array. Other keys are ignored.

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
        self._numbers: list[int] = []
        self._messages: list[tuple[Message, ...]] = []
        self._images: list[list[Any]] = []
        for number, record in enumerate(records, 1):
            self._add(number, record)

    @classmethod
    def from_jsonl(cls, path: str | Path, limits: ImageLimits = ImageLimits()) -> Records:
        """One record per line of a UTF-8 file, blank lines aside; relative image paths start at the file's folder.

        Raises:
          SourceError: the file cannot be read or holds no record, or a line is malformed; the message names file, line
            and field.
        """
        source = cls((), limits, Path(path).parent, str(path))
        for number, record in _read_lines(path):
            source._add(number, record)
        if not len(source):
            raise SourceError(f"{path}: holds no record; write one JSON object per line")
        return source

    def _add(self, number: int, record: Any) -> None:
        try:
            messages, images = _parse(record)
        except SourceError as error:
            raise SourceError(f"{self._name}:{number}: {error}") from None
        self._numbers.append(number)
        self._messages.append(messages)
        self._images.append([Path(self._folder, image) if isinstance(image, str) else image for image in images])

    def __len__(self) -> int:
        return len(self._messages)

    def sizes(self, index: int) -> list[Size]:
        """Sizes from the headers of the files."""
        return [image_io.read_size(image, self._limits) for image in self._images[index]]

    def messages(self, index: int) -> tuple[Message, ...]:
        """The conversation of a record."""
        return self._messages[index]

    def images(self, index: int) -> list[np.ndarray]:
        """The decoded images."""
        return [image_io.open_image(image, self._limits) for image in self._images[index]]

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


def _parse(record: Any) -> tuple[tuple[Message, ...], Sequence[Any]]:
    """Messages and images of a record; raises a SourceError that begins with the field."""
    _expect(isinstance(record, Mapping), "record", "an object", record)
    images = record.get("images", ())
    _expect(isinstance(images, list | tuple), "images", "a list", images)
    for number, image in enumerate(images):
        field = f"images[{number}]"
        _expect(isinstance(image, image_io.Source), field, "a path", image)
    messages = _entry(record, "messages")
    _expect(isinstance(messages, list | tuple), "messages", "a list", messages)
    if not messages:
        raise SourceError("messages: is empty")
    parsed, shown = [], 0
    for number, message in enumerate(messages):
        parsed.append(_parse_message(message, f"messages[{number}]", shown))
        shown += sum(isinstance(part, ImagePart) for part in parsed[-1].parts)
    if shown != len(images):
        raise SourceError(f"images: {len(images)} listed, but {shown} parts of type 'image' in the messages")
    return tuple(parsed), images


def _parse_message(message: Any, field: str, shown: int) -> Message:
    """The message; its images are numbered from `shown`."""
    _expect(isinstance(message, Mapping), field, "an object", message)
    role, content = (_entry(message, key, field) for key in ("role", "content"))
    if role not in ROLES:
        raise SourceError(f"{field}.role: {role!r:.80} is not one of {', '.join(ROLES)}")
    if isinstance(content, str):
        return Message(role, (_text(content, f"{field}.content"),))
    _expect(isinstance(content, list | tuple), f"{field}.content", "a string or a list of parts", content)
    parts: list[str | ImagePart] = []
    for number, part in enumerate(content):
        place = f"{field}.content[{number}]"
        _expect(isinstance(part, Mapping), place, "an object", part)
        kind = _entry(part, "type", place)
        if kind == "text":
            parts.append(_text(_entry(part, "text", place), f"{place}.text"))
        elif kind == "image" and role == "user":
            parts.append(ImagePart(shown))
            shown += 1
        elif kind == "image":
            raise SourceError(f"{place}: only the role 'user' can show images, not {role!r}")
        else:
            raise SourceError(f"{place}.type: {kind!r:.80} is not one of text, image")
    return Message(role, tuple(parts))


def _entry(mapping: Mapping[str, Any], key: str, field: str = "") -> Any:
    if key not in mapping:
        raise SourceError(f"{field}.{key}: missing".removeprefix("."))
    return mapping[key]


def _text(value: Any, field: str) -> str:
    _expect(isinstance(value, str), field, "a string", value)
    try:
        value.encode()
    except UnicodeEncodeError:  # "\ud83d" is JSON, but no tokenizer takes it
        raise SourceError(f"{field}: holds half of a surrogate pair; write the whole character") from None
    return value


_JSON_TYPES = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
_JSON_TYPES |= dict.fromkeys((int, float), "a number")


def _expect(condition: bool, field: str, expected: str, value: Any) -> None:
    if not condition:
        raise SourceError(f"{field}: expected {expected}, got {_JSON_TYPES.get(type(value), type(value).__name__)}")


@dataclasses.dataclass(frozen=True)
class RecordsOptions:
    """Options of the source "records" (`DataConfig.options`)."""

    path: str  # of a JSONL file


class SourceKind(NamedTuple):
    """A source that a `DataConfig` can name."""

    options: type  # a dataclass: what `DataConfig.options` must be
    open: Callable[[Any, ImageLimits], Source]  # from these options


# By the name that `DataConfig.source` uses; programs may add their own.
SOURCES: dict[str, SourceKind] = {
    "digit_pages": SourceKind(DigitPagesOptions, lambda options, limits: DigitPages(options)),
    "images": SourceKind(ImagesOptions, ImageFolder),
    "records": SourceKind(RecordsOptions, lambda options, limits: Records.from_jsonl(options.path, limits)),
}


def check_data(data: DataConfig, key: str = "data") -> Any:
    """The checked options of the source that a config names; nothing is opened.

    Args:
      data: source and options.
      key: where they stand, for errors: `config.train.stages[0].data`.

    Raises:
      ConfigError: an unknown source or option; the message holds the full key.
    """
    if data.source not in SOURCES:
        raise ConfigError(f"{key}.source: {data.source!r} is not one of {', '.join(SOURCES)}")
    return from_config_dict(data.options, SOURCES[data.source].options, f"{key}.options")


def make_source(data: DataConfig, limits: ImageLimits = ImageLimits(), key: str = "data") -> Source:
    """The source that a config names; `key` as in `check_data`.

    Raises:
      ConfigError: an unknown source or option.
      SourceError: a file of the source is unreadable or malformed.
    """
    options = check_data(data, key)
    return SOURCES[data.source].open(options, limits)
