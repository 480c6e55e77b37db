"""ArrayRecord shards as `uhd-jax data pack` writes them (`data.record_format`): the form for training at scale."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from uhd_jax.config import ImageLimits
from uhd_jax.data.chat import Message
from uhd_jax.data.record_format import RecordError, decode
from uhd_jax.data.sources.files import DataFile, exists, find_files
from uhd_jax.data.sources.local_copy import local_copy
from uhd_jax.data.sources.protocol import SourceError
from uhd_jax.data.sources.rows import FileOptions, RowSource


@dataclasses.dataclass(frozen=True)
class ArrayRecordOptions:
    """Options of the source "array_record"."""

    path: str  # a shard; or a folder or a pattern, whose shards are read in the order of their names


class ArrayRecords(RowSource):
    """Samples of ArrayRecord shards: on a disk, in a bucket `gs://`, whose records the library reads in place, or in
    another one, whose shards are copied once (`local_copy`).

    Raises:
      SourceError: no shard, or one that is not ArrayRecord.
    """

    suffixes = (".arrayrecord",)

    def __init__(self, options: ArrayRecordOptions, limits: ImageLimits = ImageLimits()):
        super().__init__(FileOptions(options.path), limits)
        self._options = options
        self._paths = find_files(options.path, *self.suffixes)
        self._shards = [_open(path) for path in self._paths]
        self._ends = np.cumsum([len(shard) for shard in self._shards], dtype=np.int64)
        if not len(self):
            raise SourceError(f"{options.path}: holds no record")
        _check_whole(options.path, len(self))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def where(self, index: int) -> str:
        """The shard and the record in it, from 1."""
        shard, record = self._place(index)
        return f"{self._paths[shard]}:{record + 1}"

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, int(index - self._ends[shard] + len(self._shards[shard]))

    def _row(self, index: int) -> Mapping[str, Any]:
        raise NotImplementedError  # a record is no row of columns

    def _parse(self, index: int) -> tuple[tuple[Message, ...], list[Any]]:
        shard, record = self._place(index)
        try:
            sample = decode(self._shards[shard][record])
        except RecordError as error:
            raise SourceError(str(error)) from None
        except Exception as error:  # the reader raises RuntimeError, IndexError, ..
            raise SourceError(f"cannot be read ({type(error).__name__}: {error})") from None
        return sample.messages, list(sample.images)


def _check_whole(path: str, samples: int) -> None:
    """That a folder of `data.pack` holds all it should: a pack that was interrupted looks like a smaller one."""
    place = f"{path.rstrip('/')}/pack.json"
    if not exists(place):
        return  # no folder, or shards that came without it
    try:
        file = DataFile(place)
        summary = json.loads(file.read(0, file.size))
        complete, packed = summary["complete"], summary.get("samples")
    except SourceError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{path}/pack.json: damaged ({error}); pack again, or remove it") from None
    if not complete:
        raise SourceError(f"{path}: was not packed to its end; go on with the same `uhd-jax data pack`")
    if packed != samples:
        raise SourceError(f"{path}: holds {samples} samples, {packed} were packed; copy all its shards, no others")


def _open(path: str) -> Any:
    try:
        here = path if path.startswith("gs://") else local_copy(path)
        shard = grain.sources.ArrayRecordDataSource([here])
        len(shard)
    except SourceError:
        raise
    except Exception as error:  # of several kinds, by what is wrong with the file
        raise SourceError(f"{path}: not a readable ArrayRecord file ({type(error).__name__}: {error})") from None
    return shard
