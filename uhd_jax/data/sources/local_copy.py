"""Files of a bucket that are needed whole and on a disk: copied once into the user's cache."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
from pathlib import Path

from uhd_jax.data.sources.files import DataFile, is_url, unreadable
from uhd_jax.data.sources.protocol import SourceError
from uhd_jax.data.sources.stored import cache_folder

logger = logging.getLogger(__name__)


def local_copy(path: str) -> str:
    """The path of a file on this disk with the content of `path`: itself, or a copy of a file in a bucket.

    Copies lie in `cache_folder()/files`. A file that has changed in its bucket is copied anew, and the old copy goes;
    of several processes that want it at once, one makes the copy.

    Raises:
      SourceError: the file cannot be read, or there is no room for it.
    """
    if not is_url(path):
        return path
    file = DataFile(path)
    folder = cache_folder() / "files"
    address = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
    state = hashlib.sha256(f"{file.size} {file.stamp}".encode()).hexdigest()[:16]
    copy = folder / f"{address}.{state}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{address}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (copy.exists() and copy.stat().st_size == file.size):
                for old in folder.glob(f"{address}.*"):
                    if old.suffix != ".lock":
                        old.unlink(missing_ok=True)
                _copy(file, copy)
    except OSError as error:
        raise SourceError(f"{path}: cannot be copied to {folder} ({error.strerror or error})") from None
    return str(copy)


def _copy(file: DataFile, copy: Path) -> None:
    """Copies a file whole or not at all."""
    free = shutil.disk_usage(copy.parent).free
    if file.size > free:
        raise SourceError(
            f"{file.path}: {file.size / 2**30:.1f} GiB are to be copied to {copy.parent}, which has {free / 2**30:.1f} "
            "GiB left; set XDG_CACHE_HOME to a larger disk, or mount the bucket (gcsfuse)"
        )
    logger.info("%s: copying %.1f MiB to %s", file.path, file.size / 2**20, copy.parent)
    handle, partial = tempfile.mkstemp(dir=copy.parent, prefix=copy.stem, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as written:
            for chunk in file.chunks():
                written.write(chunk)
            size = written.tell()
        if size != file.size:
            raise unreadable(file.path, ValueError(f"{size} of {file.size} bytes came"))
        os.replace(partial, copy)
    except BaseException:
        os.unlink(partial)
        raise
