"""Indices of files: made once, stored beside the file, and mapped into memory by every process that reads it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from uhd_jax.data.sources.files import DataFile, is_url


def stored_index(file: DataFile, kind: str, columns: int, make: Callable[[DataFile], np.ndarray]) -> np.ndarray:
    """The index of a file: read where it is stored and fresh, else made and stored.

    It is stored in the hidden file `.NAME.KIND.npy` beside the file; where nothing may be written there, and for a file
    in a bucket, in the user's cache folder (`uhd_jax` in `$XDG_CACHE_HOME` or `~/.cache`). It is made anew when size or
    time of change of the file are others.

    Args:
      file: what is indexed.
      kind: tells indices of several kinds apart.
      columns: of the index.
      make: makes the index: int64[N, columns].

    Returns:
      int64[N, columns], read-only, mapped from the disk.
    """
    stamp = int.from_bytes(hashlib.sha256(f"{kind} {columns} {file.size} {file.stamp}".encode()).digest()[:7])
    places = _places(file, kind)
    for place in places:
        if (index := _load(place, stamp, columns)) is not None:
            return index
    made = np.asarray(make(file), np.int64).reshape(-1, columns)
    stamped = np.concatenate([np.full((1, columns), stamp), made])
    for place in places:
        with contextlib.suppress(OSError):
            _store(place, stamped)
            if (index := _load(place, stamp, columns)) is not None:
                return index
    stamped.flags.writeable = False
    return stamped[1:]  # nowhere to write: every process makes its own


def cache_folder() -> Path:
    """Where what can be made again is kept: `uhd_jax` in `$XDG_CACHE_HOME` or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "uhd_jax")


def _places(file: DataFile, kind: str) -> list[Path]:
    cache = cache_folder()
    name = file.path if is_url(file.path) else os.path.realpath(file.path)
    cached = cache / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.{kind}.npy"
    beside = Path(file.path).with_name(f".{Path(file.path).name}.{kind}.npy")
    return [cached] if is_url(file.path) else [beside, cached]


def _load(place: Path, stamp: int, columns: int) -> np.ndarray | None:
    """The index at a place, unless there is none or it is of another state of the file."""
    try:
        index = np.load(place, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    shaped = isinstance(index, np.ndarray) and index.ndim == 2 and index.shape[1] == columns and len(index) > 0
    return index[1:] if shaped and index.dtype == np.int64 and (index[0] == stamp).all() else None


def _store(place: Path, index: np.ndarray) -> None:
    """Writes an index whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=place.parent, prefix=place.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, index)
        os.replace(name, place)
    except BaseException:
        os.unlink(name)
        raise
