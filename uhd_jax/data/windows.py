"""Windows of a stage's stream of samples: which are trained on, and which share a batch.

Samples stand in an endless stream, shuffled anew in every epoch. A *window* is the next stretch of the stream together
with the samples that the window before left over; it is encoded and packed from sizes and texts alone. So a position is
three things: where the next window starts, what was left over, and how many of the window's batches are out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from uhd_jax.config import BucketConfig, ConfigError, ModelConfig, StageConfig, TrainConfig, to_dict
from uhd_jax.data.buckets import PackedBatch, form_batches, patch_work, plan_buckets
from uhd_jax.data.chat import ChatError, Message
from uhd_jax.data.fitting import Reduction
from uhd_jax.data.known import Known
from uhd_jax.data.prepare import Prepared, Preparer
from uhd_jax.data.sources import Source, SourceError, facts_of
from uhd_jax.data.sources.mixture import Mixture, Stream
from uhd_jax.data.tokenizer import Tokenizer
from uhd_jax.slicing.plan import ImageRefused

PLANNING_SAMPLES = 2048  # that the bucket planner sees
FINGERPRINT_SAMPLES = 256  # evenly spaced, whose texts tell one source from another

# Counters: what happened to samples that are not trained on as they are.
FEWER_SLICES = "samples_with_fewer_slices"  # to fit into a row
TURNS_CUT = "samples_with_turns_cut"  # the oldest, to fit into a row
TOO_LONG = "samples_dropped_too_long"  # even with all of that
REFUSED = "samples_dropped_bad_image"  # `ImageRefused` on opening or on decoding
MALFORMED = "samples_dropped_bad_record"  # `SourceError`, or turns for which the prompt form has no place
UNTRAINED = "samples_dropped_without_answer"
COUNTERS = (FEWER_SLICES, TURNS_CUT, TOO_LONG, REFUSED, MALFORMED, UNTRAINED)
KEPT = (FEWER_SLICES, TURNS_CUT)  # are trained on, though not whole
DECODED = (REFUSED, MALFORMED)  # that also show only when pixels are read, by the host whose rows need them
BROKEN = (REFUSED, MALFORMED, UNTRAINED)  # of which `TrainConfig.max_broken_samples` allows a share

# Reasons of `UNTRAINED`.
EMPTY_ANSWER = "an answer is empty"
NO_ANSWER = "no answer to train on"

JUDGED_AFTER = 1000  # samples; before, a few broken ones are no share to judge by


class PipelineError(ValueError):
    """The pipeline cannot go on: nothing usable in the source, or a state that belongs to another run."""

    problems: Sequence[Problem] = ()  # of the window that could not be made; they come with no batch


@dataclasses.dataclass(frozen=True)
class Position:
    """Everything a run needs to know to go on: all else follows from the configuration."""

    start: int  # where in the stream the next window starts
    carried: tuple[int, ...]  # stream places left over by the window before
    batch: int  # batches of this window that are out


START = Position(0, (), 0)


@dataclasses.dataclass(frozen=True)
class Window:
    """A planned window."""

    batches: list[PackedBatch]  # rows of indices into `samples`
    samples: list[Prepared]
    following: Position
    problems: list[Problem]  # of the samples that came in with this window


class Problem(NamedTuple):
    """Why a sample is not trained on as it is."""

    index: int  # in the source
    counter: str  # one of `COUNTERS`
    reason: str


class WindowPlanner:
    """Decides from sizes and texts which samples share which batch; pickled into worker processes."""

    def __init__(
        self,
        stage: StageConfig,
        model: ModelConfig,
        train: TrainConfig,
        source: Source,
        tokenizer: Tokenizer,
        known: Known | None = None,
    ):
        self.stage = stage
        self.model = model
        self.source = source
        self._known = known
        self._window = train.packing_window
        self._max_broken = train.max_broken_samples
        self._seed = stage_seed(stage, train)
        if len(source) == 0:
            raise PipelineError(f"stage {stage.name!r}: the source {stage.data.source!r} is empty")
        self._stream = source.stream(self._seed) if isinstance(source, Mixture) else Stream(len(source), self._seed)
        self._carried: dict[int, Prepared] = {}  # by place: those left over by the last window
        self.preparer = Preparer(source, stage, model, tokenizer, self._seed, train.jpeg_draft)
        self.epoch = self._stream.epoch
        self.buckets = self._given_buckets() or self._planned_buckets()
        data = facts_of(stage.data)
        for one in (data, *data["options"].get("parts", ())):
            for name in ("path", "image_root"):  # they may be spelled differently, or moved; what stands there counts
                one.get("options", {}).pop(name, None)
        spread = np.linspace(0, len(source) - 1, min(len(source), FINGERPRINT_SAMPLES)).astype(int)
        facts = {
            "source": (data, len(source), [self._said(int(index)) for index in spread], self._seed),
            "model": (to_dict(model.slicing), to_dict(model.chat), model.tower.patch_size, model.visual_tokens(4096)),
            "rows": (stage.rows, stage.max_slices, self._window, [to_dict(bucket) for bucket in self.buckets]),
            "samples": (stage.too_long, to_dict(stage.augment)),
            "vocabulary": tokenizer.vocab_size,
        }
        self.fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def window(self, start: int, carried: tuple[int, ...]) -> Window:
        """Packs the samples carried over and the next ones of the stream, enough for at least one batch.

        Raises:
          PipelineError: an epoch and more has no usable sample.
        """
        places: list[int] = []
        samples: list[Prepared] = []

        def take(place: int) -> list[Problem]:
            sample, problems = self._prepare(place, self.buckets)
            if sample:
                places.append(place)
                samples.append(sample)
            return problems

        problems: list[Problem] = []
        for place in carried:
            if place in self._carried:
                places.append(place)
                samples.append(self._carried[place])
            else:  # how some of them were reduced was said when they came in; one that is gone has been lost since
                problems += (problem for problem in take(place) if problem.counter not in KEPT)
        waiting, end = len(places), start
        while True:
            problems += itertools.chain.from_iterable(map(take, range(end, end + self._window)))
            end += self._window
            rng = np.random.default_rng((self._seed, start))
            needs = [prepared.needs for prepared in samples]
            batches, left = form_batches(needs, waiting, self.buckets, self.stage.rows, rng)
            if batches:
                self._carried = {places[i]: samples[i] for i in left}
                return Window(batches, samples, Position(end, tuple(self._carried), 0), problems)
            counts = Counter(problem.counter for problem in problems)
            try:
                self.check_share(counts, end - start)
                if not samples and end - start > self.epoch:
                    raise PipelineError(
                        f"stage {self.stage.name!r}: no sample of the source {self.stage.data.source!r} is usable: "
                        + ", ".join(f"{name} {count}" for name, count in counts.items())
                        + f"; for example {self.where(problems[0].index)}: {problems[0].reason}"
                    )
            except PipelineError as error:
                error.problems = problems
                raise

    def check_share(self, counts: Mapping[str, int], samples: int) -> None:
        """Raises `PipelineError` if more of the samples read so far are broken than the configuration allows.

        Args:
          counts: of `COUNTERS`.
          samples: how many were read.
        """
        broken = sum(counts.get(name, 0) for name in BROKEN)
        if samples >= JUDGED_AFTER and broken > self._max_broken * samples:
            counted = ", ".join(f"{name} {counts[name]}" for name in BROKEN if counts.get(name))
            raise PipelineError(
                f"stage {self.stage.name!r}: {broken} of {samples} samples of the source {self.stage.data.source!r} "
                f"are broken, more than the share train.max_broken_samples={self._max_broken:g}: {counted}; mend "
                f"those named in the log, or allow more"
            )

    def where(self, index: int) -> str:
        """Where a sample comes from, for messages."""
        named = getattr(self.source, "where", None)  # a source of the user's own may lack it
        return named(index) if named else f"source {self.stage.data.source}, sample {index}"

    def _prepare(self, place: int, rows: tuple[BucketConfig, ...]) -> tuple[Prepared | None, list[Problem]]:
        """The sample at a place of the stream, unless it is dropped, and what is wrong with it, if something is."""
        index, epoch = self._stream.visit(place)
        known = self._known.get(index) if self._known else None
        try:
            if known:
                if self.stage.objective == "language" and not known.answered:
                    return None, [Problem(index, UNTRAINED, EMPTY_ANSWER)]
                if prepared := self.preparer.from_index(index, epoch, known, rows):
                    untrained = [] if known.trained else [Problem(index, UNTRAINED, NO_ANSWER)]
                    return None if untrained else prepared, untrained
            messages, sizes = self.source.messages(index), self.source.sizes(index)
            if self.stage.objective == "language" and not all(map(says_something, messages)):
                return None, [Problem(index, UNTRAINED, EMPTY_ANSWER)]
            prepared = self.preparer.prepare(index, epoch, messages, sizes, rows)
        except ImageRefused as error:
            return None, [Problem(index, REFUSED, str(error))]
        except (SourceError, ChatError) as error:
            return None, [Problem(index, MALFORMED, str(error).removeprefix(f"{self.where(index)}: "))]
        if prepared is None:
            return None, [Problem(index, TOO_LONG, _no_room(rows))]
        if not prepared.sample.trained.any():
            return None, [Problem(index, UNTRAINED, NO_ANSWER)]
        given_up = reduction_reasons(prepared.reduction, self.stage.max_slices, len(sizes))
        return prepared, [Problem(index, counter, reason) for counter, reason in given_up.items()]

    def _said(self, index: int) -> Any:
        """The messages of a sample, for the fingerprint: nothing that names a place."""
        try:
            return self.source.messages(index)
        except SourceError:
            return None

    def _given_buckets(self) -> tuple[BucketConfig, ...]:
        stage, multiple = self.stage, 4 ** self.model.merge_levels()
        for bucket in stage.buckets:
            where = f"stage {stage.name!r}: buckets: {bucket}"
            if bucket.tokens > stage.packed_length:
                raise ConfigError(f"{where} has more tokens than packed_length {stage.packed_length}")
            if bucket.patches % multiple or min(bucket.slots, bucket.tokens, bucket.patches) < 1:
                raise ConfigError(f"{where} must have at least one slot and patches a multiple of {multiple}")
        return stage.buckets

    def _planned_buckets(self) -> tuple[BucketConfig, ...]:
        stage = self.stage
        widest = BucketConfig(slots=stage.slots or sys.maxsize, tokens=stage.packed_length, patches=sys.maxsize)
        seen = (self._prepare(place, (widest,))[0] for place in range(min(PLANNING_SAMPLES, len(self.source))))
        needs = [prepared.needs for prepared in seen if prepared]
        return plan_buckets(needs, stage.packed_length, stage.bucket_budget, patch_work(self.model), stage.slots)


def reduction_reasons(reduction: Reduction, max_slices: int, images: int) -> dict[str, str]:
    """How a sample was reduced, by counter; empty if it was not."""
    reasons = {}
    if reduction.max_slices < max_slices and images:
        reasons[FEWER_SLICES] = f"{reduction.max_slices} instead of {max_slices} slices per image"
    if rounds := reduction.rounds:
        reasons[TURNS_CUT] = f"the oldest {f'{rounds} rounds' if rounds > 1 else 'round'} of question and answer cut"
    return reasons


def _no_room(rows: tuple[BucketConfig, ...]) -> str:
    tokens, slots = max(row.tokens for row in rows), max(row.slots for row in rows)
    return f"fits into no row after all that too_long allows; rows have at most {tokens} tokens and {slots} views"


def stage_seed(stage: StageConfig, train: TrainConfig) -> int:
    """The seed of a stage's stream of samples: stages of the same data do not see it in the same order."""
    return int.from_bytes(hashlib.sha256(f"{train.seed} {stage.name}".encode()).digest()[:4])


def says_something(message: Message) -> bool:
    """Whether a turn is no answer, or one with a text."""
    return message.role != "assistant" or any(isinstance(part, str) and part.strip() for part in message.parts)
