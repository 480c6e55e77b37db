"""JSON files of conversations: LLaVA's arrays, lines of ShareGPT or `messages`, of any length."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import os
from typing import Any

from uhd_jax.config import ImageLimits
from uhd_jax.data.sources.files import DataFile, find_files
from uhd_jax.data.sources.json_rows import find_rows, read_row
from uhd_jax.data.sources.rows import FileOptions, RowSource
from uhd_jax.data.sources.stored import stored_index


@dataclasses.dataclass(frozen=True)
class JsonOptions(FileOptions):
    """Options of the source "json"."""


class JsonFiles(RowSource):
    """Rows of JSON files, in any form of `conversation`: arrays of objects, or one object per line.

    What is kept in memory is where the rows are, 24 bytes each, mapped from a stored index (`stored`).

    Raises:
      SourceError: no file, or one without rows, or with an array that does not end.
    """

    suffixes = (".jsonl", ".json")  # the latter where there is none of the former: many folders hold other JSON too

    def __init__(self, options: JsonOptions, limits: ImageLimits = ImageLimits()):
        paths = find_files(options.path, *self.suffixes)
        super().__init__(options, limits)
        self._files = [DataFile(path) for path in paths]
        self._rows = [stored_index(file, "rows", 3, find_rows) for file in self._files]
        self._ends = list(itertools.accumulate(map(len, self._rows)))

    def __len__(self) -> int:
        return self._ends[-1]

    def where(self, index: int) -> str:
        """The file, and the row's line or its number in the array, from 1."""
        file, row = self._place(index)
        return f"{self._files[file].path}:{self._rows[file][row, 2]}"

    def _folder(self, index: int) -> str:
        return os.path.dirname(self._files[self._place(index)[0]].path)

    def _place(self, index: int) -> tuple[int, int]:
        """The file, and the row in it."""
        file = bisect.bisect_right(self._ends, index)
        return file, index - self._ends[file] + len(self._rows[file])

    def _row(self, index: int) -> Any:
        file, row = self._place(index)
        start, end, _ = self._rows[file][row].tolist()
        return read_row(self._files[file], start, end)
