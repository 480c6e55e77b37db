"""JSON files of conversations: LLaVA's arrays, lines of ShareGPT or `messages`, of any length."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from uhd_jax.config import ImageLimits
from uhd_jax.data.sources.files import DataFile
from uhd_jax.data.sources.json_rows import find_rows, read_row
from uhd_jax.data.sources.rows import FileOptions, RowSource
from uhd_jax.data.sources.stored import stored_index


@dataclasses.dataclass(frozen=True)
class JsonOptions(FileOptions):
    """Options of the source "json"."""


class JsonFile(RowSource):
    """Rows of a JSON file, in any form of `conversation`: an array of objects, or one object per line.

    What is kept in memory is where the rows are, 24 bytes each, mapped from a stored index (`stored`).
    """

    def __init__(self, options: JsonOptions, limits: ImageLimits = ImageLimits()):
        self._file = DataFile(options.path)
        super().__init__(options, limits, os.path.dirname(options.path))
        self._rows = stored_index(self._file, "rows", 3, find_rows)

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        """The file, and the row's line or its number in the array, from 1."""
        return f"{self._file.path}:{self._rows[index, 2]}"

    def _row(self, index: int) -> Any:
        start, end, _ = self._rows[index].tolist()
        return read_row(self._file, start, end)
