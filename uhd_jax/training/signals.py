"""SIGTERM and SIGINT while a run is on: the step in progress is finished, waiting for data is not."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Interrupted(BaseException):
    """A signal came while the run waited. No `Exception`: nothing it passes is to take it for an error of its own."""


class Signals:
    """Notes the first SIGTERM or SIGINT. After it a SIGINT ends the process as if nobody had listened."""

    def __init__(self):
        self.received: int | None = None
        self._waiting = False
        self._before: dict[int, Any] = {}

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While in this, a signal raises `Interrupted` wherever the main thread is; so does one received before."""
        self._waiting = True
        try:
            if self.received:
                raise Interrupted
            yield
        finally:
            self._waiting = False

    def _note(self, number, frame):
        self.received = self.received or number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._waiting:
            self._waiting = False  # impatient managers send it again: not into what cleans up behind the first
            raise Interrupted

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
            for number in self._before:
                signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)
