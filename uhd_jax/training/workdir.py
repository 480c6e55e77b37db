"""A run's folder: made if absent, and kept from other runs while this one is at work in it."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path

import jax

LOCK_FILE = ".training.lock"
SEE_SECONDS = 60.0  # for which other processes wait for the first to have written it


class WorkdirError(RuntimeError):
    """The folder cannot be worked in; the message names it and says what to do."""


@contextlib.contextmanager
def claimed(workdir: Path) -> Iterator[None]:
    """Makes the folder and holds a lock on it. The system lets go of the lock however the process ends.

    Of several processes of one run, the first holds the lock for all.

    Raises:
      WorkdirError: another run is at work there, the folder cannot be made or written, or is not the one that the
        run's first process sees.
    """
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                _lock(stack.enter_context(open(workdir / LOCK_FILE, "a")))
            else:
                _see(workdir / LOCK_FILE)
        except BlockingIOError:
            raise WorkdirError(
                f"{workdir}: another training is at work there. Wait for its end, or use another workdir"
            ) from None
        except (FileExistsError, NotADirectoryError):
            raise WorkdirError(f"{workdir} is a file, or lies below one; use another workdir") from None
        except OSError as error:
            raise WorkdirError(f"{workdir} cannot be made or written: {error.strerror}") from error
        yield


def _see(file: Path) -> None:
    end = time.monotonic() + SEE_SECONDS
    while not file.exists():
        if time.monotonic() > end:
            raise WorkdirError(
                f"{file.parent}: process {jax.process_index()} does not see there what process 0 wrote. All processes "
                f"need the same folder, on storage that their machines share"
            )
        time.sleep(0.1)


def _lock(file) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass  # some network file systems know no locks; training there works all the same
