"""Checkpoints in safetensors files: what they hold, from their headers alone, and one tensor at a time.

A safetensors file is eight bytes with the header's length, a JSON header, and the tensors' bytes one after the other.
Nothing the header says is believed before it fits the file: a truncated download, or a header that lies, is found here
and not as noise in a model's answers. So are weights that are not finite.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from uhd_jax.convert.scratch import Scratch
from uhd_jax.convert.tables import ConvertError, not_finite
from uhd_jax.convert.tensors import DTYPES, INDEX, TensorInfo

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MAX_HEADER = 100_000_000  # bytes, the format's own limit


class Source:
    """An opened checkpoint: `tensors` and the JSON files beside them. Nothing in its folder is ever written."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], scratch: Any = None):
        self.path = path
        self.tensors = MappingProxyType(dict(tensors))
        self._scratch = scratch  # holds the temporary files of unpickled weights

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        if self._scratch is not None:
            self._scratch.cleanup()

    @property
    def folder(self) -> Path:
        """Where the files beside the weights lie."""
        return self.path if self.path.is_dir() else self.path.parent

    def has(self, filename: str) -> bool:
        """Whether there is such a file beside the weights."""
        return (self.folder / filename).is_file()

    def json(self, filename: str) -> dict[str, Any]:
        """A JSON object from a file beside the weights.

        Raises:
          ConvertError: no such file, or it holds no JSON object.
        """
        return read_json(self.folder / filename)

    def read(self, name: str) -> np.ndarray:
        """One tensor, in its own dtype.

        Raises:
          ConvertError: it holds NaN or an infinity, or the file has changed since it was opened.
        """
        info = self.tensors[name]
        count = math.prod(info.shape)
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.offset)
            array = np.fromfile(file, np.uint8, count * info.dtype.itemsize)
        if array.nbytes != info.nbytes:
            raise ConvertError(f"{info.file} became shorter while it was read: {name} is cut")
        array = array.view(info.dtype)
        if (found := not_finite(array)) is not None:
            place, value = found
            where = [int(index) for index in np.unravel_index(place, info.shape)]
            raise ConvertError(
                f"{info.file}: {name} holds {value} at {where}; weights must be finite, get another copy"
            )
        return array.reshape(info.shape)


