"""The input pipeline: shuffled samples, packed in windows, rendered ahead of the device, resumable at any batch.

`data.windows` decides which samples share which batch, and what a position is. Nothing in that depends on prefetching,
on worker processes or on the number of hosts, and a run resumed from a position continues with the same batches, bit
for bit.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import logging
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from uhd_jax.batch import Batch, Bucket, empty_batch, patches_shape
from uhd_jax.config import ConfigError, ModelConfig, StageConfig, TrainConfig
from uhd_jax.data.balance import patches_of
from uhd_jax.data.batch_memory import BatchMemory
from uhd_jax.data.buckets import Fill, fill_of
from uhd_jax.data.chat import ChatError, EncodedSample
from uhd_jax.data.dropped import DroppedList
from uhd_jax.data.known import Known
from uhd_jax.data.packing import clear_padding, fill_batch, rooms_for_views
from uhd_jax.data.prepare import Prepared
from uhd_jax.data.sources import Source, SourceError
from uhd_jax.data.tokenizer import Tokenizer, load_tokenizer
from uhd_jax.data.windows import (
    COUNTERS,
    DECODED,
    KEPT,
    MALFORMED,
    REFUSED,
    START,
    PipelineError,
    Position,
    Problem,
    Window,
    WindowPlanner,
)
from uhd_jax.data.workers import cores
from uhd_jax.slicing.plan import ImageRefused

REPORTS = 20  # samples per stage and counter that are named in the log
CLOSE_SECONDS = 1.0  # for which the end of a sample that is being read is waited for
CLOSING = "uhd_jax-close"  # name of the threads that wait longer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BatchInfo:
    """What is known about a batch on the host; counts are of this host's rows."""

    bucket: Bucket
    samples: int
    images: int
    views: int
    tokens: int
    trained_tokens: int
    fill: Fill
    epoch: float  # of the stream, after this batch's window
    read: int  # samples of the stream, over all hosts, up to the end of this batch's window
    waiting: int  # samples left over by the window, to be packed in the next
    row_patches: tuple[int, ...]  # `patches_of` every row of all hosts
    damaged: Mapping[str, int]  # `DECODED`, of this batch: samples of this host's rows whose pixels cannot be read
    counters: Mapping[str, int]  # `COUNTERS`, over all hosts' samples planned so far; for damaged ones see `together`


def make_iterator(
    stage: StageConfig,
    model: ModelConfig,
    train: TrainConfig,
    source: Source,
    tokenizer: Tokenizer | None = None,
    process: tuple[int, int] = (0, 1),
    dropped: Path | None = None,
    together: bool = False,
    known: Known | None = None,
) -> BatchIterator:
    """An endless iterator over the batches of a stage.

    Args:
      stage: rows, row length, slice limit, buckets.
      model: slicing, chat and mode.
      train: seed, packing window, prefetch depth and number of worker processes.
      source: the samples.
      tokenizer: default: the one that `model.chat` names.
      process: index and count of hosts. Every host plans all rows and renders its own part of them.
      dropped: a file to which every sample that is left out is added once, as a line of JSON: where, counter, reason.
      together: whether `count_damaged` is called with the damaged samples of all hosts; else `counters` has this one's.
      known: what an index says of the samples, from which they are then planned; the batches are the same.

    Raises:
      ConfigError: buckets that contradict the stage, rows that the hosts cannot share, or a decoder with fewer ids
        than the tokenizer.
      PipelineError: no usable sample in the source.
    """
    tokenizer = tokenizer or load_tokenizer(model.chat.tokenizer, model.chat)
    if tokenizer.vocab_size > model.decoder.vocab_size:  # a larger id would read another token's embedding
        raise ConfigError(
            f"model.decoder.vocab_size: tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, "
            f"the decoder only {model.decoder.vocab_size}"
        )
    planner = WindowPlanner(stage, model, train, source, tokenizer, known)
    return BatchIterator(planner, train, process, dropped, together)


