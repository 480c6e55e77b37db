"""Tar shards (WebDataset): the members `key.json` or `key.txt` and the images `key.jpg`, read in place.

Nothing is ever extracted. An index of each shard says where its members are; their names stay in the shard.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import zlib
from typing import Any

import numpy as np

from uhd_jax.config import ImageLimits
from uhd_jax.data.chat import Message
from uhd_jax.data.images import SUFFIXES
from uhd_jax.data.sources.conversation import TURNS, parse
from uhd_jax.data.sources.files import CHUNK, DataFile, find_files
from uhd_jax.data.sources.protocol import SourceError
from uhd_jax.data.sources.rows import FileOptions, RowSource
from uhd_jax.data.sources.stored import stored_index

_BLOCK = 512
_LONG_NAMES = 2**20  # bytes at most of a name, or of the properties in front of a member; more is damage
_IMAGE, _JSON, _TEXT, _OTHER_MEDIA = range(4)
_FILMS_AND_SOUNDS = (".avi", ".flac", ".m4a", ".mkv", ".mov", ".mp3", ".mp4", ".ogg", ".wav", ".webm")
_KINDS = dict.fromkeys(SUFFIXES, _IMAGE) | {".json": _JSON, ".txt": _TEXT}
_KINDS |= dict.fromkeys(_FILMS_AND_SOUNDS, _OTHER_MEDIA)


@dataclasses.dataclass(frozen=True)
class TarOptions:
    """Options of the source "tar"."""

    path: str  # a shard; or a folder or a pattern, whose shards are read in the order of their names
    question: str = ""  # what the user asks where a sample has a caption instead of a conversation


class TarShards(RowSource):
    """Samples of uncompressed tar files, members of one key after the other as WebDataset has them.

    A sample is the members whose names are alike up to the first dot of the file's name. `key.json` is a record in a
    form of `conversation`; its images are the members of the sample in the order in which they stand there, whatever it
    lists itself. `key.txt` is a caption; so is the field `caption` of a `key.json` that holds no conversation, as
    img2dataset writes both of them beside each other: then `key.txt` is the one that is taken.

    Raises:
      SourceError: no shard, one that is compressed, or one whose headers are damaged.
    """

    suffixes = (".tar",)

    def __init__(self, options: TarOptions, limits: ImageLimits = ImageLimits()):
        paths = find_files(options.path, *self.suffixes)
        super().__init__(FileOptions(options.path), limits)
        self._options = options
        self._shards = [DataFile(path) for path in paths]
        # Per member: the sample's number in its shard, what it is, where it starts and ends.
        # "members" was without films and sounds: what is stored under that name is not read.
        self._members = [stored_index(shard, "samples", 4, _find_members) for shard in self._shards]
        self._ends = np.cumsum([members[-1, 0] + 1 if len(members) else 0 for members in self._members])
        if not len(self):
            raise SourceError(f"{options.path}: holds no member named *.json, *.txt or like an image")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def where(self, index: int) -> str:
        """The shard and the sample in it, from 1."""
        shard, number = self._place(index)
        return f"{self._shards[shard].path}:{number + 1}"

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, int(index - (self._ends[shard - 1] if shard else 0))

    def _row(self, index: int) -> dict[str, Any]:
        shard, number = self._place(index)
        members = self._members[shard]
        low, high = np.searchsorted(members[:, 0], [number, number + 1])
        found: dict[int, list[tuple[int, int]]] = {_IMAGE: [], _JSON: [], _TEXT: [], _OTHER_MEDIA: []}
        for _, kind, start, end in members[low:high].tolist():
            found[kind].append((start, end))
        if found[_OTHER_MEDIA]:
            raise SourceError("holds a film or a sound; only texts and images are trained on; leave the sample out")
        large = [end - start for start, end in found[_IMAGE] if end - start > self._limits.max_bytes]
        if large:
            raise SourceError(
                f"an image of {large[0]} bytes, more than max_bytes={self._limits.max_bytes}; leave it out"
            )
        images = [self._shards[shard].read(*place) for place in found[_IMAGE]]
        if not found[_JSON] + found[_TEXT] or max(len(found[_JSON]), len(found[_TEXT])) > 1:
            raise SourceError(f"{len(found[_JSON])} members .json and {len(found[_TEXT])} .txt; a sample needs one")
        try:
            texts = {kind: self._text(shard, *found[kind]) for kind in (_JSON, _TEXT) if found[kind]}
            record = json.loads(texts[_JSON]) if _JSON in texts else {}
        except (ValueError, RecursionError) as error:
            raise SourceError(f"its text is not UTF-8 or not JSON ({error})") from None
        if not isinstance(record, dict):
            raise SourceError("record: expected an object")
        if not any(record.get(key) for key in TURNS):
            caption = texts.get(_TEXT, record.get("caption"))
            if isinstance(caption, str):
                record = record | _captioned(caption, self._options.question)
        return record | {"images": images}

    def _parse(self, index: int) -> tuple[tuple[Message, ...], list[Any]]:
        row = self._row(index)
        return parse(row, row["images"])

    def _text(self, shard: int, place: tuple[int, int]) -> str:
        return self._shards[shard].read(*place).decode("utf-8-sig")


def _captioned(caption: str, question: str) -> dict[str, Any]:
    asked = [{"type": "image"}, *([{"type": "text", "text": question}] if question else [])]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": caption}]}


def _find_members(file: DataFile) -> np.ndarray:
    """The members of a shard that are images, texts, films or sounds: int64[N, 4], of each the number of its sample,
    its kind, and where it starts and ends."""
    members: list[tuple[int, int, int, int]] = []
    place, sample, last_key = 0, -1, ""
    name_of_next, size_of_next = "", -1
    reader = _Blocks(file)
    while place < file.size:
        header = reader.block(place)
        if not header.strip(b"\0"):
            break
        name, size, kind = _header(file, header, place)
        start = place + _BLOCK
        size = size_of_next if size_of_next >= 0 and kind not in b"xgLK" else size
        place = start + -(-size // _BLOCK) * _BLOCK
        if start + size > file.size:
            raise SourceError(
                f"{file.path}: is cut off at byte {file.size}, inside the member {name!r:.80}; copy it again"
            )
        if kind in b"LxKg":
            if size > _LONG_NAMES:
                raise SourceError(f"{file.path}: a header of {size} bytes at byte {start}; the file is damaged")
            content = file.read(start, start + size)
            if kind in b"L":
                name_of_next = content.rstrip(b"\0").decode("utf-8", "replace")
            elif kind in b"x":
                properties = _properties(content)
                name_of_next = properties.get("path", name_of_next)
                size_of_next = int(properties["size"]) if re.fullmatch(r"\d{1,18}", properties.get("size", "")) else -1
                if any(key.startswith("GNU.sparse") for key in properties):
                    raise SourceError(f"{file.path}: has sparse files; pack it again without --sparse")
            continue
        name, name_of_next, size_of_next = name_of_next or name, "", -1
        if kind == b"S":
            raise SourceError(f"{file.path}: has sparse files; pack it again without --sparse")
        base = os.path.basename(name)
        if kind not in (b"0", b"\0", b"7") or base.startswith("."):
            continue  # folders, links and devices are no samples
        key = os.path.join(os.path.dirname(name), base.partition(".")[0])
        what = _KINDS.get(os.path.splitext(base)[1].lower())
        if what is None:
            continue
        sample, last_key = (sample, key) if key == last_key and sample >= 0 else (sample + 1, key)
        members.append((sample, what, start, start + size))
    return np.array(members, np.int64).reshape(-1, 4)


class _Blocks:
    """Headers of a file; what comes with one in the same read is kept, because the next is often near."""

    def __init__(self, file: DataFile):
        self._file, self._start, self._bytes = file, 0, b""
        self._ahead = CHUNK if "://" in file.path else 16 * _BLOCK

    def block(self, place: int) -> bytes:
        """The 512 bytes at a place."""
        if not self._start <= place <= self._start + len(self._bytes) - _BLOCK:
            self._start, self._bytes = place, self._file.read(place, min(place + self._ahead, self._file.size))
        return self._bytes[place - self._start : place - self._start + _BLOCK]


def _header(file: DataFile, block: bytes, place: int) -> tuple[str, int, bytes]:
    """Name, size and type of a member; the checksum is tested."""
    try:
        if len(block) < _BLOCK:
            raise ValueError
        stated = int(block[148:156].strip(b" \0") or b"0", 8)
        size_field = block[124:136]
        size = int.from_bytes(size_field[1:]) if size_field[0] == 0x80 else int(size_field.strip(b" \0") or b"0", 8)
    except ValueError:
        stated = size = -1
    # The sum of all bytes, those of the sum itself as blanks; Adler's first half is the same sum, modulo a prime.
    summed = (zlib.adler32(block) & 0xFFFF) - 1 - sum(block[148:156]) + 8 * ord(" ")
    if size < 0 or (summed - stated) % 65521:
        compressed = " (compressed? unpack it: .tar, not .tar.gz)" if place == 0 else ""
        raise SourceError(f"{file.path}: no tar header at byte {place}{compressed}; make or copy the shard again")
    name = block[:100].rstrip(b"\0")
    if block[257:263] == b"ustar\0" and block[345] != 0:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return name.partition(b"\0")[0].decode("utf-8", "replace"), size, block[156:157]


def _properties(content: bytes) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE` of a pax header; damaged ones end the list."""
    properties = {}
    while content:
        length, _, _ = content.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(content):
            break
        key, _, value = content[len(length) + 1 : int(length)].rstrip(b"\n").partition(b"=")
        properties[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        content = content[int(length) :]
    return properties
