"""Parquet files with conversations and the files of images: LLaVA-OneVision's columns, FineVision's, or `messages`."""

from __future__ import annotations

import collections
import dataclasses
import os
import threading
from typing import Any

import numpy as np

from uhd_jax.config import ImageLimits
from uhd_jax.config.checks import require_at_least
from uhd_jax.data.sources.arrow import arrow_file, known_columns, library, row_of
from uhd_jax.data.sources.files import find_files
from uhd_jax.data.sources.protocol import SourceError
from uhd_jax.data.sources.rows import FileOptions, RowSource


@dataclasses.dataclass(frozen=True)
class ParquetOptions(FileOptions):
    """Options of the source "parquet"."""

    row_groups: int = 4  # kept in memory; a group is read whole when one of its rows is asked for

    def __post_init__(self):
        require_at_least(self, 1, "row_groups")


class Parquet(RowSource):
    """Rows of parquet files; the footers are read on opening, a row group when one of its rows is asked for.

    Rows in random order read a whole group each: pack files of large groups (`uhd-jax data pack`) before training.

    Raises:
      SourceError: no file, one that is not parquet, or one without a column of conversations.
    """

    suffixes = (".parquet",)

    def __init__(self, options: ParquetOptions, limits: ImageLimits = ImageLimits()):
        self._paths = find_files(options.path, *self.suffixes)
        super().__init__(options, limits)
        self._footers = [_footer(path) for path in self._paths]
        groups = [
            (file, group, footer.row_group(group).num_rows)
            for file, footer in enumerate(self._footers)
            for group in range(footer.num_row_groups)
        ]
        self._groups = np.array(groups, np.int64).reshape(-1, 3)  # file, number in it, rows
        self._ends = np.cumsum(self._groups[:, 2])
        if not len(self):
            raise SourceError(f"{options.path}: holds no row")
        self._tables: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def where(self, index: int) -> str:
        """The file and the row in it, from 1."""
        group, row = self._place(index)
        file = self._groups[group, 0]
        before = self._groups[:group][self._groups[:group, 0] == file, 2].sum()
        return f"{self._paths[file]}:{before + row + 1}"

    def _folder(self, index: int) -> str:
        return os.path.dirname(self._paths[self._groups[self._place(index)[0], 0]])

    def _place(self, index: int) -> tuple[int, int]:
        """The row group, counted over all files, and the row in it."""
        group = int(np.searchsorted(self._ends, index, side="right"))
        return group, int(index - self._ends[group] + self._groups[group, 2])

    def _row(self, index: int) -> dict[str, Any]:
        group, row = self._place(index)
        return row_of(self._table(group), row)

    def _table(self, group: int) -> Any:
        with self._lock:
            if group not in self._tables:
                file, number, _ = self._groups[group].tolist()
                self._tables[group] = _read_group(self._paths[file], self._footers[file], number)
                if len(self._tables) > self._options.row_groups:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(group)
            return self._tables[group]


def _footer(path: str) -> Any:
    """The metadata of a file, its columns checked."""
    with arrow_file(path, "parquet") as file:
        opened = library(path).parquet.ParquetFile(file)
        known_columns(path, opened.schema_arrow.names)
        return opened.metadata


def _read_group(path: str, footer: Any, group: int) -> Any:
    with arrow_file(path, "parquet") as file:
        opened = library(path).parquet.ParquetFile(file, metadata=footer)
        columns = known_columns(path, opened.schema_arrow.names)
        return opened.read_row_group(group, columns=columns, use_threads=False)
