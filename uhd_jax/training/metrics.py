"""What a run reports: JSONL always, TensorBoard, and the console. Formulas are in docs/metrics.md."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from uhd_jax.batch import Batch
from uhd_jax.cost import Work, batch_work, bucket_work

JSONL_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Fill:
    """How much of the steps' static shapes was used; adds up over steps."""

    used: Work = Work()
    room: Work = Work()
    images: float = 0.0

    def __add__(self, other: Fill) -> Fill:
        return Fill(self.used + other.used, self.room + other.room, self.images + other.images)

    @classmethod
    def of(cls, batch: Batch, info: Mapping[str, Any]) -> Fill:
        """Of one batch, still in NumPy; `info["images"]`, where given, is its number of images."""
        return cls(batch_work(batch), bucket_work(batch.bucket), float(info.get("images", 0)))

    def numbers(self, share: float = 1.0) -> list[float]:
        """All counts, each times `share`, in a row."""
        used, room = dataclasses.astuple(self.used), dataclasses.astuple(self.room)
        return [share * count for count in (*used, *room, self.images)]

    @classmethod
    def of_numbers(cls, numbers: Sequence[float]) -> Fill:
        """The inverse of `numbers()`."""
        half = len(numbers) // 2
        return cls(Work(*numbers[:half]), Work(*numbers[half:-1]), numbers[-1])

    def waste(self) -> dict[str, float]:
        """Shares of the arrays that are padding: of all slots, of all patches of all slots, of all tokens."""

        def share(used, room):
            return 1.0 - used / room if room else 0.0

        return {
            "padding_waste_slots": share(self.used.views, self.room.views),
            "padding_waste_patches": share(self.used.patches, self.room.patches),
            "padding_waste_tokens": share(self.used.tokens, self.room.tokens),
        }


class MetricsError(RuntimeError):
    """A metrics file cannot be written; the message names it and says what to do."""


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MetricsError(
            f"cannot write {path}: {error.strerror or error}. Free some space or mend the folder's permissions, then "
            f"start again: the run goes on from its last checkpoint"
        ) from error


class JsonlWriter:
    """One JSON object per line; a number that is not finite is written as null.

    Floats are written so that they read back exactly. On resume the lines of steps after the restored one go, so that
    every step stands in the file once.
    """

    def __init__(self, path: Path, restored_step: int):
        self._path = path
        with _writing(path):
            kept = []
            if path.exists():
                for line in path.read_text().splitlines():
                    try:
                        record = json.loads(line)
                    except json.JSONDecodeError:  # the line that was being written when the run was killed
                        continue
                    if record["step"] <= restored_step:
                        kept.append(line + "\n")
            partial = path.with_name(path.name + ".partial")
            partial.write_text("".join(kept))
            os.replace(partial, path)
            self._file = path.open("a")

    def write(self, record: Record) -> None:
        """Appends a record; after this a kill of the process does not lose it. Raises MetricsError."""
        with _writing(self._path):
            self._file.write(json.dumps({key: _finite(value) for key, value in record.items()}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file. Raises MetricsError."""
        with _writing(self._path):
            self._file.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoardWriter:
    """Scalars by step; events after the restored step are hidden on resume.

    Writes in the caller's thread: the library's own writer thread dies of a full disk, and the training that waits for
    it then hangs.
    """

    def __init__(self, folder: Path, restored_step: int):
        self._path = folder
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._events = EventsWriter(str(folder / "events"), f".{os.getpid()}")
            start = SessionLog(status=SessionLog.SessionStatus.START)
            self._events.write_event(Event(wall_time=time.time(), step=restored_step + 1, session_log=start))

    def write(self, record: Record) -> None:
        """Writes the record's numbers. Raises MetricsError."""
        values = [
            Summary.Value(tag=key, simple_value=value)
            for key, value in record.items()
            if key != "step" and isinstance(value, int | float)
        ]
        with _writing(self._path):
            self._events.write_event(Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values)))
            self._events.flush()

    def close(self) -> None:
        """Closes the file. Raises MetricsError."""
        with _writing(self._path):
            self._events.close()


