"""Writing checkpoints: safetensors shards with their index, and folders that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from uhd_jax.convert.tables import ConvertError, Described
from uhd_jax.convert.tensors import DTYPES, INDEX

MAX_SHARD_BYTES = 5 * 10**9
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ENTRY = 160  # bytes of a header's entry at most, without the tensor's name

Item = tuple[str, Described, Callable[[], np.ndarray]]  # name, shape and dtype, what makes the tensor


def write_safetensors(
    folder: str | Path,
    tensors: Iterable[Item],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
) -> None:
    """Writes `model.safetensors`, or shards `model-00001-of-00003.safetensors` and their index.

    Each tensor is made when its turn comes, and let go.

    Args:
      folder: exists.
      tensors: all of them; neighbours stay neighbours as far as their dtypes are the same.
      max_shard_bytes: limit of a file, except for one that holds a single larger tensor.
      metadata: of the files.

    Raises:
      ConvertError: a name comes twice, or a tensor is not what was said of it.
      OSError: the files cannot be written.
    """
    folder, shards, room, total, seen = Path(folder), [[]], max_shard_bytes, 0, set()
    for item in tensors:
        name, info, _ = item
        if name in seen:
            raise ConvertError(f"{name} would be written twice")
        seen.add(name)
        nbytes = int(np.prod(info.shape, dtype=np.int64)) * np.dtype(info.dtype).itemsize
        total += nbytes
        room -= nbytes + len(name.encode()) + _ENTRY
        if room < 0 and shards[-1]:
            shards.append([])
            room = max_shard_bytes - nbytes - len(name.encode()) - _ENTRY
        shards[-1].append(item)
    placed = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        _write_file(folder / file, shard, metadata)
        placed |= {name: file for name, _, _ in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, shard: list[Item], metadata: Mapping[str, str]) -> None:
    # Widest types first: every tensor then begins at a multiple of its element's size, as readers that map files need.
    shard = sorted(shard, key=lambda item: -np.dtype(item[1].dtype).itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, info, _ in shard:
        begin, dtype = end, np.dtype(info.dtype)
        end += int(np.prod(info.shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(info.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, info, make in shard:
            tensor = make()
            if tensor.shape != tuple(info.shape) or tensor.dtype != info.dtype:
                raise ConvertError(f"{name} became {tensor.dtype}{list(tensor.shape)}, not {info.dtype}{info.shape}")
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)


@contextlib.contextmanager
def whole_folder(destination: str | Path, source: str | Path | None = None, nbytes: int = 0) -> Iterator[Path]:
    """Yields a new folder that becomes `destination` at the end: a result is whole or not there, never half.

    It lies beside its destination as `.NAME.partial`. An error removes it; one that a killed process has left is
    removed by the next. Links are followed.

    Args:
      destination: absent, or an empty folder that can be replaced: not the current one, and no mount point.
      source: a folder that must not be written into.
      nbytes: that will be written at least.

    Raises:
      ConvertError: the destination holds something, cannot be replaced, lies in the source, or is being written by
        another process; or the disk refuses.
    """
    try:
        destination = Path(destination).resolve()
        str(destination).encode()  # Orbax takes no other names
    except UnicodeEncodeError:
        raise ConvertError(f"{str(destination)!a} is not UTF-8; choose another name") from None
    except (OSError, RuntimeError) as error:  # a circle of links
        raise ConvertError(f"cannot write {destination}: {error}") from None
    if source is not None and Path(source).resolve() in (destination, *destination.parents):
        raise ConvertError(f"{destination} lies in {source}, which is only read; choose another folder")
    if destination.is_dir() and any(destination.iterdir()):
        raise ConvertError(f"{destination} is not empty; choose a new folder, or empty it")
    if destination.exists() and not destination.is_dir():
        raise ConvertError(f"{destination} is a file; choose a new folder")
    if _is_mount(destination):
        raise ConvertError(f"{destination} is a mount point and cannot be replaced; choose a new folder in it")
    if destination.exists() and destination.samefile("."):
        raise ConvertError(f"{destination} is the current folder and cannot be replaced; choose a new folder in it")
    if (free := _free(destination.parent)) < nbytes:
        raise ConvertError(f"{destination} needs {nbytes / 2**20:.0f} MiB, only {free / 2**20:.0f} MiB are free there")
    partial = destination.with_name(f".{destination.name}.partial")
    try:
        with _locked(partial):
            try:
                yield partial
                os.replace(partial, destination)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except (OSError, RuntimeError) as error:  # a CheckpointError is the latter; Orbax is slow to import
        code = error.errno if isinstance(error, OSError) else _full(error)
        if not isinstance(error, OSError) and code is None:
            raise
        said = os.strerror(code) if code else error
        limited = "; the file system, or ulimit -f, limits the size of a file" if code == errno.EFBIG else ""
        raise ConvertError(
            f"cannot write {destination}: {said}{limited} "
            f"({_free(destination.parent) / 2**20:.0f} MiB free there, what was written is removed)"
        ) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Makes and empties a folder that no other process may use meanwhile; the lock ends with this one, however it ends.

    Raises:
      ConvertError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConvertError(f"{folder} is being written by another process") from None
        for leftover in folder.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield
    finally:
        os.close(handle)


def _full(error: RuntimeError) -> int | None:
    """The system's number where a model could not be saved since the disk, a share of it or a file was full."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return next((code for code in codes if str(error).endswith(os.strerror(code))), None)


def _is_mount(folder: Path) -> bool:
    """Whether a file system is mounted there; or a folder of the same one, which only the kernel's list tells."""
    if os.path.ismount(folder):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    # Spaces and the like are octal there.
    return any(os.fsencode(folder) == re.sub(rb"\\(\d{3})", _octal, line.split(b" ")[4]) for line in lines)


def _octal(match: re.Match[bytes]) -> bytes:
    return bytes([int(match[1], 8)])


def _free(path: Path) -> int:
    """Bytes free where `path` is or would be."""
    return shutil.disk_usage(next(one for one in (path, *path.parents) if one.exists())).free
