"""Any source into ArrayRecord files: one folder that is read at random, with the images' files as they were.

    data-00000-of-00012.arrayrecord   a record per sample (`data.record_format`), in the order of the source
    skipped.jsonl                      the samples left out: number, place, counter, reason
    pack.json                          what was packed, and how it ended

A shard is written beside its name and renamed when whole, so a pack that was interrupted goes on with the shards that
are missing. What a killed one has left half-written is removed then, under a lock on the folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from uhd_jax.config import DataConfig, ImageLimits, to_dict
from uhd_jax.data import record_format, workers
from uhd_jax.data.index import data_stamp
from uhd_jax.data.record_format import PackedSample, RecordError
from uhd_jax.data.sources import Source, SourceError, facts_of, make_source
from uhd_jax.data.windows import MALFORMED, REFUSED
from uhd_jax.slicing.plan import ImageRefused

SUMMARY, SKIPPED = "pack.json", "skipped.jsonl"
SHARD_SAMPLES = 1024
_FORMAT = "uhd_jax records 1"
_LOCK = ".pack.lock"
_PARTIAL = ".partial"  # ends the name of what is being written
_PARTS = ".parts"  # folder with a JSON file per finished shard, until all are
_OPTIONS = "group_size:1,uncompressed"  # a group is read as a whole; images are compressed already
_SECONDS = 0.2  # between two reports of progress


class PackError(ValueError):
    """The folder cannot take this pack."""


def pack(
    data: DataConfig,
    folder: str | Path,
    limits: ImageLimits = ImageLimits(),
    shard_samples: int = SHARD_SAMPLES,
    processes: int = 1,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> dict[str, Any]:
    """Packs a source, or goes on with it.

    Samples that cannot be opened (`SourceError`, `ImageRefused`, headers only) are left out, counted and listed. Pixels
    are not decoded: a file that is damaged further on is kept, and counted when it is trained on.

    Args:
      data: the source.
      folder: a new or empty one, or one that this began to fill with the same data.
      limits: what an image may be.
      shard_samples: samples per shard, those left out included.
      processes: that read and write, a shard each.
      progress: called several times a second with samples done and samples in all.

    Returns:
      The content of pack.json.

    Raises:
      PackError: the folder holds something else, the data has changed since, or another pack is at work there.
      ConfigError, SourceError, NoImages: the source cannot be opened.
      WorkerError: a process is gone.
      OSError: the folder cannot be written, or a source's file cannot be read.
    """
    with _claimed(folder) as folder:
        return _pack(data, folder, limits, shard_samples, processes, progress)


def _pack(
    data: DataConfig,
    folder: Path,
    limits: ImageLimits,
    shard_samples: int,
    processes: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    count = len(make_source(data, limits))
    facts = {"format": _FORMAT, "data": facts_of(data), "limits": to_dict(limits), "shard_samples": shard_samples}
    facts |= {"source_samples": count, "stamp": data_stamp(data)}
    facts = json.loads(json.dumps(facts))
    summary = _summary(folder, facts)
    if summary["complete"]:
        there, packed = len(list(folder.glob("data-*.arrayrecord"))), summary["shards"]
        if there != packed:
            lost = f"{folder}: only {there} of {packed} shards are there"
            raise PackError(f"{lost}; bring back those that were lost, or pack into a new folder")
        progress(count, count)
        return summary
    _write_json(folder / SUMMARY, summary)
    (folder / _PARTS).mkdir(exist_ok=True)
    shards = workers.stretches(count, shard_samples)
    waiting = [shard for shard in range(len(shards)) if not _part(folder, shard).exists()]
    counter = multiprocessing.get_context("spawn").Value("q", count - sum(len(shards[shard]) for shard in waiting))
    job = _Job(data, limits, folder, shard_samples, count, counter)
    with _reports(counter, count, progress):
        for _ in workers.run(job, waiting, processes):
            pass
    return _finish(folder, summary, len(shards))


@dataclasses.dataclass(frozen=True)
class _Job:
    """Writes shards."""

    data: DataConfig
    limits: ImageLimits
    folder: Path
    shard_samples: int
    count: int
    counter: Any  # shared by the processes: samples done

    def open(self) -> Callable[[int], None]:
        source = make_source(self.data, self.limits)
        shards = workers.stretches(self.count, self.shard_samples)
        return lambda shard: self._write(source, shard, shards[shard], len(shards))

    def _write(self, source: Source, shard: int, samples: range, shards: int) -> None:
        path = self.folder / f"data-{shard:05d}-of-{shards:05d}.arrayrecord"
        partial = path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")
        skipped, written, size = [], 0, 0
        try:
            writer = ArrayRecordWriter(str(partial), _OPTIONS)
            try:
                for sample in samples:
                    try:
                        record = _record(source, sample)
                    except (ImageRefused, SourceError, RecordError) as error:
                        counter = REFUSED if isinstance(error, ImageRefused) else MALFORMED
                        line = {"sample": sample, "where": source.where(sample), "counter": counter}
                        skipped.append(line | {"reason": str(error)})
                    else:
                        writer.write(record)
                        written, size = written + 1, size + len(record)
                    with self.counter.get_lock():
                        self.counter.value += 1
            finally:
                writer.close()
            if written:
                _flush(partial)
                os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        _write_json(_part(self.folder, shard), {"samples": written, "bytes": size, "skipped": skipped})


def _record(source: Source, sample: int) -> bytes:
    """A sample's record; raises as its source, after a look at the headers of its images."""
    source.sizes(sample)
    files = tuple(source.files(sample))
    return record_format.encode(PackedSample(tuple(source.messages(sample)), files, source.where(sample)))


