"""The running batch: requests join it, go on together a token at a time, and leave it; its programs stay the same.

Dimension letters as in `generation.decode`.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from uhd_jax.config import ModelConfig
from uhd_jax.generation import decode
from uhd_jax.generation.request import Likely, Request
from uhd_jax.generation.sampling import empty_draws, set_draws
from uhd_jax.generation.shapes import Shapes, fit
from uhd_jax.generation.visual import VisualEncoder, placed


class _InFlight(NamedTuple):
    """A program that was started: for whom, at which places of its result, and the result."""

    places: list[tuple[Request, list[int]]]
    chosen: decode.Chosen


class Runner:
    """Not safe for threads: one thread calls it, as `generation.engine` does.

    The device is told to go on before the host has looked at the tokens of the step before, so it does not wait for the
    host; what it then does for a request that has just ended is thrown away.

    Args:
      config: the model.
      params: its parameters.
      encoder: for images.
      shapes: of all programs.
      mesh: where the parameters lie; `shapes.rows`, `prefill_rows` and `views` are then multiples of its data and fsdp.
    """

    def __init__(
        self, config: ModelConfig, params: Any, encoder: VisualEncoder, shapes: Shapes, mesh: Mesh | None = None
    ):
        self.config, self.encoder, self.shapes, self.mesh = config, encoder, shapes, mesh
        params = decode.as_computed(params, config)
        self.params = params if mesh else decode.as_read(params)
        self.running: list[Request] = []
        self.steps = 0
        self._free = list(range(shapes.rows))[::-1]
        self._in_flight: collections.deque[_InFlight] = collections.deque()
        self._state = decode.start(config, shapes.rows, shapes.length, mesh)

    @property
    def free_rows(self) -> int:
        """Rows that no request holds."""
        return len(self._free)

    @property
    def intact(self) -> bool:
        """Whether the cache is still there: a program that fails has consumed it."""
        return not any(leaf.is_deleted() for leaf in jax.tree.leaves(self._state))

    def run(self, requests: Sequence[Request]) -> None:
        """Answers all of them, the first first."""
        waiting = collections.deque(requests)
        while waiting or self.running:
            while group := self.next_group(waiting):
                for _ in self.admit(group):
                    pass
            self.step()

    def next_group(self, waiting: collections.deque[Request]) -> list[Request]:
        """Takes those from the head of the queue that can be admitted together."""
        group, free = [], self.free_rows
        while waiting and len(group) < self.shapes.prefill_rows and waiting[0].options.beams <= free:
            group.append(waiting.popleft())
            free -= group[-1].options.beams
        return group

    def admit(self, group: Sequence[Request]) -> Iterator[None]:
        """Encodes the images of requests and reads their prompts. Yields where steps of the others may come between."""
        for request in group:
            request.rows = [self._free.pop() for _ in range(request.options.beams)]
        self.running += group
        pictures = [picture for request in group for picture in request.pictures]
        encoded: list[np.ndarray] = []
        for tokens in self.encoder.encode(pictures, self.shapes) if pictures else ():
            if tokens is None:
                yield
            else:
                encoded = tokens
        prompts, draws = self._prompts(group, encoded)
        self._state, chosen = decode.prefill(self.params, self._state, prompts, draws, self.config, self.mesh)
        for request in group:
            request.dispatched = 1
        self._in_flight.append(_InFlight([(request, [place]) for place, request in enumerate(group)], chosen))

    def step(self) -> None:
        """One more token for every request that has room for one."""
        for request in [request for request in self.running if request.reason is not None and request.dispatched]:
            self.release(request)  # it was ended from outside
        if any(request.beams for request in self.running):
            self._look(0)  # beams are chosen on the host
        step, draws, window, going_on = self._next_step()
        if not going_on:
            self._look(0)
            return
        likeliest = any(request.beams or request.options.likeliest for request, _ in going_on)
        self._state, chosen = decode.decode(
            self.params, self._state, step, draws, self.config, window, likeliest, self.mesh
        )
        self.steps += 1
        for request, _ in going_on:
            request.dispatched += 1
        self._in_flight.append(_InFlight(going_on, chosen))
        self._look(1)

    def release(self, request: Request) -> None:
        """Frees the rows of a request, whether it has ended or not."""
        if request in self.running:
            self.running.remove(request)
            self._free += request.rows
            request.rows = []

    def warm_up(self, modes: Sequence[str]) -> None:
        """Compiles everything, by running it on nothing. Only while no request is running."""
        self.encoder.warm_up(modes, self.shapes)
        rows, width = self.shapes.rows, self.config.decoder.width
        step = decode.Step(np.zeros(rows, np.int32), np.zeros(rows, np.int32), np.arange(rows, dtype=np.int32))
        for length in self.shapes.lengths:
            prompts = _no_prompts(self.shapes, length, width, self.config.dtype)
            draws = empty_draws(self.shapes.prefill_rows)
            self._state, _ = decode.prefill(self.params, self._state, prompts, draws, self.config, self.mesh)
            for likeliest in (False, True):
                self._state, chosen = decode.decode(
                    self.params, self._state, step, empty_draws(rows), self.config, length, likeliest, self.mesh
                )
        np.asarray(chosen.tokens)

    def _prompts(self, group, encoded):
        length = fit(max(request.length for request in group), self.shapes.lengths)
        prompts = _no_prompts(self.shapes, length, self.config.decoder.width, self.config.dtype)
        draws = empty_draws(self.shapes.prefill_rows)
        used = 0
        for place, request in enumerate(group):
            sample, count = request.sample, len(request.pictures)
            prompts.tokens[place, : request.length] = sample.tokens
            prompts.lengths[place], prompts.rows[place] = request.length, request.rows[0]
            at = np.flatnonzero(sample.view >= 0)
            if len(at):
                own = encoded[used : used + count]
                prompts.visual[place, at] = placed(own, sample.plans, sample.view[at], sample.view_token[at])
                prompts.is_visual[place, at] = True
            used += count
            request.pictures = ()  # a waiting answer need not hold them any longer
            self._set_draws(draws, place, request, 0)
        return prompts, draws

    def _next_step(self):
        rows = self.shapes.rows
        step = decode.Step(np.full(rows, -1, np.int32), np.zeros(rows, np.int32), np.arange(rows, dtype=np.int32))
        draws, going_on = empty_draws(rows), []
        for request in self.running:
            if not 0 < request.dispatched < request.options.max_new_tokens:
                continue
            for beam, row in enumerate(request.rows):
                step.index[row] = request.length + request.dispatched - 1
                if request.beams:
                    parent = 0 if request.dispatched == 1 else request.parents[beam]
                    step.parents[row] = request.rows[parent]
                    step.tokens[row] = request.beams.last_tokens[beam]
                self._set_draws(draws, row, request, request.dispatched)
            going_on.append((request, list(request.rows)))
        return step, draws, fit(int(step.index.max()) + 1, self.shapes.lengths), going_on

    def _set_draws(self, draws, row, request, step):
        vocab_size, beams = self.config.decoder.vocab_size, request.beams is not None
        set_draws(draws, row, request.options.sampling, step, vocab_size, beams)

    def _look(self, ahead: int) -> None:
        """Looks at the results of all started programs but the last `ahead`."""
        while len(self._in_flight) > ahead:
            places, chosen = self._in_flight.popleft()
            tokens, own, likeliest, log_probabilities = (None if a is None else np.asarray(a) for a in chosen)
            for request, at in places:
                if request.reason is None:
                    if request.beams:
                        request.take_beams(likeliest[at], log_probabilities[at])
                    else:
                        (row,) = at
                        likely = None
                        if likeliest is not None:
                            likely = Likely(int(tokens[row]), float(own[row]), likeliest[row], log_probabilities[row])
                        request.take(int(tokens[row]), likely)
                if request.reason is not None:
                    self.release(request)


def _no_prompts(shapes: Shapes, length: int, width: int, dtype: str) -> decode.Prompts:
    rows = shapes.prefill_rows
    return decode.Prompts(
        tokens=np.zeros((rows, length), np.int32),
        lengths=np.zeros(rows, np.int32),
        visual=np.zeros((rows, length, width), jnp.dtype(dtype)),
        is_visual=np.zeros((rows, length), bool),
        rows=np.full(rows, shapes.rows, np.int32),
    )
