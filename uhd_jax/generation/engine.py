"""Answers for many at once: a thread that owns a running batch, and a queue of requests that wait for it.

First come, first served: requests are admitted in the order in which they came, and none overtakes another. A request
that is being read in gives way to one step of the running ones after every run of the tower, so their answers go on.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.sharding import Mesh

from uhd_jax.generation.assistant import Assistant, Prepared
from uhd_jax.generation.prompt import PromptError
from uhd_jax.generation.request import AnswerOptions, Likely, Request
from uhd_jax.generation.runner import Runner
from uhd_jax.generation.shapes import Shapes
from uhd_jax.generation.visual import CACHE_BYTES, VisualCache, VisualEncoder

_log = logging.getLogger(__name__)

CANCELLED, EXPIRED, FAILED, CLOSED = "cancelled", "expired", "failed", "closed"


class PromptTooLong(PromptError):
    """Prompt and answer have no room in the cache."""


class EngineFull(RuntimeError):
    """So many requests are waiting that this one was not taken."""


class EngineClosed(RuntimeError):
    """The engine takes no more requests: it was closed, or a program failed in a way that it cannot go on from."""


class Engine:
    """Answers requests on a thread of its own, in programs that are all compiled at its start.

    Args:
      assistant: the model.
      shapes: of its programs.
      max_waiting: requests that may wait; more are refused.
      modes: what requests may ask for, as of `ModelConfig.mode`.
      cache_bytes: for visual tokens.
      params: the parameters, where they lie on a mesh; None for the assistant's.
      mesh: as of `Runner`.
    """

    def __init__(
        self,
        assistant: Assistant,
        shapes: Shapes,
        *,
        max_waiting: int = 256,
        modes: Sequence[str] | None = None,
        cache_bytes: int = CACHE_BYTES,
        params: Any = None,
        mesh: Mesh | None = None,
    ):
        self.assistant, self.shapes, self.max_waiting = assistant, shapes, max_waiting
        self.modes = tuple(modes or (assistant.config.mode,))
        params = assistant.params if params is None else params
        self.encoder = VisualEncoder(assistant.config, params, VisualCache(cache_bytes), mesh)
        self._runner = Runner(assistant.config, params, self.encoder, shapes, mesh)
        self.broken: BaseException | None = None
        self._waiting: collections.deque[Request] = collections.deque()
        self._admitting: Iterator[None] | None = None
        self._group: list[Request] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="generation", daemon=True)

    def start(self) -> None:
        """Compiles all programs, then begins to answer."""
        self._runner.warm_up(self.modes)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that hold no row yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that hold rows of the running batch."""
        return len(self._runner.running)

    @property
    def steps(self) -> int:
        """Decode steps so far."""
        return self._runner.steps

    def check(self, prepared: Prepared, options: AnswerOptions) -> None:
        """Whether a request can ever be answered here.

        Raises:
          PromptError: it is too long, has more beams than there are rows, or asks for a mode that is not served.
        """
        length, most = len(prepared.token_ids), self.shapes.length
        if length + options.max_new_tokens > most:
            asked = f"a prompt of {length} tokens and max_new_tokens={options.max_new_tokens}"
            raise PromptTooLong(f"{asked} exceed the room for {most} tokens")
        if options.beams > self.shapes.rows:
            raise PromptError(f"beams={options.beams}: only {self.shapes.rows} sequences go on at a time")
        for picture in prepared.pictures:
            if picture.mode not in self.modes:
                raise PromptError(f"mode {picture.mode!r}: only {', '.join(self.modes)} can be asked for")

    def submit(
        self,
        prepared: Prepared,
        options: AnswerOptions,
        *,
        seconds: float | None = None,
        on_text: Callable[[str, list[Likely]], None] | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> Request:
        """Queues a prompt; the callbacks are called on the engine's thread, or on the one that ends the request.

        Args:
          prepared: what `Assistant.prepare` made.
          options: what is asked of the answer.
          seconds: after so many it is given up, with the reason `EXPIRED`.
          on_text: as of `Request`.
          on_end: as of `Request`; `Request.reason` is then known.

        Raises:
          EngineClosed, EngineFull: see there.
          PromptError: as of `check`.
        """
        self.check(prepared, options)
        request = Request(
            prepared.sample, prepared.pictures, options, self.assistant.tokenizer, self.assistant.ends, on_text, on_end
        )
        request.deadline = None if seconds is None else time.monotonic() + seconds
        with self._changed:
            if self._closing or self.broken:
                raise EngineClosed("no more requests are taken")
            if len(self._waiting) >= self.max_waiting:
                raise EngineFull(f"{len(self._waiting)} requests are waiting already")
            self._waiting.append(request)
            self._changed.notify()
        return request

    def cancel(self, request: Request, reason: str = CANCELLED) -> None:
        """Gives up a request, which frees its place; nothing happens where it has ended."""
        with self._changed:
            if request in self._waiting:
                self._waiting.remove(request)
            request.finish(reason)
            self._changed.notify()

    def close(self, seconds: float = 0.0) -> None:
        """Takes no more requests, lets those that came so far end within so many seconds, and ends the others."""
        deadline = time.monotonic() + seconds
        with self._changed:
            self._closing = True
            self._changed.notify()
        while (self._waiting or self.running or self._admitting) and time.monotonic() < deadline and not self.broken:
            time.sleep(0.01)
        with self._changed:
            for request in [*self._waiting, *self._group, *self._runner.running]:
                request.finish(CLOSED)
            self._waiting.clear()
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=60)

    def _serve(self) -> None:
        try:
            while self._wait():
                self._expire()
                self._admit()
                self._runner.step()
        except BaseException as error:  # whatever it is, those who wait must be told
            _log.exception("generation cannot go on")
            with self._changed:
                self.broken = error
                for request in [*self._waiting, *self._group, *self._runner.running]:
                    request.finish(FAILED)
                self._waiting.clear()

    def _wait(self) -> bool:
        """Until there is something to do; False when there is nothing and never will be."""
        with self._changed:
            while not (self._waiting or self._runner.running or self._admitting):
                if self._closing:
                    return False
                self._changed.wait()
            return True

    def _expire(self) -> None:
        now = time.monotonic()
        with self._changed:
            late = [
                request
                for request in [*self._waiting, *self._runner.running]
                if request.deadline is not None and now > request.deadline
            ]
        for request in late:
            self.cancel(request, EXPIRED)

    def _admit(self) -> None:
        """One stretch of reading in the next requests."""
        if self._admitting is None:
            with self._changed:
                self._group = self._runner.next_group(self._waiting)
            if not self._group:
                return
            self._admitting = self._runner.admit(self._group)
        if all(request.reason for request in self._group):  # given up meanwhile
            self._admitting.close()
            return self._admitted()
        try:
            next(self._admitting)
        except StopIteration:
            self._admitted()
        except Exception:
            if not self._runner.intact:
                raise
            _log.exception("a request could not be read in")
            for request in self._group:
                request.finish(FAILED)
            self._admitted()

    def _admitted(self) -> None:
        for request in self._group:
            if request.reason is not None and not request.dispatched:
                self._runner.release(request)
        self._admitting, self._group = None, []
