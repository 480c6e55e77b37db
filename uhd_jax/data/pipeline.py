"""The input pipeline: shuffled samples, packed in windows, rendered ahead of the device, resumable at any batch.

Samples stand in an endless stream, shuffled anew in every epoch. A *window* is the next stretch of the stream together
with the samples that the window before left over; it is encoded and packed from sizes and texts alone. So a position is
three things: where the next window starts, what was left over, and how many of the window's batches are out. Nothing in
it depends on prefetching, on worker processes or on the number of hosts, and a run resumed from it continues with the
same batches, bit for bit.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import os
import sys
import weakref
from collections import Counter
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np
from absl import flags

from uhd_jax.batch import Batch, Bucket
from uhd_jax.config import BucketConfig, ConfigError, ModelConfig, StageConfig, TrainConfig, to_dict
from uhd_jax.data.buckets import Fill, PackedBatch, fill_of, form_batches, patch_work, plan_buckets
from uhd_jax.data.chat import ChatError, EncodedSample, encode_chat
from uhd_jax.data.packing import encode_to_fit, fill_batch
from uhd_jax.data.sources import Source
from uhd_jax.data.tokenizer import Tokenizer, load_tokenizer
from uhd_jax.slicing.pixels import cut_views
from uhd_jax.slicing.plan import ImageRefused, plan_image

PLANNING_SAMPLES = 2048  # that the bucket planner sees
FINGERPRINT_SAMPLES = 256  # evenly spaced, whose texts tell one source from another

# Counters: what happened to samples that are not trained on as they are.
FEWER_SLICES = "samples_with_fewer_slices"  # to fit into a row
TOO_LONG = "samples_dropped_too_long"  # even with one view per image
REFUSED = "samples_dropped_bad_image"  # `ImageRefused` on opening or on decoding
UNTRAINED = "samples_dropped_without_answer"
COUNTERS = (FEWER_SLICES, TOO_LONG, REFUSED, UNTRAINED)

logger = logging.getLogger(__name__)


class PipelineError(ValueError):
    """The pipeline cannot go on: nothing usable in the source, or a state that belongs to another run."""


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
    waiting: int  # samples left over by the window, to be packed in the next
    counters: Mapping[str, int]  # `COUNTERS`, over all hosts' samples planned so far (bad pixels: this host's)


def make_iterator(
    stage: StageConfig,
    model: ModelConfig,
    train: TrainConfig,
    source: Source,
    tokenizer: Tokenizer | None = None,
    process: tuple[int, int] = (0, 1),
) -> BatchIterator:
    """An endless iterator over the batches of a stage.

    Args:
      stage: rows, row length, slice limit, buckets.
      model: slicing, chat and mode.
      train: seed, packing window, prefetch depth and number of worker processes.
      source: the samples.
      tokenizer: default: the one that `model.chat` names.
      process: index and count of hosts. Every host plans all rows and renders its own part of them.

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
    return BatchIterator(WindowPlanner(stage, model, train, source, tokenizer), train, process)


