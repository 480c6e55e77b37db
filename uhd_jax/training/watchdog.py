"""Says where a run hangs: what every thread is doing once nothing has moved for a while."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax

logger = logging.getLogger(__name__)


class Watchdog:
    """Waits beside the training, in a thread of its own, for signs of life."""

    def __init__(self, workdir: Path, seconds: float, ends: bool = False):
        """Args:
        workdir: where the stacks are written to, as `stacks-process-I.txt`.
        seconds: without a sign of life, after which they are, again and again; 0: never.
        ends: end the process then, with status 1, so that its launcher starts the run again.
        """
        self.path = workdir / f"stacks-process-{jax.process_index()}.txt"
        self._seconds, self._ends = seconds, ends
        self._alive, self._last, self._doing = threading.Event(), time.monotonic(), "starting"
        self._stopped = False

    def alive(self, doing: str) -> None:
        """A sign of life, and what is done next."""
        self._last, self._doing = time.monotonic(), doing
        self._alive.set()

    def _watch(self) -> None:
        while not self._stopped:
            if self._alive.wait(self._seconds):
                self._alive.clear()
            elif not self._stopped:
                self._report()

    def _report(self) -> None:
        silent = time.monotonic() - self._last
        try:
            with self.path.open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {silent:.0f} s since {self._doing}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            where = f"what its threads do is in {self.path}"
        except OSError as error:  # the storage may be what hangs
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
            where = f"what its threads do stands above ({self.path}: {error.strerror})"
        logger.warning(
            "process %d hangs: nothing has moved for %.0f s, since %s; %s. %s; train.hang_seconds sets the limit",
            jax.process_index(),
            silent,
            self._doing,
            where,
            "It ends now" if self._ends else "Kill it to go on from its last checkpoint",
        )
        if self._ends:
            os._exit(1)

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watchdog]:
        """Watches for the length of a block; does nothing where `seconds` is 0."""
        if not self._seconds:
            yield self
            return
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stopped = True
            self._alive.set()
            thread.join()
