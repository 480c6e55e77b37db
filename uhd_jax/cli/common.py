"""What several commands share: types of arguments, and how a result reaches its file."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uhd_jax.slicing.plan import Size

LARGEST = 2**31 - 1  # of numbers on the command line: what int32 holds


class UsageError(Exception):
    """The command line itself is wrong."""


def size(text: str) -> Size:
    """`HEIGHTxWIDTH` in pixels, e.g. 1344x896."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write HEIGHTxWIDTH, e.g. 1344x896")
    return Size(int(match[1]), int(match[2]))


def positive(text: str) -> int:
    """An integer from 1 to `LARGEST`."""
    if not text.isdecimal() or not 1 <= int(text) <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {LARGEST}")
    return int(text)


def not_negative(text: str) -> int:
    """An integer from 0 to `LARGEST`."""
    if not text.isdecimal() or int(text) > LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {LARGEST}")
    return int(text)


def number(text: str) -> float:
    """A finite number of at least 0."""
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")


def fraction(text: str) -> float:
    """A number above 0 and at most 1."""
    if not 0 < (value := number(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most 1")
    return value


def above_zero(text: str) -> float:
    """A finite number above 0."""
    if not (value := number(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def folder(text: str) -> Path:
    """A folder that is there or can be made."""
    if not text:  # which pathlib takes for the current folder
        raise argparse.ArgumentTypeError("'' is not the name of a folder")
    path = Path(text)
    there = next(path for path in (path, *path.parents) if path.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be a folder: {there} is a file")
    return path


def file_to_write(text: str) -> Path:
    """A file in a folder that is there. Known before the work begins, not when its result is lost."""
    path = Path(text)
    if not text or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: there is no folder {path.parent}; make it first")
    return path


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path that becomes `path` at the end: a result is whole or not there, never half.

    A link is followed. A device or pipe, such as /dev/stdout, is written to: replacing it would destroy it.
    """
    path = Path(path)
    in_place = path.exists() and not path.is_file()
    if not in_place:
        path = path.resolve()
    partial = path if in_place else path.with_name(f".{path.name}.partial")
    try:
        yield partial
        if not in_place:
            os.replace(partial, path)
    except OSError as error:
        if error.filename in (None, str(partial)):  # not a name that the user knows
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        if not in_place:
            with contextlib.suppress(OSError):
                partial.unlink()


def write_json(path: str | Path, value: Any) -> None:
    """Writes a value as a JSON file. A byte that is not UTF-8, as in the name of a file, becomes its JSON escape."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
