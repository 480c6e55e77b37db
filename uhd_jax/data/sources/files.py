"""The one door to files of data: local ones and, through fsspec, those of a bucket (`gs://bucket/file`).

Nothing is kept open between two reads, so that a source may be pickled, forked and read from several threads.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO

from uhd_jax.data.sources.protocol import SourceError

CHUNK = 8 * 2**20  # bytes read at a time by those who read all

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# What tells two states of a file in a bucket apart, by the names that file systems give it; their listings round times
# in other ways than their answers about one file, so a time is the last resort.
_STATES = ("etag", "ETag", "generation", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")
_REFUSED = ("file", "local", "http", "https", "ftp", "data", "github", "zip", "tar", "reference")


def is_url(path: str | os.PathLike) -> bool:
    """Whether a path names a file of another system, as `gs://bucket/file` does."""
    return isinstance(path, str) and bool(_URL.match(path))


class DataFile:
    """A file of data, read in parts.

    Raises:
      SourceError: it cannot be read, or its kind of address is not for data.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        try:
            if is_url(self.path):
                info = _file_system(self.path).info(self.path)
                self.size = int(info["size"])
                self.stamp = next((str(info[key]) for key in _STATES if info.get(key)), "")
                regular = info["type"] == "file"
            else:
                status = os.stat(self.path)
                self.size, self.stamp, regular = status.st_size, str(status.st_mtime_ns), stat.S_ISREG(status.st_mode)
        except (OSError, ValueError) as error:
            raise unreadable(self.path, error) from None
        if not regular:
            raise SourceError(f"{self.path}: is not a file; name a file of data")

    def read(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end`; fewer only where the file is shorter by now."""
        try:
            if is_url(self.path):
                return _file_system(self.path).cat_file(self.path, start, end)
            with open(self.path, "rb") as file:
                return os.pread(file.fileno(), end - start, start)
        except OSError as error:
            raise unreadable(self.path, error) from None

    def chunks(self) -> Iterator[bytes]:
        """All bytes in order, `CHUNK` at a time."""
        with self.open() as file:
            while chunk := file.read(CHUNK):
                yield chunk

    def open(self) -> BinaryIO:
        """The file, to be read and closed by the caller."""
        try:
            return _file_system(self.path).open(self.path, "rb") if is_url(self.path) else open(self.path, "rb")
        except OSError as error:
            raise unreadable(self.path, error) from None


def find_files(path: str, *suffixes: str) -> list[str]:
    """The files that a path names, sorted: itself, what a pattern matches, or all below a folder that end in a suffix,
    the first of `suffixes` that there are such files of.

    Raises:
      SourceError: there are none.
    """
    if is_url(path):
        system = _file_system(path)
        if any(sign in path for sign in "*?["):
            patterns = [path]
        else:
            patterns = [f"{path.rstrip('/')}/**/*{suffix}" for suffix in suffixes]
        try:
            if system.isfile(path):
                return [path]
            found = next(filter(None, map(system.glob, patterns)), [])
        except OSError as error:
            raise unreadable(path, error) from None
        found = [system.unstrip_protocol(name) for name in found]
    elif os.path.isdir(path):
        patterns = [os.path.join(glob.escape(path), "**", f"*{suffix}") for suffix in suffixes]
        found = next(filter(None, (glob.glob(pattern, recursive=True) for pattern in patterns)), [])
    else:
        found = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
    if not found:
        raise SourceError(f"{path}: no such file, nor a folder or pattern with files *{' or *'.join(suffixes)}")
    return sorted(found)


def exists(path: str) -> bool:
    """Whether there is such a file. Raises `SourceError` where a bucket does not answer."""
    if not is_url(path):
        return os.path.exists(path)
    try:
        return _file_system(path).exists(path)
    except OSError as error:
        raise unreadable(path, error) from None


def needs_library(name: str, purpose: str) -> SourceError:
    """The error that a library of the extra `data` is not installed."""
    return SourceError(f"{purpose} needs the package {name}: pip install 'uhd-jax[data]'")


def unreadable(path: str, error: Exception) -> SourceError:
    """The error that a file cannot be read."""
    return SourceError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error or type(error).__name__})")


def _file_system(path: str) -> Any:
    protocol = path.partition("://")[0].lower()
    if protocol in _REFUSED:
        raise SourceError(f"{path}: data is not read from {protocol}://; name a local path or a bucket (gs://, s3://)")
    try:
        import fsspec
    except ImportError:
        raise needs_library("fsspec", path) from None
    try:
        return fsspec.filesystem(protocol)
    except ImportError as error:  # the message of fsspec names the package, gcsfs for gs://
        raise SourceError(f"{path}: {error} (gcsfs comes with pip install 'uhd-jax[data]')") from None
    except ValueError as error:
        raise SourceError(f"{path}: {error}") from None
