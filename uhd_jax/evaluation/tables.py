"""Rows of the files that benchmarks are published as: JSON, JSON lines, TSV with pictures, parquet, MME's folders.

A row is read when it is asked for; opening reads at most where the rows of a file begin.
"""

from __future__ import annotations

import csv
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from uhd_jax.data.sources.arrow import arrow_file, library, row_of
from uhd_jax.data.sources.files import DataFile, find_files
from uhd_jax.data.sources.json_rows import find_rows, read_row
from uhd_jax.data.sources.protocol import SourceError

Row = dict[str, Any]

KINDS = (".json", ".jsonl", ".tsv", ".csv", ".parquet")
KEY = "_key"  # of a row that stood in an object under this key: GQA's and ScienceQA's question numbers
_LISTS = ("data", "questions", "annotations")  # keys under which files keep their rows
_CELL_LIMIT = 1 << 30  # characters; a picture in base64 is one cell


class Table(Protocol):
    """Rows of one file."""

    path: str

    def __len__(self) -> int:
        """Number of rows."""

    def row(self, index: int) -> Row:
        """One of them. Raises `SourceError` without the place."""

    def number(self, index: int) -> int:
        """What people count: the line of the file, or the row, from 1."""


class Tables:
    """The rows of several files one after the other.

    Args:
      paths: files; folders, of which all files of a known kind are taken in the order of their names; patterns. MME's
        folder of folders of texts is one table.

    Raises:
      SourceError: nothing there, of an unknown kind, damaged, or without rows.
    """

    def __init__(self, paths: Sequence[str | os.PathLike]):
        self._tables = [_open(path) for given in paths for path in _files(os.fspath(given))]
        self._ends = np.cumsum([len(table) for table in self._tables])
        if not len(self):
            raise SourceError(f"{', '.join(map(str, paths))}: holds no row")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _place(self, index: int) -> tuple[Table, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        table = self._tables[number]
        return table, int(index - self._ends[number] + len(table))

    def row(self, index: int) -> Row:
        """A row as an object. Raises `SourceError` with its place."""
        table, own = self._place(index)
        try:
            row = table.row(own)
        except SourceError as error:
            raise SourceError(f"{self.where(index)}: {error}") from None
        if not isinstance(row, dict):
            raise SourceError(f"{self.where(index)}: a row must be an object, not {type(row).__name__}")
        return row

    def where(self, index: int) -> str:
        """The file and the row in it."""
        table, own = self._place(index)
        return f"{table.path}:{table.number(own)}"

    def path(self, index: int) -> str:
        """The file of a row."""
        return self._place(index)[0].path


def _files(path: str) -> list[str]:
    if os.path.isdir(path) and not _is_mme(path):
        found = [file for kind in KINDS for file in _found(path, kind)]
        if not found:
            raise SourceError(f"{path}: has no files of a known kind ({', '.join(KINDS)})")
        return sorted(found)
    return [path] if os.path.exists(path) else find_files(path, "")


def _found(folder: str, kind: str) -> list[str]:
    return [os.fspath(path) for path in Path(folder).rglob(f"*{kind}")]


def _open(path: str) -> Table:
    if os.path.isdir(path):
        return _MmeFolder(path)
    kind = os.path.splitext(path)[1].lower()
    opener = {".json": _open_json, ".jsonl": _JsonRows, ".tsv": _Separated, ".csv": _Separated, ".parquet": _Parquet}
    if kind not in opener:
        raise SourceError(f"{path}: of an unknown kind {kind!r}; known: {', '.join(KINDS)}")
    return opener[kind](path)


def _open_json(path: str) -> Table:
    """An array, lines, or an object that holds the rows under one key or as its values."""
    file = DataFile(path)
    beginning = file.read(0, 4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if not beginning.startswith(b"{"):
        return _JsonRows(path)
    first = file.read(0, file.size).split(b"\n", 1)
    try:
        json.loads(first[0])
        if len(first) > 1 and first[1].strip():
            return _JsonRows(path)  # lines, though the name says otherwise; POPE's files are such
    except ValueError:
        pass  # an object over several lines
    try:
        content = json.loads(file.read(0, file.size).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not JSON ({error})") from None
    for key in _LISTS:
        if isinstance(content.get(key), list):
            return _Given(path, content[key])
    if content and all(isinstance(value, dict) for value in content.values()):
        return _Given(path, [value | {KEY: key} for key, value in content.items()])
    if all(isinstance(value, str | int | float | list) for value in content.values()) and "question" in content:
        return _JsonRows(path)  # one line, one row
    raise SourceError(f"{path}: is an object without a list {', '.join(_LISTS)}, and not one of objects")


class _Given:
    def __init__(self, path: str, rows: list[Any]):
        self.path, self._rows = path, rows

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Row:
        return self._rows[index]

    def number(self, index: int) -> int:
        return index + 1


class _JsonRows:
    def __init__(self, path: str):
        self.path, self._file = path, DataFile(path)
        self._rows = find_rows(self._file)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Row:
        return read_row(self._file, *self._rows[index, :2].tolist())

    def number(self, index: int) -> int:
        return int(self._rows[index, 2])


class _Separated:
    """TSV or CSV with a header; a cell may hold line breaks in quotes, and a picture of any size."""

    def __init__(self, path: str):
        self.path, self._file = path, DataFile(path)
        self._separator = "," if path.lower().endswith(".csv") else "\t"
        self._starts: list[int] = []
        with self._file.open() as file:
            taken = [0]
            reader = self._reader(_counted(file, taken))
            try:
                self._header = next(reader, [])
                start = taken[0]
                for cells in reader:
                    if cells:
                        self._starts.append(start)
                    start = taken[0]
            except (csv.Error, UnicodeDecodeError) as error:
                raise SourceError(f"{path}: not a readable table ({error})") from None
        self._end = taken[0]

    def _reader(self, lines: Iterator[str]) -> Iterator[list[str]]:
        csv.field_size_limit(_CELL_LIMIT)
        return csv.reader(lines, delimiter=self._separator)

    def __len__(self) -> int:
        return len(self._starts)

    def row(self, index: int) -> Row:
        end = self._starts[index + 1] if index + 1 < len(self._starts) else self._end
        text = self._file.read(self._starts[index], end).decode("utf-8")
        cells = next(self._reader(iter(text.splitlines(keepends=True))))
        if len(cells) != len(self._header):
            raise SourceError(f"has {len(cells)} cells, the header {len(self._header)}; is the file cut off?")
        return {name: cell for name, cell in zip(self._header, cells, strict=True) if cell not in ("", "nan")}

    def number(self, index: int) -> int:
        return index + 1


def _counted(file: BinaryIO, taken: list[int]) -> Iterator[str]:
    """Lines, and in `taken` the bytes given out so far."""
    for line in file:
        taken[0] += len(line)
        yield line.decode("utf-8-sig" if taken[0] == len(line) else "utf-8")


class _Parquet:
    """Rows of a parquet file, of which one group at a time is in memory."""

    def __init__(self, path: str):
        self.path = path
        with arrow_file(path, "parquet") as file:
            self._footer = library(path).parquet.ParquetFile(file).metadata
        groups = range(self._footer.num_row_groups)
        self._ends = np.cumsum([self._footer.row_group(group).num_rows for group in groups])
        self._group = functools.lru_cache(maxsize=1)(self._read_group)

    def _read_group(self, group: int) -> Any:
        with arrow_file(self.path, "parquet") as file:
            return library(self.path).parquet.ParquetFile(file, metadata=self._footer).read_row_group(group)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def row(self, index: int) -> Row:
        group = int(np.searchsorted(self._ends, index, side="right"))
        table = self._group(group)
        return row_of(table, int(index - self._ends[group] + table.num_rows))

    def number(self, index: int) -> int:
        return index + 1


def _is_mme(folder: str) -> bool:
    from uhd_jax.evaluation.metrics.yes_no import COGNITION, PERCEPTION

    return any(os.path.isdir(os.path.join(folder, name)) for name in (*PERCEPTION, *COGNITION))


class _MmeFolder:
    """MME as published: a folder of each category, in it (or in `questions_answers_YN`) a text of each image with two
    lines "question TAB answer"; the image has the same name, beside it or in `images`."""

    def __init__(self, folder: str):
        self.path = folder
        self._lines: list[tuple[str, Path, int]] = []
        for category in sorted(os.listdir(folder)):
            for text in sorted(Path(folder, category).rglob("*.txt")):
                lines = text.read_text(encoding="utf-8").splitlines()
                self._lines += [(category, text, number) for number, line in enumerate(lines) if line.strip()]

    def __len__(self) -> int:
        return len(self._lines)

    def row(self, index: int) -> Row:
        category, text, number = self._lines[index]
        line = text.read_text(encoding="utf-8").splitlines()[number]
        question, tab, answer = line.rpartition("\t")
        if not tab:
            raise SourceError(f"{text.name}: line {number + 1} is not a question, a tab and an answer")
        folders = (text.parent, text.parent.parent / "images", text.parent / "images")
        places = [folder / f"{text.stem}{kind}" for folder in folders for kind in (".jpg", ".png", ".jpeg")]
        image = next((place for place in places if place.exists()), places[0])
        name = os.path.relpath(image, self.path)
        return {
            "index": f"{category}/{text.stem}/{number + 1}",
            "question": question,
            "answer": answer,
            "category": category,
            "image": name,
        }

    def number(self, index: int) -> int:
        return index + 1


def by_key(paths: Sequence[str | os.PathLike], key: str) -> Mapping[str, Row]:
    """All rows of files by the value of a key, for annotations that stand apart from their questions.

    Raises:
      SourceError: as `Tables`, or a row lacks the key.
    """
    tables, found = Tables(paths), {}
    for index in range(len(tables)):
        row = tables.row(index)
        if key not in row:
            raise SourceError(f"{tables.where(index)}: has no {key!r}, by which annotations are found")
        found[str(row[key])] = row
    return found