class Console:
    """A progress bar on a terminal; elsewhere one plain line per record and message.

    Until it is closed it also shows what the package logs, which would otherwise tear the bar.
    """

    def __init__(self, total_steps: int, step: int, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._total = total_steps
        self._bar = None
        self._logged, self._level = _Said(self.say, logging.INFO), _LOGGER.level
        _LOGGER.addHandler(self._logged)
        if self._level == logging.NOTSET:
            _LOGGER.setLevel(logging.INFO)
        _LOGGER.propagate = False
        if self._stream.isatty() and _has_width(self._stream):
            self._bar = tqdm(total=total_steps, initial=step, unit="step", file=self._stream, dynamic_ncols=True)

    def step(self, stage: str) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.set_description(stage, refresh=False)
            self._bar.update()

    def write(self, record: Record) -> None:
        """Shows the most wanted numbers of a record."""
        shown = (
            f"loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}  grad {record['grad_norm']:.2f}  "
            f"{record['tokens_per_second']:.0f} tok/s  {record['images_per_second']:.1f} img/s"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
        else:
            self.say(f"{record['stage']} step {record['step']}/{self._total}  {shown}")

    def say(self, message: str) -> None:
        """Shows a message."""
        if self._bar is not None:
            self._bar.write(message, file=self._stream)
        else:
            print(message, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        _LOGGER.removeHandler(self._logged)
        _LOGGER.setLevel(self._level)
        _LOGGER.propagate = True
        if self._bar is not None:
            self._bar.close()


class Quiet:
    """The console of a process that is not the first of its run: the package's warnings, and nothing else."""

    def __init__(self, prefix: str, stream: TextIO | None = None):
        self._warnings = _Said(lambda message: print(prefix + message, file=stream or sys.stderr, flush=True))
        _LOGGER.addHandler(self._warnings)
        _LOGGER.propagate = False

    def step(self, stage: str) -> None:
        """Shows nothing."""

    def write(self, record: Record) -> None:
        """Shows nothing."""

    def say(self, message: str) -> None:
        """Shows nothing."""

    def close(self) -> None:
        """Stops showing warnings."""
        _LOGGER.removeHandler(self._warnings)
        _LOGGER.propagate = True


_LOGGER = logging.getLogger("uhd_jax")


class _Said(logging.Handler):
    """Says what is logged."""

    def __init__(self, say: Callable[[str], None], level: int = logging.WARNING):
        super().__init__(level)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(self.format(record))


def _has_width(terminal: TextIO) -> bool:
    """False for terminals that do not know how wide they are, as in some containers: a bar would be cut to nothing."""
    try:
        return os.get_terminal_size(terminal.fileno()).columns > 0
    except (OSError, ValueError):  # none of the system's
        return True


class Meter:
    """Sums over the steps since the last record."""

    def __init__(self):
        self._reset()

    def _reset(self):
        self.steps, self.fill, self.flops, self.wait_seconds, self.seconds = 0, Fill(), 0.0, 0.0, 0.0

    def add(self, fill: Fill, flops: float, wait_seconds: float, seconds: float) -> None:
        """Adds a step: what it held, its FLOPs, how long it waited for data, how long it took in all."""
        self.steps += 1
        self.fill += fill
        self.flops += flops
        self.wait_seconds += wait_seconds
        self.seconds += seconds

    def take(self, peak: float) -> dict[str, float]:
        """The rates since the last call, and a new start. `peak` is the devices' FLOP/s."""
        seconds = max(self.seconds, 1e-9)
        rates = {
            "step_seconds": seconds / max(1, self.steps),
            "tokens_per_second": self.fill.used.tokens / seconds,
            "images_per_second": self.fill.images / seconds,
            "views_per_second": self.fill.used.views / seconds,
            **self.fill.waste(),
            "data_wait_fraction": min(1.0, self.wait_seconds / seconds),
            "flop_utilisation": self.flops / seconds / peak,
        }
        self._reset()
        return rates


def to_number(value: Any) -> int | float:
    """A Python number from a NumPy or Python scalar."""
    return value if isinstance(value, int | float) else np.asarray(value).item()
