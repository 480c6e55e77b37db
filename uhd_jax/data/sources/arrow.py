"""Datasets of Hugging Face's `datasets` on disk (`save_to_disk`), and what they share with parquet files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from uhd_jax.config import ImageLimits
from uhd_jax.data.sources.conversation import OTHER_MEDIA, TURNS
from uhd_jax.data.sources.files import DataFile, exists, needs_library
from uhd_jax.data.sources.local_copy import local_copy
from uhd_jax.data.sources.protocol import SourceError
from uhd_jax.data.sources.rows import FileOptions, RowSource

COLUMNS = (*TURNS, "system", "image", "images", *OTHER_MEDIA)  # all that `conversation` knows


@dataclasses.dataclass(frozen=True)
class ArrowOptions(FileOptions):
    """Options of the source "arrow": `path` is a folder of `Dataset.save_to_disk`, or of one split."""


class ArrowDataset(RowSource):
    """Rows of a dataset on disk, mapped into memory: nothing is read before it is asked for. One in a bucket is copied
    once (`local_copy`).

    Raises:
      SourceError: no such dataset, several splits, or one without a column of conversations.
    """

    suffixes = (".arrow",)

    def __init__(self, options: ArrowOptions, limits: ImageLimits = ImageLimits()):
        super().__init__(options, limits)
        self._tables = [_mapped(path) for path in _data_files(options.path)]
        self._ends = np.cumsum([table.num_rows for table in self._tables], dtype=np.int64)
        if not len(self):
            raise SourceError(f"{options.path}: holds no row")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def where(self, index: int) -> str:
        """The folder and the row, from 1."""
        return f"{self._options.path}:{index + 1}"

    def _folder(self, index: int) -> str:
        return self._options.path

    def _row(self, index: int) -> dict[str, Any]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        table = self._tables[number]
        return row_of(table, int(index - self._ends[number] + table.num_rows))


def library(path: str) -> Any:
    """The package pyarrow, with its parts for files; `path` is what needs it."""
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise needs_library("pyarrow", path) from None
    return pyarrow


@contextlib.contextmanager
def arrow_file(path: str, form: str) -> Iterator[BinaryIO]:
    """The opened file; what pyarrow finds wrong with it becomes a `SourceError`."""
    arrow = library(path)
    with DataFile(path).open() as file:
        try:
            yield file
        except (arrow.ArrowException, OSError, ValueError, KeyError) as error:
            if isinstance(error, SourceError):
                raise
            raise SourceError(f"{path}: not a readable {form} file ({str(error).splitlines()[0]:.200})") from None


def known_columns(path: str, names: list[str]) -> list[str]:
    """Those of a file's columns that make a sample."""
    if not set(TURNS) & set(names):
        raise SourceError(
            f"{path}: has no column messages, conversations or texts, but {', '.join(names):.200}; rename one"
        )
    return [name for name in COLUMNS if name in names]


def row_of(table: Any, row: int) -> dict[str, Any]:
    """A row as Python values; columns that are null are left out."""
    try:
        values = {name: table.column(name)[row].as_py() for name in table.column_names}
    except (ValueError, ArithmeticError) as error:  # a text that is not UTF-8
        raise SourceError(f"damaged ({error})") from None
    return {name: _without_nulls(value) for name, value in values.items() if value is not None}


def _without_nulls(value: Any) -> Any:
    """Without the keys that are null: in a column all objects have the same keys, so null is what a record lacks."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _data_files(folder: str) -> list[str]:
    splits = os.path.join(folder, "dataset_dict.json")
    if exists(splits):
        names = _json(splits).get("splits")
        raise SourceError(f"{folder}: has the splits {', '.join(map(str, names or []))}; name one: {folder}/train")
    state = os.path.join(folder, "state.json")
    content = _json(state)
    if content.get("_indices_data_files"):
        raise SourceError(f"{folder}: rows are chosen through indices; save it again with flatten_indices()")
    files = content.get("_data_files")
    named = isinstance(files, list) and all(
        isinstance(one, dict) and isinstance(one.get("filename"), str) for one in files
    )
    if not named or any(os.path.basename(one["filename"]) != one["filename"] for one in files):
        raise SourceError(f"{state}: does not name the dataset's files; save it again")
    return [os.path.join(folder, one["filename"]) for one in files]


def _json(path: str) -> dict[str, Any]:
    file = DataFile(path)
    try:
        content = json.loads(file.read(0, file.size))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise SourceError(f"{path}: is not an object")
    return content


def _mapped(path: str) -> Any:
    """The table of an Arrow file, its data left on the disk."""
    arrow, here = library(path), local_copy(path)
    with arrow_file(path, "Arrow"):
        table = arrow.ipc.open_stream(arrow.memory_map(here)).read_all()
        return table.select(known_columns(path, table.column_names))
