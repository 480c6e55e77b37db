"""A record in any of the forms that people have, to messages and images (spec: ecosystem section 1).

    messages, images                OpenAI's form and ms-swift's: `{"role": .., "content": string or parts}`
    conversations, image or images  LLaVA, ShareGPT: `{"from": "human" | "gpt", "value": ..}`; MiniCPM-V: role, content
    texts, images                   FineVision: `{"user": .., "assistant": ..}`

In a string, `<image>` in a user's turn stands for the next image (with MiniCPM-V's `{"<image_00>": path}` its own names
do). Where no turn has a mark, the images stand before the first question. Anything else that looks like a mark is text:
the tokenizer never makes a mark out of a text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from uhd_jax.data.chat import ROLES, ImagePart, Message
from uhd_jax.data.sources.protocol import SourceError
from uhd_jax.slicing import image_io

IMAGE_MARK = "<image>"
TURNS = ("messages", "conversations", "texts")  # the field that holds the conversation; the first that says something
OTHER_MEDIA = ("video", "videos", "audio", "audios")  # fields of records that are not for this model
_MARK = re.compile(f"({IMAGE_MARK})")
_ROLES_OF = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
_SAME_ROLES = dict(zip(ROLES, ROLES, strict=True))
_Turn = tuple[str, Any, str]  # role, content, field of the content for errors


def parse(record: Any, images: Sequence[bytes] | None = None) -> tuple[tuple[Message, ...], list[Any]]:
    """Messages and images of a record. Keys that no form has are ignored.

    Args:
      record: of one of the forms above.
      images: those that came with the record; what it says of files itself is then ignored.

    Returns:
      The messages, which show every image once and in order; and the images, as `image_io.Source`.

    Raises:
      SourceError: the record is of no form, or does not show its images; the message begins with the field.
    """
    _expect(isinstance(record, Mapping), "record", "an object", record)
    for key in OTHER_MEDIA:
        if not _left_out(record.get(key)):
            raise SourceError(f"{key}: only texts and images are trained on; leave the record out")
    listed, names = _images(record) if images is None else (list(images), ())
    shown: list[int] = []
    brought: list[Any] | None = [] if images is None else None  # images that parts name themselves
    has_parts = False
    messages = []
    for role, content, field in _turns(record):
        if isinstance(content, str):
            text = _text(content, field)
            parts = _split(text, names, shown) if role == "user" else [text]
        else:
            has_parts = True
            parts = _parts(content, role, field, shown, brought)
        messages.append(Message(role, tuple(parts)))
    if brought:
        if len(brought) != len(shown):
            raise SourceError("images: some are named by parts of the messages, others are not; name all in one way")
        if listed and not _same(listed, brought):
            raise SourceError("images: named by parts of the messages too, and not the same ones; name them once")
        listed = brought
    if listed and not shown and not has_parts:
        messages = _shown_first(messages, len(listed))
    elif sorted(shown) != list(range(len(listed))):
        kind = "parts of type 'image' in the messages" if has_parts else f"marks {names[0] if names else IMAGE_MARK!r}"
        if len(shown) == len(listed):
            kind += f", which show the images {shown}; show each once"
        raise SourceError(f"images: {len(listed)} listed, but {len(shown)} {kind}")
    if shown != sorted(shown):
        listed = [listed[index] for index in shown]
        number = {index: place for place, index in enumerate(shown)}
        messages = [
            Message(role, tuple(ImagePart(number[p.index]) if isinstance(p, ImagePart) else p for p in parts))
            for role, parts in messages
        ]
    return tuple(messages), listed


def _images(record: Mapping[str, Any]) -> tuple[list[Any], tuple[str, ...]]:
    """The images of a record, and the marks that stand for them if they have names."""
    key = "images" if _left_out(record.get("image")) else "image"
    value = record.get(key)
    if _left_out(value):
        return [], ()
    others = record.get("images")
    if key == "image" and not (_left_out(others) or _same(others, value) or _same(others, [value])):
        raise SourceError("image, images: both name images, and not the same ones; leave one of the two empty")
    if isinstance(value, Mapping) and not _is_file(value):
        for name in value:
            if not (isinstance(name, str) and re.fullmatch("<.+>", name)):  # in a text, "a" is everywhere
                raise SourceError(
                    f"{key}: {name!r:.80} is no mark like '<image_00>', as which images of an object are named in the "
                    "texts; give a list of paths, or name them so"
                )
        return [_image(one, f"{key}[{name!r:.80}]") for name, one in value.items()], tuple(value)
    if key == "image" and not isinstance(value, list | tuple):
        return [_image(value, key)], ()
    _expect(isinstance(value, list | tuple), key, "a list", value)
    return [_image(one, f"{key}[{number}]") for number, one in enumerate(value)], ()


def _left_out(value: Any) -> bool:
    """Whether a field is null or empty: so tables whose other rows have it are written as JSON."""
    return value is None or (isinstance(value, str | list | tuple | Mapping) and not value)


def _same(one: Any, other: Any) -> bool:
    """Whether two fields name the same images; of decoded ones, whether they are the same objects."""
    try:
        return bool(one == other)
    except ValueError:  # of arrays
        return False


def _is_file(value: Mapping[str, Any]) -> bool:
    """Whether this is an image as `datasets` writes it: bytes, or a path, or both."""
    return bool(value) and set(value) <= {"bytes", "path"}


def _image(value: Any, field: str) -> Any:
    if isinstance(value, Mapping) and _is_file(value):
        data, path = value.get("bytes"), value.get("path")
        value = path if data is None else data
        _expect(isinstance(value, str if data is None else bytes), field, "bytes or a path", value)
    _expect(isinstance(value, image_io.Source), field, "a path", value)
    return _text(value, field) if isinstance(value, str) else value


def _turns(record: Mapping[str, Any]) -> list[_Turn]:
    present = [key for key in TURNS if key in record]
    key = next((key for key in present if not _left_out(record[key])), present[0] if present else "")
    if not key:
        raise SourceError("messages: missing, and neither conversations nor texts instead")
    turns = record[key]
    _expect(isinstance(turns, list | tuple), key, "a list", turns)
    if not turns:
        raise SourceError(f"{key}: is empty")
    found: list[_Turn] = []
    if "system" in record and record["system"]:
        found.append(("system", _text(record["system"], "system"), "system"))
    for number, turn in enumerate(turns):
        field = f"{key}[{number}]"
        _expect(isinstance(turn, Mapping), field, "an object", turn)
        if key == "texts":
            for role in ("user", "assistant"):
                found.append((role, _text(_entry(turn, role, field), f"{field}.{role}"), f"{field}.{role}"))
            continue
        names, said = (_ROLES_OF, ("from", "value")) if "from" in turn else (_SAME_ROLES, ("role", "content"))
        role, content = (_entry(turn, entry, field) for entry in said)
        if not isinstance(role, str) or role not in names:
            raise SourceError(f"{field}.{said[0]}: {role!r:.80} is not one of {', '.join(names)}")
        _expect(isinstance(content, str | list | tuple), f"{field}.{said[1]}", "a string or a list of parts", content)
        found.append((names[role], content, f"{field}.{said[1]}"))
    return found


def _split(text: str, names: Sequence[str], shown: list[int]) -> list[str | ImagePart]:
    """The parts of a user's text; `shown` grows by the images that its marks stand for."""
    numbers = {name: index for index, name in enumerate(names)}
    marks = re.compile("(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + ")") if names else _MARK
    parts: list[str | ImagePart] = []
    for place, piece in enumerate(marks.split(text)):
        if place % 2:
            shown.append(numbers.get(piece, len(shown)))
            parts.append(ImagePart(shown[-1]))
        elif piece:
            parts.append(piece)
    return parts


