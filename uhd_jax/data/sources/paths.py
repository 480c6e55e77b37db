"""Paths of images that come with data: they are looked up below one folder, and nowhere else."""

from __future__ import annotations

import os

from uhd_jax.data.sources.files import DataFile, is_url
from uhd_jax.data.sources.protocol import SourceError
from uhd_jax.slicing.plan import ImageRefused

_FOLDERS = 10_000  # of which is kept that no link leads to them


class ImageRoot:
    """The folder below which the images of a source lie.

    Args:
      folder: a local one, or one of a bucket (`gs://bucket/images`). Links inside it may point to places inside it.
    """

    def __init__(self, folder: str | os.PathLike):
        self._folder = os.fspath(folder)
        self._real = None if is_url(self._folder) else os.path.realpath(self._folder)
        self._plain: set[str] = set()  # folders that are no links and lie behind none

    def open(self, name: str, max_bytes: int) -> str | bytes:
        """What `image_io` opens: the real path of a local image, the bytes of one in a bucket.

        Raises:
          ImageRefused: the path is absolute or an address, goes up by `..`, or leaves the folder through a link; or the
            image is not in its bucket, or larger than `max_bytes` there.
        """
        if name[:5].lower() == "data:":
            raise ImageRefused(
                f"{name!r:.40}: a data: URI; images are not read out of texts, so write it to a file and name its path"
            )
        parts = name.split("/")
        if not name or "\0" in name or is_url(name) or os.path.isabs(name) or ".." in parts:
            raise ImageRefused(f"{name!r:.200}: not a path below the image root {self._folder}; make it relative to it")
        if self._real is None:
            kept = (part for part in parts if part not in ("", "."))
            return self._fetch("/".join((self._folder.rstrip("/"), *kept)), max_bytes)
        path = f"{self._real.rstrip('/')}/{name}"
        try:
            if self._is_plain(path):
                return path
            real = os.path.realpath(path)
        except (OSError, ValueError) as error:
            raise ImageRefused(f"{path!r:.300}: not a usable path ({error})") from None
        if not real.startswith(os.path.join(self._real, "")):
            raise ImageRefused(f"{path:.300}: leads out of the image root through a link; copy the file into it")
        return real

    def _is_plain(self, path: str) -> bool:
        """Whether a path leads through no link, in few calls of the system; of folders, what was found is kept."""
        folder = os.path.dirname(path)
        if folder not in self._plain:
            if os.path.realpath(folder) != folder or len(self._plain) >= _FOLDERS:
                return False
            self._plain.add(folder)
        return not os.path.islink(path) and os.path.basename(path) not in ("", ".")

    def _fetch(self, address: str, max_bytes: int) -> bytes:
        try:
            file = DataFile(address)
            if file.size > max_bytes:
                raise ImageRefused(f"{address:.300}: has more than max_bytes={max_bytes} bytes; shrink the image")
            return file.read(0, file.size)
        except SourceError as error:
            raise ImageRefused(str(error)) from None
