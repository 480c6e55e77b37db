"""What large data and long epochs cost: opening a million rows, and memory of worker processes.

    python -m uhd_jax.analysis.measure_data rows [--rows 1000000] [--formats array lines parquet tar]
    python -m uhd_jax.analysis.measure_data workers [--workers 2] [--epochs 20]

`rows` makes a file of LLaVA conversations in each format, opens it twice, each time in a process of its own, and reads
the last row. Seconds are processor time; memory is the peak of the process beyond what it had before opening.

`workers` trains on nothing: it reads epochs of a small set of photographs through worker processes, and tells after
each the resident memory of the one that has most. The first epochs fill caches; afterwards it should stay.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from uhd_jax.analysis import bench_data
from uhd_jax.slicing.plan import Size

_ANSWER = "A short answer of about the length that answers have, so that a file of a million is one of 300 MB in all."
_KIND = {"array": "json", "lines": "json", "parquet": "parquet", "tar": "tar"}
_MIB = 2**20
# Peak memory is reset after the imports, so that it is that of opening alone.
_OPENER = """
import json, resource, sys, time
from uhd_jax.config import DataConfig
from uhd_jax.data.sources import make_source
if sys.argv[1] == "parquet":
    import pyarrow.parquet
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
open("/proc/self/clear_refs", "w").write("5")
before, start = status("VmRSS"), time.process_time()
source = make_source(DataConfig(sys.argv[1], {"path": sys.argv[2]}))
opened = time.process_time() - start
source.messages(len(source) - 1)
peak = max(status("VmHWM"), status("VmRSS"))
print(json.dumps([len(source), opened, (peak - before) / 1024]))
"""


def measure_rows(folder: Path, name: str, rows: int, openings: int = 2) -> list[tuple[float, float]]:
    """Seconds to open a file of `rows` rows, and MiB that takes: the first time, and again.

    Raises:
      RuntimeError: the process that opens it fails, or does not find all rows.
    """
    path = _write(folder, name, rows)
    figures = []
    for _ in range(openings):
        command = [sys.executable, "-c", _OPENER, _KIND[name], str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
        count, seconds, mib = json.loads(done.stdout)
        if count != rows:
            raise RuntimeError(f"{name}: {count} rows found, {rows} written")
        figures.append((seconds, mib))
    return figures


def measure_workers(folder: Path, workers: int, epochs: int, images: int = 96) -> list[float]:
    """MiB of resident memory of the largest worker process, after each epoch."""
    size = Size(448, 672)
    path = bench_data.write_photographs(folder, size, images)
    batches = bench_data.open_batches(path, size, packing_window=32, data_workers=workers)
    found = []
    try:
        while len(found) < epochs:
            if next(batches)[1].read >= (len(found) + 1) * images:
                found.append(max(_resident(child) for child in _children(os.getpid())) / _MIB)
    finally:
        batches.close()
    return found


def _children(process: int) -> Iterator[int]:
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            yield child
            yield from _children(child)


def _resident(process: int) -> int:
    """Bytes that are the process's own: what it shares, as the memory batches travel through, is not counted."""
    _, resident, shared, *_ = map(int, Path(f"/proc/{process}/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def _record(number: int) -> dict:
    said = [{"from": "human", "value": f"<image>\nWhat is in {number}?"}, {"from": "gpt", "value": _ANSWER}]
    return {"id": f"{number:09d}", "image": f"images/{number:09d}.jpg", "conversations": said}


def _write(folder: Path, name: str, rows: int) -> Path:
    records = map(_record, range(rows))
    if name == "parquet":
        return _write_parquet(folder / "x.parquet", records)
    if name == "tar":
        return _write_tar(folder / "x.tar", records)
    path = folder / f"{name}.json{'l' * (name == 'lines')}"
    separator = ",\n" if name == "array" else "\n"
    with open(path, "w", encoding="utf-8") as file:
        file.write("[" * (name == "array"))
        for number, record in enumerate(records):
            file.write(separator * (number > 0) + json.dumps(record))
        file.write("]" * (name == "array"))
    return path


def _write_parquet(path: Path, records: Iterator[dict]) -> Path:
    import pyarrow
    import pyarrow.parquet

    first = pyarrow.Table.from_pylist([_record(0)])
    with pyarrow.parquet.ParquetWriter(path, first.schema) as writer:
        while some := list(itertools.islice(records, 10_000)):
            writer.write_table(pyarrow.Table.from_pylist(some, first.schema), row_group_size=100)
    return path


def _write_tar(path: Path, records: Iterator[dict]) -> Path:
    with tarfile.open(path, "w") as archive:
        for number, record in enumerate(records):
            for suffix, content in (("jpg", b"x"), ("json", json.dumps(record).encode())):
                info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints one line per figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    rows = commands.add_parser("rows")
    rows.add_argument("--rows", type=int, default=1_000_000)
    rows.add_argument("--formats", nargs="+", choices=tuple(_KIND), default=["array", "lines", "parquet"])
    workers = commands.add_parser("workers")
    workers.add_argument("--workers", type=int, default=2)
    workers.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.command == "workers":
            found = measure_workers(Path(folder), arguments.workers, arguments.epochs)
            print("MiB of the largest worker after each epoch: " + " ".join(f"{mib:.1f}" for mib in found))
            return
        for name in arguments.formats:
            figures = measure_rows(Path(folder), name, arguments.rows)
            told = [f"{seconds:.2f} s, {mib:.0f} MiB" for seconds, mib in figures]
            print(f"{name}: {arguments.rows} rows, first opening {told[0]}; again {told[1]}", flush=True)


if __name__ == "__main__":
    main()
