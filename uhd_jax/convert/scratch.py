"""Temporary folders that do not outlive their process: what a killed one leaves, the next that needs one removes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

PREFIX = "uhd-jax-unpickled-"


class Scratch:
    """A new folder in `base`, removed by `cleanup`, when this object is gone, or at the end of the program.

    A lock on it tells that it is in use. It belongs to `handle`: a child process that inherits this holds it too.

    Raises:
      OSError: `base` cannot be written to.
    """

    def __init__(self, base: str | os.PathLike[str]):
        remove_leftovers(base)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
            self.handle = os.open(self.path, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks: nothing is removed there either
                fcntl.flock(self.handle, fcntl.LOCK_EX)
            if self.path.exists():  # else another process took it for a leftover before it was locked
                break
            os.close(self.handle)
        self.cleanup = weakref.finalize(self, _remove, self.path, self.handle)


def remove_leftovers(base: str | os.PathLike[str]) -> None:
    """Removes the folders in `base` whose processes are gone."""
    for folder in Path(base).glob(f"{PREFIX}*"):
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # of another user
            continue
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _remove(path: Path, handle: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(handle)
