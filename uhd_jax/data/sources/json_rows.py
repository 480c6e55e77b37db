"""Where the rows of a JSON file are: lines, or the elements of one large array, found without parsing them."""

from __future__ import annotations

import codecs
import json
from typing import Any

import numpy as np

from uhd_jax.data.sources.files import CHUNK, DataFile
from uhd_jax.data.sources.protocol import SourceError

_BOM = codecs.BOM_UTF8
_SHORT = 16  # bytes of a line that may be blank; longer ones are rows
_OTHER, _QUOTE, _BACKSLASH, _OPEN, _CLOSE, _COMMA = range(6)
_KINDS = np.zeros(256, np.uint8)
for _kind, _signs in ((_QUOTE, b'"'), (_BACKSLASH, b"\\"), (_OPEN, b"[{"), (_CLOSE, b"]}"), (_COMMA, b",")):
    _KINDS[list(_signs)] = _kind
_DEPTH = np.array([0, 0, 0, 1, -1, 0], np.int8)


def find_rows(file: DataFile) -> np.ndarray:
    """Start and end in bytes of every row, and its number from 1: of the line, or of the element of the array.

    Returns:
      int64[N, 3].

    Raises:
      SourceError: the file holds no row, or its array does not end.
    """
    beginning = file.read(0, 4096).removeprefix(_BOM).lstrip()
    rows = _elements(file) if beginning.startswith(b"[") else _lines(file)
    if not len(rows):
        raise SourceError(f"{file.path}: holds no record; write an array of JSON objects, or one per line")
    return rows


def read_row(file: DataFile, start: int, end: int) -> Any:
    """The value of a row. Raises `SourceError` without the place."""
    try:
        return json.loads(file.read(start, end).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SourceError(f"not UTF-8 ({error.reason} at its byte {error.start + 1}); save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        place = f"{error.msg}, its character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
        raise SourceError(f"not JSON ({place})") from None


def _lines(file: DataFile) -> np.ndarray:
    offset, found = 0, []
    for chunk in file.chunks():
        found.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + offset)
        offset += len(chunk)
    ends = np.concatenate([*found, [offset]])
    starts = np.concatenate([[0], ends[:-1] + 1])
    rows = np.stack([starts, ends, np.arange(1, len(ends) + 1)], axis=1)
    short = np.flatnonzero(ends - starts <= _SHORT)
    blank = [line for line in short if not file.read(*rows[line, :2].tolist()).removeprefix(_BOM).strip()]
    return np.delete(rows, blank, axis=0)


def _elements(file: DataFile) -> np.ndarray:
    """The elements of the array that the file is: what stands between the commas at depth 1."""
    inside, escaped, depth, offset = False, False, 0, 0
    first, last, surplus = -1, -1, False  # where the array's content starts, where it ends, whether more follows
    found: list[np.ndarray] = []
    for chunk in file.chunks():
        codes = _KINDS[np.frombuffer(chunk, np.uint8)]
        places = np.flatnonzero(codes)
        kinds = codes[places]
        quotes, escaped = _quotes(places, kinds, escaped, len(chunk))
        within = np.logical_xor.accumulate(np.concatenate([[inside], quotes]))
        inside = bool(within[-1])
        outside = ~within[1:]
        depths = depth + np.cumsum(np.where(outside, _DEPTH[kinds], 0), dtype=np.int64)
        if len(places):
            surplus = surplus or last >= 0
            first = offset + int(places[0]) + 1 if first < 0 else first
            closed = np.flatnonzero(depths <= 0)
            if last < 0 and len(closed):
                last, surplus = offset + int(places[closed[0]]), closed[0] + 1 < len(places)
            depth = int(depths[-1])
        found.append(places[outside & (kinds == _COMMA) & (depths == 1)] + offset)
        offset += len(chunk)
    commas = np.concatenate(found)
    if last < 0 or surplus or file.read(last + 1, offset).strip():
        raise SourceError(f"{file.path}: {_damage(file, first, commas)}")
    if not len(commas) and not file.read(first, last).strip():
        return np.zeros((0, 3), np.int64)
    starts, ends = np.concatenate([[first], commas + 1]), np.concatenate([commas, [last]])
    return np.stack([starts, ends, np.arange(1, len(starts) + 1)], axis=1)


def _quotes(places: np.ndarray, kinds: np.ndarray, escaped: bool, length: int) -> tuple[np.ndarray, bool]:
    """Which of the signs are quotes that begin or end a text, and whether the sign after the chunk is escaped.

    Args:
      places: int64[N], of the signs in the chunk.
      kinds: uint8[N].
      escaped: whether the first sign of the chunk is.
      length: of the chunk.
    """
    quotes = kinds == _QUOTE
    slashes = np.flatnonzero(kinds == _BACKSLASH)
    at = places[slashes]
    new = np.diff(at, prepend=-2) > 1
    run = np.maximum.accumulate(np.where(new, np.arange(len(at)), 0))  # the first of each run of backslashes
    count = at - at[run] + (escaped & (at[run] == 0))
    escaping = count % 2 == 0
    following = slashes[escaping] + 1
    following = following[following < len(places)]
    quotes[following[places[following] == places[following - 1] + 1]] = False
    if escaped and len(places) and places[0] == 0:
        quotes[0] = False
    if len(at) and at[-1] == length - 1:
        return quotes, bool(escaping[-1])
    return quotes, False


def _damage(file: DataFile, first: int, commas: np.ndarray) -> str:
    """What is wrong with an array, by the first element that is no JSON."""
    starts, ends = [first, *(commas + 1).tolist()], [*commas.tolist(), file.size]
    for number, (start, end) in enumerate(zip(starts, ends, strict=True), 1):
        try:
            read_row(file, start, min(end, start + CHUNK))
        except SourceError as error:
            return f"damaged or cut off: element {number} of its array, at byte {start + 1}, is {error}"
    return f"cut off after element {len(starts)} of its array"
