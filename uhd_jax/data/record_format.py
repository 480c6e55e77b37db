"""A sample as one record of an ArrayRecord file: its conversation, and the files of its images as they were.

    4 bytes   b"UHD1"
    4 bytes   H, length of the header, little endian
    H bytes   header: JSON in UTF-8
    the rest  the files of the images, one after the other

The header is `{"messages": [{"role": .., "content": [..]}, ..], "images": [bytes of the first file, ..], "where": ..}`.
A part of a content is `{"type": "text", "text": ..}`, `{"type": "image"}` or `{"type": "video", "pictures": ..}`;
images and pictures are numbered in the order in which they stand there. `where` is the place in the source that the
sample was packed from, for messages.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from uhd_jax.data.chat import ROLES, ImagePart, Message, VideoPart

_MAGIC = b"UHD1"
_START = struct.Struct("<4sI")
_PICTURES = 2**16  # at most in a video; more is damage


class RecordError(ValueError):
    """Bytes are no record of this form, or a sample cannot become one; the message names the field."""


class PackedSample(NamedTuple):
    """What a record holds."""

    messages: tuple[Message, ...]
    images: tuple[bytes, ...]  # files as they were: JPEG, PNG, ..
    where: str  # in the source it was packed from: `train.jsonl:17`


def encode(sample: PackedSample) -> bytes:
    """The record of a sample.

    Raises:
      RecordError: the messages do not show every image once, in order, or hold half of a surrogate pair.
    """
    parts = [part for message in sample.messages for part in message.parts if not isinstance(part, str)]
    shown = list(itertools.chain.from_iterable(map(_shown, parts)))
    if shown != list(range(len(sample.images))):
        raise RecordError(f"messages show the images {shown}, but there are {len(sample.images)}; show each once")
    header = {
        "messages": [
            {"role": message.role, "content": [_part_to_json(part) for part in message.parts]}
            for message in sample.messages
        ],
        "images": [len(image) for image in sample.images],
        "where": sample.where,
    }
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # a name of a file may hold such halves; a text must not
        header["where"] = sample.where.encode("utf-8", "backslashreplace").decode()
        try:
            text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        except UnicodeEncodeError:
            raise RecordError("messages: hold half of a surrogate pair; write the whole character") from None
    return b"".join((_START.pack(_MAGIC, len(text)), text, *sample.images))


def decode(record: bytes) -> PackedSample:
    """The sample of a record; the images are not looked at.

    Raises:
      RecordError: the bytes are no whole record.
    """
    header, start = _header(record)
    lengths = _field(header, "images", list)
    if not all(type(length) is int and length >= 0 for length in lengths):
        raise RecordError("images: expected lengths in bytes")
    ends = list(itertools.accumulate(lengths, initial=start))
    if ends[-1] != len(record):
        raise RecordError(f"images: files of {sum(lengths)} bytes announced, {len(record) - start} bytes there")
    messages, shown = _messages(_field(header, "messages", list))
    if shown != len(lengths):
        raise RecordError(f"images: {len(lengths)} files, but the messages show {shown}")
    images = tuple(bytes(record[low:high]) for low, high in itertools.pairwise(ends))
    return PackedSample(messages, images, _field(header, "where", str))


def _header(record: bytes) -> tuple[Mapping[str, Any], int]:
    """The header's object, and where the images start."""
    if len(record) < _START.size:
        raise RecordError(f"record: {len(record)} bytes, too short; pack the data again")
    magic, length = _START.unpack_from(record)
    if magic != _MAGIC:
        raise RecordError("record: not written by `uhd-jax data pack`, or damaged; pack the data again")
    end = _START.size + length
    if end > len(record):
        raise RecordError("record: cut off inside its header; pack the data again")
    try:
        header = json.loads(bytes(record[_START.size : end]).decode())
    except (ValueError, RecursionError) as error:
        raise RecordError(f"record: damaged header ({error}); pack the data again") from None
    if not isinstance(header, dict):
        raise RecordError("record: the header is not an object; pack the data again")
    return header, end


def _messages(values: Sequence[Any]) -> tuple[tuple[Message, ...], int]:
    """The messages, and how many images they show."""
    messages, shown = [], 0
    for number, value in enumerate(values):
        place = f"messages[{number}]"
        if not isinstance(value, dict):
            raise RecordError(f"{place}: expected an object")
        role = _field(value, "role", str, place)
        if role not in ROLES:
            raise RecordError(f"{place}.role: {role!r:.80} is not one of {', '.join(ROLES)}")
        parts: list[str | ImagePart | VideoPart] = []
        for index, part in enumerate(_field(value, "content", list, place)):
            parts.append(_part_from_json(part, shown, f"{place}.content[{index}]"))
            shown += len(_shown(parts[-1]))
        messages.append(Message(role, tuple(parts)))
    return tuple(messages), shown


def _part_to_json(part: str | ImagePart | VideoPart) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image"} if isinstance(part, ImagePart) else {"type": "video", "pictures": part.pictures}


def _part_from_json(value: Any, shown: int, place: str) -> str | ImagePart | VideoPart:
    if not isinstance(value, dict):
        raise RecordError(f"{place}: expected an object")
    match _field(value, "type", str, place):
        case "text":
            return _field(value, "text", str, place)
        case "image":
            return ImagePart(shown)
        case "video":
            pictures = _field(value, "pictures", int, place)
            if not 0 < pictures <= _PICTURES:
                raise RecordError(f"{place}.pictures: {pictures} is not from 1 to {_PICTURES}")
            return VideoPart(shown, pictures)
        case kind:
            raise RecordError(f"{place}.type: {kind!r:.80} is not one of text, image, video")


def _shown(part: str | ImagePart | VideoPart) -> range:
    """Numbers of the images that a part shows."""
    if isinstance(part, str):
        return range(0)
    first, count = (part.index, 1) if isinstance(part, ImagePart) else part
    return range(first, first + count)


def _field(value: Mapping[str, Any], key: str, kind: type, place: str = "") -> Any:
    name = f"{place}.{key}".removeprefix(".")
    if key not in value:
        raise RecordError(f"{name}: missing")
    if type(value[key]) is not kind:
        raise RecordError(f"{name}: expected {kind.__name__}, got {type(value[key]).__name__}")
    if kind is str:
        try:
            value[key].encode()
        except UnicodeEncodeError:
            raise RecordError(f"{name}: holds half of a surrogate pair") from None
    return value[key]
