"""The list of samples that training leaves out, to mend them by."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path


class DroppedList:
    """A JSONL file with every dropped sample once, also when a run goes on: where it is, which counter, and why.

    Args:
      path: the file, added to. A list that cannot be written is no reason to stop a training: it stays as it is.
    """

    def __init__(self, path: Path):
        self._path = path
        self._known: set[tuple[str, str]] = set()
        self._start = ""  # of the next line
        with contextlib.suppress(OSError):
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            self._start = "\n" if lines[-1] else ""  # the last one was cut off, as on a full disk
            for line in lines:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    self._known.add((entry["where"], entry["counter"]))

    def add(self, where: str, counter: str, reason: str) -> None:
        """Adds a sample unless it is in the list."""
        if (where, counter) in self._known:
            return
        self._known.add((where, counter))
        with contextlib.suppress(OSError), open(self._path, "a", encoding="utf-8") as file:
            file.write(f"{self._start}{json.dumps({'where': where, 'counter': counter, 'reason': reason})}\n")
            self._start = ""