class BatchIterator:
    """Yields (Batch of NumPy arrays, BatchInfo); prepares batches ahead in a thread or in worker processes."""

    def __init__(
        self,
        planner: WindowPlanner,
        train: TrainConfig,
        process: tuple[int, int],
        dropped: Path | None,
        together: bool = False,
    ):
        if planner.stage.rows % process[1]:
            raise ConfigError(f"rows: {process[1]} hosts cannot share {planner.stage.rows} rows evenly")
        self._planner = planner
        self._train = train
        self._process = process
        self._position = START
        self._counters = Counter(dict.fromkeys(COUNTERS, 0))
        self._together, self._damaged = together, Counter(dict.fromkeys(DECODED, 0))  # of all hosts, as they were told
        self._running: list[grain.DatasetIterator] = []  # none or one
        self._reported: defaultdict[str, set[int]] = defaultdict(set)
        self._dropped = DroppedList(dropped) if dropped else None
        # Also when the program ends without `close`: Grain's threads do not survive the end of the interpreter quietly.
        weakref.finalize(self, _close_all, self._running)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The static shapes of this host's batches; no other will come."""
        rows = self._planner.stage.rows // self._process[1]
        patch_bytes = self._planner.model.tower.patch_bytes
        return tuple(Bucket(rows, b.slots, b.tokens, b.patches, patch_bytes) for b in self._planner.buckets)

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> tuple[Batch, BatchInfo]:
        if not self._running:
            self._running.append(iter(self._dataset()))
        try:
            batch, info, problems, self._position = next(self._running[0])
        except BaseException as error:
            self.close()  # whoever tries again gets this batch, not the one prefetched after it
            if isinstance(error, PipelineError):
                self._report(error.problems)  # "those named in the log"
            raise
        self._counters.update(problem.counter for problem in problems)
        if self._together:  # what the hosts know all of them: else one that finds too much would end alone
            self._counters.subtract(info.damaged)
        self._report(problems)
        self._planner.check_share(self._counters + self._damaged, info.read)
        return batch, dataclasses.replace(info, counters=dict(self._counters))

    def count_damaged(self, counts: Sequence[float]) -> dict[str, int]:
        """Counts the samples that all hosts together found damaged in a batch, in the order of `DECODED`.

        All hosts have to call it between the same two batches: the next one may be refused for it.

        Returns:
          All that were told so far, by counter. They are in `get_state`, but not in `BatchInfo.counters`.
        """
        self._damaged.update(dict(zip(DECODED, (round(count) for count in counts), strict=True)))
        return dict(self._damaged)

    def _report(self, problems: Sequence[Problem]) -> None:
        """Logs each sample once: it comes again in every epoch. Here, because workers have no log that is shown."""
        for index, counter, reason in problems:
            if self._dropped and counter not in KEPT:
                self._dropped.add(self._planner.where(index), counter, reason)
            reported = self._reported[counter]
            if index in reported or len(reported) > REPORTS:
                continue
            reported.add(index)
            if len(reported) > REPORTS:
                logger.warning("%s: further ones are only counted, as data/%s in the metrics", counter, counter)
            else:
                logger.warning("%s: %s: %s", self._planner.where(index), counter, reason)

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands, after the batches handed out (not those prefetched); JSON types only."""
        return {
            "position": {**dataclasses.asdict(self._position), "carried": list(self._position.carried)},
            "counters": {name: count + self._damaged[name] for name, count in self._counters.items()},
            "fingerprint": self._planner.fingerprint,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues where `get_state` was called, whatever the prefetch depth, the workers and the hosts are now.

        Raises:
          PipelineError: the state is of another stage, seed, source size, slicing or tokenizer.
        """
        if state["fingerprint"] != self._planner.fingerprint:
            raise PipelineError(
                f"stage {self._planner.stage.name!r}: the saved data position belongs to another data configuration "
                "(source, slicing, chat, row length, rows, seed or packing window changed); "
                "restore the old configuration or start a new run"
            )
        self.close()
        position = state["position"]
        self._position = Position(position["start"], tuple(position["carried"]), position["batch"])
        self._counters = Counter(dict.fromkeys(COUNTERS, 0) | state["counters"])
        self._damaged = Counter(dict.fromkeys(DECODED, 0))

    def close(self) -> None:
        """Ends the prefetch thread and worker processes; the next batch would start new ones.

        Returns after `CLOSE_SECONDS` at the latest. A sample that takes longer to be read than that is waited for by a
        thread named `CLOSING`.
        """
        if self._running:
            closing = threading.Thread(target=self._running.pop().close, name=CLOSING)
            closing.start()
            closing.join(CLOSE_SECONDS)

    def _dataset(self) -> grain.IterDataset:
        dataset = _RenderedBatches(self._planner, self._position, self._process)
        workers, prefetch = self._train.data_workers, self._train.prefetch
        if workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain's workers read flags, also in programs that have none
            options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=max(1, prefetch // workers))
            return dataset.mp_prefetch(options)
        return grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=prefetch)