@contextlib.contextmanager
def _claimed(name: str | Path) -> Iterator[Path]:
    """Makes the folder and holds a lock on it, which the system lets go of however the process ends."""
    if "://" in str(name):
        raise PackError(f"{name}: is not a local folder; pack into one, then copy it there")
    folder = Path(name)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):  # a whole pack is only read; of another the first write says that it cannot
        yield folder
        return
    partials = f".*{_PARTIAL}"
    left = {folder / _LOCK, *folder.glob(partials)}  # all that a pack killed at once has left
    if not (folder / SUMMARY).exists() and any(path not in left for path in folder.iterdir()):
        raise PackError(f"{folder}: is not empty, and holds no {SUMMARY} to go on from; name a new folder")
    with open(folder / _LOCK, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PackError(f"{folder}: another pack is at work there; wait for its end, or name another") from None
        except OSError:
            pass  # some network file systems know no locks: packing works there, but nothing is known to be left over
        else:
            for partial in (*folder.glob(partials), *(folder / _PARTS).glob(partials)):
                partial.unlink(missing_ok=True)
        yield folder
        (folder / _LOCK).unlink(missing_ok=True)  # the folder is whole: who has opened it before this finds that


def _summary(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """What pack.json says, or what it is to begin with."""
    path = folder / SUMMARY
    if not path.exists():
        return facts | {"complete": False}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key, value in facts.items() if summary[key] != value]
        summary["complete"]
    except (ValueError, KeyError, TypeError) as error:
        raise PackError(f"{path}: damaged ({error}); name a new folder") from None
    if changed:
        raise PackError(f"{folder}: was begun with other data ({', '.join(changed)} changed); name a new folder")
    return summary


def _finish(folder: Path, summary: dict[str, Any], shards: int) -> dict[str, Any]:
    """Gathers what the shards say, and ends the pack."""
    parts = [json.loads(_part(folder, shard).read_text(encoding="utf-8")) for shard in range(shards)]
    skipped = [line for part in parts for line in part["skipped"]]
    with _whole(folder / SKIPPED) as partial:
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in skipped)
        partial.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    summary = summary | {
        "complete": True,
        "samples": sum(part["samples"] for part in parts),
        "bytes": sum(part["bytes"] for part in parts),
        "shards": sum(part["samples"] > 0 for part in parts),
        "skipped": dict(Counter(line["counter"] for line in skipped)),
    }
    _write_json(folder / SUMMARY, summary)
    for shard in range(shards):
        _part(folder, shard).unlink()
    (folder / _PARTS).rmdir()
    return summary


@contextlib.contextmanager
def _reports(counter: Any, count: int, progress: Callable[[int, int], None]) -> Iterator[None]:
    """Calls `progress` from a thread, because the work of other processes is waited for in this one."""
    end = threading.Event()

    def report() -> None:
        while not end.wait(_SECONDS):
            progress(counter.value, count)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
        progress(counter.value, count)


def _part(folder: Path, shard: int) -> Path:
    return folder / _PARTS / f"{shard:05d}.json"


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path that becomes `path`."""
    partial = path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")
    try:
        yield partial
        _flush(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_json(path: Path, value: Any) -> None:
    with _whole(path) as partial:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def _flush(path: Path) -> None:
    """What is renamed is on the disk: a machine that goes down leaves no empty file under a final name."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