def _parts(
    content: Sequence[Any], role: str, field: str, shown: list[int], brought: list[Any] | None
) -> list[str | ImagePart]:
    """The parts of a turn; `shown` grows by the images that they show, `brought` by those that they name themselves,
    unless it is None."""
    parts: list[str | ImagePart] = []
    for number, part in enumerate(content):
        place = f"{field}[{number}]"
        _expect(isinstance(part, Mapping), place, "an object", part)
        kind = _entry(part, "type", place)
        if kind == "text":
            parts.append(_text(_entry(part, "text", place), f"{place}.text"))
        elif kind in ("image", "image_url") and role == "user":
            if brought is not None:
                brought += _named_by(part, place)
            shown.append(len(shown))
            parts.append(ImagePart(shown[-1]))
        elif kind in ("image", "image_url"):
            raise SourceError(f"{place}: only the role 'user' can show images, not {role!r}")
        else:
            raise SourceError(f"{place}.type: {kind!r:.80} is not one of text, image, image_url")
    return parts


def _named_by(part: Mapping[str, Any], place: str) -> list[Any]:
    """The image that a part names itself; none where it stands for the next of the record's."""
    if part["type"] == "image_url":
        value = _entry(part, "image_url", place)
        return [_image(_entry(value, "url", f"{place}.image_url") if isinstance(value, Mapping) else value, place)]
    key = next((key for key in ("image", "path", "url") if not _left_out(part.get(key))), "")
    return [_image(part[key], f"{place}.{key}")] if key else []


def _shown_first(messages: Sequence[Message], images: int) -> list[Message]:
    """The messages with all images before what the user says first."""
    first = next((number for number, message in enumerate(messages) if message.role == "user"), None)
    if first is None:
        raise SourceError(f"images: {images} listed, but no turn of the user's shows them")
    changed = list(messages)
    changed[first] = Message("user", (*map(ImagePart, range(images)), *messages[first].parts))
    return changed


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