def _close_all(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:
        iterators.pop().close()


class _RenderedBatches(grain.IterDataset):
    """The batches from a position on: planned anew from there, then decoded and filled in."""

    def __init__(self, planner: WindowPlanner, position: Position, process: tuple[int, int]):
        super().__init__()
        self._arguments = (planner, position, process)
        self._share = (0, 1)

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Grain's protocol: this copy, in a worker process, is to make every `step`-th batch only."""
        self._share = (sl.start, sl.step)

    def __iter__(self) -> grain.DatasetIterator:
        return _RenderedBatchIterator(*self._arguments, self._share)


class _RenderedBatchIterator(grain.DatasetIterator):
    """Yields (Batch, BatchInfo without counters, this batch's problems, position after it)."""

    def __init__(self, planner: WindowPlanner, position: Position, process: tuple[int, int], share: tuple[int, int]):
        super().__init__()
        self._planner = planner
        self._position = position
        self._process = process
        self._skip, self._step = share
        self._window: Window | None = None
        self._memory = BatchMemory()
        self._threads = min(8, cores())  # Pillow releases the GIL
        self._pool = concurrent.futures.ThreadPoolExecutor(self._threads)

    def __next__(self) -> tuple[Batch, BatchInfo, list[Problem], Position]:
        while self._skip:
            self._advance()
            self._skip -= 1
        self._skip = self._step - 1
        return self._render(*self._advance())

    def get_state(self) -> dict[str, Any]:
        """For Grain only: what counts is the position that comes with each batch."""
        return {"position": self._position, "skip": self._skip}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes back to a state of `get_state`."""
        self._position, self._skip, self._window = state["position"], state["skip"], None

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _advance(self) -> tuple[Window, int]:
        """Steps over one batch; returns its window and its number in it."""
        position = self._position
        if self._window is None:
            self._window = self._planner.window(position.start, position.carried)
        window, number = self._window, position.batch
        if number + 1 < len(window.batches):
            self._position = dataclasses.replace(position, batch=number + 1)
        else:
            self._position, self._window = window.following, None
        return window, number

    def _render(self, window: Window, number: int) -> tuple[Batch, BatchInfo, list[Problem], Position]:
        planner, packed = self._planner, window.batches[number]
        index, count = self._process
        share = len(packed.rows) // count
        numbers = packed.rows[index * share : (index + 1) * share]
        shape = packed.bucket
        bucket = Bucket(share, shape.slots, shape.tokens, shape.patches, planner.model.tower.patch_bytes)
        memory, used_before = self._memory.take(patches_shape(bucket))
        batch = empty_batch(bucket, memory)
        plans = [[window.samples[i].plans for i in row] for row in numbers]
        if used_before:
            clear_padding(batch, plans)
        rooms = rooms_for_views(batch, plans)
        chained = itertools.chain.from_iterable
        tasks = [(window.samples[i], room) for i, room in zip(chained(numbers), chained(rooms), strict=True)]
        found = self._load_all(tasks)
        damaged = [one for one in found if isinstance(one, Problem)]
        problems = (window.problems if number == 0 else []) + damaged
        if damaged:
            batch = empty_batch(bucket)  # without what a damaged image left behind; the others are copied
        left = iter(zip(tasks, found, strict=True))
        rows = [
            [(its, room) for (_, room), its in itertools.islice(left, len(row)) if not isinstance(its, Problem)]
            for row in numbers
        ]
        slot_tokens = planner.model.visual_tokens(bucket.patches)
        batch = fill_batch(rows, bucket, slot_tokens, planner.stage.sample_weight_power, batch)
        samples = [sample for row in rows for sample, _ in row]
        info = BatchInfo(
            bucket=bucket,
            samples=len(samples),
            images=sum(len(sample.plans) for sample in samples),
            views=sum(sample.needs.views for sample in samples),
            tokens=sum(len(sample.tokens) for sample in samples),
            trained_tokens=sum(int(sample.trained.sum()) for sample in samples),
            fill=fill_of(batch),
            epoch=window.following.start / planner.epoch,
            read=window.following.start,
            waiting=len(window.following.carried),
            row_patches=tuple(patches_of(window.samples[i].needs for i in row) for row in packed.rows),
            damaged=Counter(problem.counter for problem in damaged),
            counters={},
        )
        return batch, info, problems, self._position

    def _load_all(self, tasks: Sequence[tuple[Prepared, list[np.ndarray]]]) -> list[EncodedSample | Problem]:
        """As `_load`, of all tasks; a thread takes the next one when it is done, without a future for each."""
        found: list[Any] = [None] * len(tasks)
        waiting = iter(enumerate(tasks))

        def work() -> None:
            for number, task in waiting:
                found[number] = self._load(*task)

        for done in [self._pool.submit(work) for _ in range(min(self._threads, len(tasks)))]:
            done.result()
        return found

    def _load(self, prepared: Prepared, into: list[np.ndarray]) -> EncodedSample | Problem:
        """Writes the views of a sample and returns its text, unless either turns out to be damaged."""
        planner, index = self._planner, prepared.index
        try:
            sample = planner.preparer.encoded(prepared)
            planner.preparer.views(prepared, into)
            return sample
        except ImageRefused as error:
            return Problem(index, REFUSED, str(error))
        except (SourceError, ChatError) as error:  # it was readable when it was planned, or indexed
            return Problem(index, MALFORMED, str(error).removeprefix(f"{planner.where(index)}: "))
        except ValueError as error:
            if prepared.sample is None:
                return Problem(index, REFUSED, f"{error}; if it has changed: uhd-jax data index --anew")
            raise PipelineError(f"{planner.where(index)}: {error}") from error