class BatchIterator:
    """Yields (Batch of NumPy arrays, BatchInfo); prepares batches ahead in a thread or in worker processes."""

    def __init__(self, planner: WindowPlanner, train: TrainConfig, process: tuple[int, int]):
        if planner.stage.rows % process[1]:
            raise ConfigError(f"rows: {process[1]} hosts cannot share {planner.stage.rows} rows evenly")
        self._planner = planner
        self._train = train
        self._process = process
        self._position = _START
        self._counters = Counter(dict.fromkeys(COUNTERS, 0))
        self._running: list[grain.DatasetIterator] = []  # none or one
        # Also when the program ends without `close`: Grain's threads do not survive the end of the interpreter quietly.
        weakref.finalize(self, _close_all, self._running)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The static shapes of this host's batches; no other will come."""
        rows = self._planner.stage.rows // self._process[1]
        patch_dim = self._planner.model.tower.patch_dim
        return tuple(Bucket(rows, b.slots, b.tokens, b.patches, patch_dim) for b in self._planner.buckets)

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> tuple[Batch, BatchInfo]:
        if not self._running:
            self._running.append(iter(self._dataset()))
        try:
            batch, info, self._position = next(self._running[0])
        except BaseException:
            self.close()  # whoever tries again gets this batch, not the one prefetched after it
            raise
        self._counters.update(info.counters)
        return batch, dataclasses.replace(info, counters=dict(self._counters))

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands, after the batches handed out (not those prefetched); JSON types only."""
        return {
            "position": {**dataclasses.asdict(self._position), "carried": list(self._position.carried)},
            "counters": dict(self._counters),
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
        self._position = _Position(position["start"], tuple(position["carried"]), position["batch"])
        self._counters = Counter(state["counters"])

    def close(self) -> None:
        """Ends the prefetch thread and worker processes; the next batch would start new ones."""
        _close_all(self._running)

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


@dataclasses.dataclass(frozen=True)
class _Position:
    """Everything a run needs to know to go on: all else follows from the configuration."""

    start: int  # where in the stream the next window starts
    carried: tuple[int, ...]  # stream places left over by the window before
    batch: int  # batches of this window that are out


_START = _Position(0, (), 0)


@dataclasses.dataclass(frozen=True)
class _Window:
    """A planned window."""

    batches: list[PackedBatch]  # rows of indices into `samples`
    samples: list[tuple[int, EncodedSample]]  # with their index in the source
    following: _Position
    counters: Counter  # of the samples that came in with this window


class WindowPlanner:
    """Decides from sizes and texts which samples share which batch; pickled into worker processes."""

    def __init__(
        self, stage: StageConfig, model: ModelConfig, train: TrainConfig, source: Source, tokenizer: Tokenizer
    ):
        self.stage = stage
        self.model = model
        self.source = source
        self._tokenizer = tokenizer
        self._window = train.packing_window
        self._seed = int.from_bytes(hashlib.sha256(f"{train.seed} {stage.name}".encode()).digest()[:4])
        if len(source) == 0:
            raise PipelineError(f"stage {stage.name!r}: the source {stage.data.source!r} is empty")
        self._stream = grain.MapDataset.range(len(source)).seed(self._seed).shuffle().repeat()
        self.buckets = self._given_buckets() or self._planned_buckets()
        data = to_dict(stage.data)
        data["options"].pop("path", None)  # a file may be spelled differently, or moved; what stands in it counts
        spread = np.linspace(0, len(source) - 1, min(len(source), FINGERPRINT_SAMPLES)).astype(int)
        facts = {
            "source": (data, len(source), [source.messages(int(index)) for index in spread], self._seed),
            "model": (to_dict(model.slicing), to_dict(model.chat), model.tower.patch_size, model.visual_tokens(4096)),
            "rows": (stage.rows, stage.max_slices, self._window, [to_dict(bucket) for bucket in self.buckets]),
            "vocabulary": tokenizer.vocab_size,
        }
        self.fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def window(self, start: int, carried: tuple[int, ...]) -> _Window:
        """Packs the samples carried over and the next ones of the stream, enough for at least one batch.

        Raises:
          PipelineError: an epoch and more has no usable sample.
        """
        places = list(carried)
        samples = [self._encode(place, self.buckets)[0] for place in places]
        counters: Counter[str] = Counter()
        end = start
        while True:
            for place in range(end, end + self._window):
                sample, counter, reason = self._encode(place, self.buckets)
                if counter:
                    counters[counter] += 1
                    index = self._stream[place]
                    logger.warning("source %s, sample %d: %s: %s", self.stage.data.source, index, counter, reason)
                if sample:
                    places.append(place)
                    samples.append(sample)
            end += self._window
            rng = np.random.default_rng((self._seed, start))
            needs = [sample.needs for sample in samples]
            batches, left = form_batches(needs, len(carried), self.buckets, self.stage.rows, rng)
            if batches:
                indices = [int(self._stream[place]) for place in places]
                following = _Position(end, tuple(places[i] for i in left), 0)
                return _Window(batches, list(zip(indices, samples, strict=True)), following, counters)
            if not samples and end - start > len(self.source):
                raise PipelineError(
                    f"stage {self.stage.name!r}: no sample of the source {self.stage.data.source!r} is usable: "
                    + ", ".join(f"{name} {count}" for name, count in counters.items())
                )

    def _encode(self, place: int, rows: tuple[BucketConfig, ...]) -> tuple[EncodedSample | None, str, str]:
        """The sample at a place of the stream, unless it is dropped; a counter and a reason if something is wrong."""
        model, max_slices = self.model, self.stage.max_slices
        index = int(self._stream[place])
        try:
            sizes, messages = self.source.sizes(index), self.source.messages(index)

            def encode(limit: int) -> EncodedSample:
                plans = [plan_image(size, model, max_slices=limit) for size in sizes]
                return encode_chat(messages, plans, self._tokenizer, model.chat)

            sample, limit = encode_to_fit(encode, max_slices, rows)
        except ImageRefused as error:
            return None, REFUSED, str(error)
        except ChatError as error:
            raise ChatError(f"source {self.stage.data.source}, sample {index}: {error}") from None
        if sample is None:
            return None, TOO_LONG, f"does not fit into a row of {rows[-1]}"
        if not sample.trained.any():
            return None, UNTRAINED, "no answer to train on"
        if limit < max_slices:
            return sample, FEWER_SLICES, f"{limit} instead of {max_slices} slices per image"
        return sample, "", ""

    def _given_buckets(self) -> tuple[BucketConfig, ...]:
        stage, multiple = self.stage, 4 ** self.model.merge_levels()
        for bucket in stage.buckets:
            if bucket.tokens > stage.packed_length:
                raise ConfigError(f"buckets: {bucket} has more tokens than packed_length {stage.packed_length}")
            if bucket.patches % multiple or min(bucket.slots, bucket.tokens, bucket.patches) < 1:
                raise ConfigError(f"buckets: {bucket} must have at least one slot and patches a multiple of {multiple}")
        return stage.buckets

    def _planned_buckets(self) -> tuple[BucketConfig, ...]:
        stage = self.stage
        widest = BucketConfig(slots=stage.slots or sys.maxsize, tokens=stage.packed_length, patches=sys.maxsize)
        encoded = (self._encode(place, (widest,))[0] for place in range(min(PLANNING_SAMPLES, len(self.source))))
        needs = [sample.needs for sample in encoded if sample]
        return plan_buckets(needs, stage.packed_length, stage.bucket_budget, patch_work(self.model), stage.slots)


class _RenderedBatches(grain.IterDataset):
    """The batches from a position on: planned anew from there, then decoded and filled in."""

    def __init__(self, planner: WindowPlanner, position: _Position, process: tuple[int, int]):
        super().__init__()
        self._arguments = (planner, position, process)
        self._share = (0, 1)

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Grain's protocol: this copy, in a worker process, is to make every `step`-th batch only."""
        self._share = (sl.start, sl.step)

    def __iter__(self) -> grain.DatasetIterator:
        return _RenderedBatchIterator(*self._arguments, self._share)


