"""What goes wrong with Orbax's files, as one error that says what to do, and without the noise beside it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from traceback import walk_tb
from types import TracebackType
from typing import Any

FOLDER = "checkpoints"
MODEL_FILE = "model.json"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names the folder and what to do."""


def newest_step(workdir: str | os.PathLike[str]) -> int | None:
    """Step of the newest complete checkpoint of a run; None when there is none. Makes and locks nothing."""
    return max(steps_in(Path(workdir) / FOLDER), default=None)


def steps_in(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, in no order."""
    return [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]


@contextlib.contextmanager
def reading(folder: Path, parts: Sequence[str] = ()) -> Iterator[None]:
    """Turns whatever goes wrong into a CheckpointError about the checkpoint or saved model in `folder`."""
    others = [step for step in steps_in(folder.parent) if str(step) != folder.name]
    if (folder / MODEL_FILE).is_file():
        advice = "copy it there again, or save it again with save_model"
    elif others:
        advice = f"delete {folder} to go on from checkpoint {max(others)}"
    else:
        advice = "no other checkpoint is there: copy it there again, or train again"
    lacking = [part for part in parts if not (folder / part).is_dir()]
    if lacking:
        raise CheckpointError(f"{folder} lacks {', '.join(lacking)}; {advice}")
    try:
        with quiet_orbax():
            yield
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be read; {advice}. Cause: {_brief(error)}") from error


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """`silence_orbax` for the length of a block."""
    unsilence = silence_orbax()
    yield
    unsilence()  # not after an error: what went wrong in other threads is printed whenever they come to it


def silence_orbax() -> Callable[[], None]:
    """Holds back what Orbax and its threads print, and returns what ends that.

    Orbax warns of files it can do without. When a disk is full or a file is damaged, it raises one error and prints
    pages beside it, from its threads, from tasks that nobody awaits and from TensorStore, for as long as they last.
    """
    unraisablehook = sys.unraisablehook

    def to_show(record: logging.LogRecord) -> bool:
        return not (_of_orbax(Path(record.pathname)) or (record.exc_info and _from_orbax(*record.exc_info[1:])))

    def on_unraisable(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
        of_orbax = _from_orbax(unraisable.exc_value, unraisable.exc_traceback)
        if not (of_orbax or (code and _of_orbax(Path(code.co_filename)))):
            unraisablehook(unraisable)

    def end() -> None:
        for logger in loggers:
            logger.removeFilter(to_show)
        if sys.unraisablehook is on_unraisable:
            sys.unraisablehook = unraisablehook

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:
        logger.addFilter(to_show)
    sys.unraisablehook = on_unraisable
    return end


def _from_orbax(error: BaseException | None, traceback: TracebackType | None) -> bool:
    files = [Path(frame.f_code.co_filename) for frame, _ in walk_tb(traceback)]
    # TensorStore's own errors, in tasks of their own; and its calling back to where nobody waits any more.
    alone = any(words in str(error) for words in ("tensorstore", "OCDBT", "Event loop is closed"))
    return any(map(_of_orbax, files)) or (alone and all("asyncio" in file.parts for file in files))


def _of_orbax(file: Path) -> bool:
    return "orbax" in file.parts


def _brief(error: BaseException) -> str:
    """The first line of where the error came from; storage libraries append pages of context."""
    while error.__cause__:
        error = error.__cause__
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    line = next(iter(str(error).strip().splitlines()), "")[:300]
    return line if isinstance(error, CheckpointError) else f"{type(error).__name__}: {line}"


def cannot_write(directory: Path, error: BaseException) -> str:
    """The message about a checkpoint or model that could not be written to `directory`."""
    there = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(there).free / 2**20
    return (
        f"cannot write {directory} ({free:.0f} MiB free there). Free some space or mend the folder's permissions; what "
        f"was complete before is intact. Cause: {_brief(error)}"
    )