def open_source(path: str | Path, allow_pickle: bool = False) -> Source:
    """Opens a checkpoint: a folder, or one file of weights. Reads headers only.

    In a folder the weights are what `model.safetensors.index.json` names, else all of `model*.safetensors`, else
    pickles, else the only `*.safetensors` there is.

    Args:
      path: a folder or file.
      allow_pickle: where there is no safetensors file, unpickle `*.bin`, `*.pt`, `*.pth` or `*.ckpt`.

    Raises:
      ConvertError: nothing to read; a file that is missing, truncated or contradicts itself or the index; pickles.
    """
    path = Path(path)
    if path.is_file():
        return _unpickled(path, [path], allow_pickle) if path.suffix in PICKLES else Source(path, _headers([path]))
    if not path.is_dir():
        raise ConvertError(f"{path}: no such file or folder")
    if (path / INDEX).is_file():
        return Source(path, _indexed(path / INDEX))
    if files := sorted(path.glob("model*.safetensors")):
        _require_all(files)
        return Source(path, _headers(files))
    pickles = _pickle_files(path)
    files = [] if pickles else sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return Source(path, _headers(files))
    if files:
        raise ConvertError(f"{path}: which of {', '.join(file.name for file in files)}? Give one of them instead")
    if not pickles:
        ours = (path / "model.json").is_file()
        hint = "; it is a model of uhd-jax already, which convert export writes as safetensors" if ours else ""
        raise ConvertError(f"{path}: no weights there, neither model*.safetensors nor {INDEX}{hint}")
    return _unpickled(path, pickles, allow_pickle)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      ConvertError: no such file, or it holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConvertError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConvertError(f"{path}: holds {type(value).__name__} where a JSON object should be")
    return value


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file.

    Raises:
      ConvertError: the file is no safetensors file, is truncated, or its header does not describe its bytes.
    """
    if not file.is_file():  # opening what is a pipe would wait for ever
        raise ConvertError(f"{file} is no file, or a link to nothing")
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise ConvertError(f"{file} is a Git LFS pointer, not the weights: run git lfs pull, or download the file")
        if length > size - 8 and re.match(rb"PK\x03\x04|\x80[\x02-\x05]", start):
            raise ConvertError(
                f"{file}: this is a pickle, no safetensors file; name it {file.stem}.bin to have it read"
            )
        if len(start) < 8 or length > min(size - 8, MAX_HEADER):
            raise ConvertError(f"{file} ({size} bytes) is truncated or no safetensors file: download it again")
        text = opened.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
        header.pop("__metadata__", None)
        infos = {name: _info(name, value, file, 8 + length) for name, value in header.items()}
    except ConvertError as error:
        raise ConvertError(f"{file}: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConvertError(f"{file}: its header is damaged ({type(error).__name__}: {error})") from None
    end, last = 8 + length, "the header"
    for name, info in sorted(infos.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            raise ConvertError(f"{file}: its header lies: {name} begins at byte {info.offset}, {last} ends at {end}")
        end, last = info.offset + info.nbytes, name
    if end > size:
        raise ConvertError(f"{file} is truncated: {size} bytes of {end}; download it again")
    if end < size:
        raise ConvertError(f"{file}: {size - end} bytes after the last tensor, which its header does not mention")
    return infos


def _info(name: str, value: dict[str, Any], file: Path, base: int) -> TensorInfo:
    if value["dtype"] not in DTYPES:
        raise ConvertError(f"{name} has dtype {value['dtype']}; known are {', '.join(DTYPES)}")
    shape, (begin, end) = tuple(value["shape"]), value["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise ConvertError(f"its header lies: {name} has shape {list(shape)} and data_offsets {[begin, end]}")
    info = TensorInfo(shape, DTYPES[value["dtype"]], file, base + begin)
    if end - begin != info.nbytes:
        raise ConvertError(
            f"its header lies: {name}, {value['dtype']}{list(shape)}, takes {info.nbytes} bytes, "
            f"its offsets {end - begin}"
        )
    return info


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConvertError(f"its header names {twice} twice")
    return found


def _headers(files: Iterable[Path]) -> dict[str, TensorInfo]:
    infos: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(file).items():
            if name in infos:
                raise ConvertError(f"{name} is both in {infos[name].file} and in {file}")
            infos[name] = info
    return infos


def _indexed(index: Path) -> dict[str, TensorInfo]:
    """The tensors of the files an index names, which must be the tensors it names."""
    placed = _weight_map(index)
    files = [index.parent / name for name in sorted(set(placed.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ConvertError(f"{index} names files that are not there: {_some(missing)}")
    infos = _headers(files)
    problems = [
        f"{name} is not in {file}"
        for name, file in placed.items()
        if name not in infos or infos[name].file.name != file
    ]
    problems += [
        f"{name} of {info.file.name} is not in the index" for name, info in infos.items() if name not in placed
    ]
    if problems:
        raise ConvertError(f"{index} does not fit its files:\n  " + "\n  ".join(problems))
    return infos


def _weight_map(index: Path) -> dict[str, str]:
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ConvertError(f"{index}: no weight_map")
    for name, file in placed.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise ConvertError(
                f"{index}: {name} would be in {file!r}, which is not the name of a file beside the index"
            )
    return placed


def _require_all(files: list[Path]) -> None:
    """Shards without an index say by their names how many there are."""
    numbers = [re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})(\..*)", file.name) for file in files]
    for stem, count, suffix in {(match[1], match[3], match[4]) for match in numbers if match}:
        names = [f"{stem}-{number:05d}-of-{count}{suffix}" for number in range(1, int(count) + 1)]
        present = {file.name for file in files}
        if missing := [name for name in names if name not in present]:
            raise ConvertError(f"{files[0].parent}: shards are missing: {_some(missing)}")


def _some(names: list[str]) -> str:
    """Names for a message, of many the first ones."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _pickle_files(folder: Path) -> list[Path]:
    """The pickled weights of a folder: not what a trainer leaves beside them."""
    index = folder / "pytorch_model.bin.index.json"
    if index.is_file():
        files = [folder / name for name in sorted(set(_weight_map(index).values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ConvertError(f"{index} names files that are not there: {_some(missing)}")
        return files
    if files := sorted(folder.glob("pytorch_model*.bin")):
        _require_all(files)
        return files
    trainer = ("training_args.bin", "optimizer.", "scheduler.", "rng_state")
    files = [file for file in folder.iterdir() if file.suffix in PICKLES and not file.name.startswith(trainer)]
    if len(files) > 1:
        names = ", ".join(sorted(file.name for file in files))
        raise ConvertError(f"{folder}: which of {names}? Give one of them instead")
    return files


def _unpickled(path: Path, files: list[Path], allow_pickle: bool) -> Source:
    for file in files:
        if not file.stat().st_size:
            raise ConvertError(f"{file} is empty: download it again")
    if not allow_pickle:
        raise ConvertError(
            f"{files[0]} is a pickle, which can run any program when it is read. If you trust where it comes from, add "
            "--allow-pickle (allow_pickle=True)"
        )
    from uhd_jax.convert import pickles

    base = os.environ.get("TMPDIR") or tempfile.gettempdir()  # which would go elsewhere where TMPDIR is full
    try:
        scratch = Scratch(base)
    except OSError as error:
        raise ConvertError(
            f"cannot unpickle {path} into {base}: {error.strerror}; set TMPDIR to another folder"
        ) from None
    try:
        made = [pickles.to_safetensors(file, scratch.path / f"{i}", scratch.handle) for i, file in enumerate(files)]
        return Source(path, _headers(file for group in made for file in group), scratch)
    except BaseException:
        scratch.cleanup()
        raise