class _RenderedBatchIterator(grain.DatasetIterator):
    """Yields (Batch, BatchInfo with this batch's own counters, position after it)."""

    def __init__(self, planner: WindowPlanner, position: _Position, process: tuple[int, int], share: tuple[int, int]):
        super().__init__()
        self._planner = planner
        self._position = position
        self._process = process
        self._skip, self._step = share
        self._window: _Window | None = None
        self._pool = concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # Pillow releases the GIL

    def __next__(self) -> tuple[Batch, BatchInfo, _Position]:
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

    def _advance(self) -> tuple[_Window, int]:
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

    def _render(self, window: _Window, number: int) -> tuple[Batch, BatchInfo, _Position]:
        planner, packed = self._planner, window.batches[number]
        counters = Counter(window.counters if number == 0 else {})
        index, count = self._process
        share = len(packed.rows) // count
        numbers = packed.rows[index * share : (index + 1) * share]
        loaded = dict(
            self._pool.map(lambda i: (i, self._load(*window.samples[i])), {i for row in numbers for i in row})
        )
        counters[REFUSED] += sum(views is None for views in loaded.values())
        rows = [[(window.samples[i][1], loaded[i]) for i in row if loaded[i] is not None] for row in numbers]
        shape = packed.bucket
        bucket = Bucket(share, shape.slots, shape.tokens, shape.patches, planner.model.tower.patch_dim)
        slot_tokens = planner.model.visual_tokens(bucket.patches)
        batch = fill_batch(rows, bucket, slot_tokens, planner.stage.sample_weight_power)
        samples = [sample for row in rows for sample, _ in row]
        info = BatchInfo(
            bucket=bucket,
            samples=len(samples),
            images=sum(len(sample.plans) for sample in samples),
            views=sum(sample.needs.views for sample in samples),
            tokens=sum(len(sample.tokens) for sample in samples),
            trained_tokens=sum(int(sample.trained.sum()) for sample in samples),
            fill=fill_of(batch),
            epoch=window.following.start / len(planner.source),
            waiting=len(window.following.carried),
            counters=counters,
        )
        return batch, info, self._position

    def _load(self, index: int, sample: EncodedSample) -> list[np.ndarray] | None:
        """The views of a sample; None when an image turns out to be damaged."""
        planner = self._planner
        try:
            images = planner.source.images(index)
            patch_size = planner.model.tower.patch_size
            pairs = zip(images, sample.plans, strict=True)
            return [view for image, plan in pairs for view in cut_views(image, plan, patch_size)]
        except ImageRefused as error:
            logger.warning("source %s, sample %d: %s: %s", planner.stage.data.source, index, REFUSED, error)
            return None
        except ValueError as error:
            raise PipelineError(f"source {planner.stage.data.source}, sample {index}: {error}") from error
