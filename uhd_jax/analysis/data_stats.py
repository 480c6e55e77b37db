"""What a stage makes of its data: lengths, views, what is dropped or cut and why, and padding by bucket list.

All of it follows from an index (`data.index`), that is from sizes and lengths of texts. Read again are only samples
that may have to lose turns. Where chance has a part, the first epoch is looked at.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from uhd_jax.config import BucketConfig, ModelConfig, StageConfig, TrainConfig, to_dict
from uhd_jax.data.augment import draw
from uhd_jax.data.buckets import patch_work, plan_buckets
from uhd_jax.data.chat import Needs, encode_chat
from uhd_jax.data.fitting import Reduction, cuttable, reduce_to_fit, without_oldest
from uhd_jax.data.index import DataIndex, Trouble, chat_key
from uhd_jax.data.known import REFERENCE, BlockTokens
from uhd_jax.data.packing import fits
from uhd_jax.data.prepare import check_ocr_parts
from uhd_jax.data.sources import Source, check_data, make_source
from uhd_jax.data.sources.mixture import MixedStream, MixtureOptions, Stream
from uhd_jax.data.tokenizer import load_tokenizer
from uhd_jax.data.waste import Waste, packing_waste
from uhd_jax.data.windows import (
    EMPTY_ANSWER,
    FEWER_SLICES,
    NO_ANSWER,
    PLANNING_SAMPLES,
    REFUSED,
    TOO_LONG,
    TURNS_CUT,
    UNTRAINED,
    reduction_reasons,
    stage_seed,
)
from uhd_jax.slicing.plan import ImageRefused, Size, plan_image

PACKED = 8192  # places of the stream that are packed to measure padding
_EPOCHS = 16  # of a short stream that are looked up, at up to milliseconds a place, and then packed again and again
EXAMPLES = 3  # samples named per reason
_SHARES = (0, 0.05, 0.5, 0.95, 0.99, 1)  # of samples, at which lengths are given


@dataclasses.dataclass(frozen=True)
class StageFit:
    """N samples as a stage sees them. Arrays are int64[N]; zeros for a sample that is dropped."""

    limits: np.ndarray  # slices per image that the sample may have; 0: dropped
    rounds: np.ndarray  # of question and answer that are cut
    tokens: np.ndarray
    trained: np.ndarray
    views: np.ndarray
    largest: np.ndarray  # patches of the largest view
    patches: np.ndarray  # of all views
    counters: dict[str, int]  # by the names under which training counts
    examples: dict[str, list[tuple[int, str]]]  # number of a sample and reason, for each counter
    buckets: tuple[BucketConfig, ...]

    @property
    def kept(self) -> np.ndarray:
        """bool[N]: is trained on."""
        return self.limits > 0


@dataclasses.dataclass(frozen=True)
class _Found:
    """What becomes of N samples that are in no trouble, in arrays as in `StageFit`."""

    limits: np.ndarray
    rounds: np.ndarray
    needs: np.ndarray  # int64[4, N]; of those that fit nowhere, of the smallest form that was tried
    trained: np.ndarray
    refused: dict[int, str]  # why images of a sample cannot be sliced

    @classmethod
    def of(cls, count: int, trained: np.ndarray) -> _Found:
        """Nothing fits yet."""
        return cls(
            np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros((4, count), np.int64), trained.copy(), {}
        )


class StageData:
    """The index of a stage's data under the stage's slicing and prompt form.

    Args:
      index: of the stage's data, with the texts of its prompt form.
      stage: limit of slices, length of rows, buckets.
      model: as configured; the stage's own slicing and prompt form are put in place here.
      train: seed, rows looked at together.
    """

    def __init__(self, index: DataIndex, stage: StageConfig, model: ModelConfig, train: TrainConfig):
        self.index, self.stage, self.model, self._train = index, stage, model.for_stage(stage), train
        chat = self.model.chat
        self._tokenizer = load_tokenizer(chat.tokenizer, chat)
        self._texts = index.texts[chat_key(chat, self._tokenizer)]
        self._troubles = self._texts.troubles.copy()
        if stage.objective == "language":
            silent = np.flatnonzero(~index.answered).tolist()
            self._troubles |= {sample: Trouble(UNTRAINED, EMPTY_ANSWER) for sample in silent}
        self._troubles |= index.troubles
        self._seed = stage_seed(stage, train)
        self._places = self._seen()
        self._tables: dict[int, np.ndarray] = {}  # by the limit of slices: needs of each case, zeros where not known
        self._refused: dict[tuple[int, int], str] = {}  # limit and case, of images that cannot be sliced
        self._blocks = BlockTokens(self._tokenizer, chat)
        self._turns: dict[int, int] = {}  # rounds that may be cut, of samples that do not fit otherwise
        self._shortened: dict[
            tuple[int, int], tuple[int, int, int]
        ] = {}  # tokens, trained, first image; without rounds
        cases = self._altered()
        self._cases, self._case = np.unique(cases, axis=0, return_inverse=True)
        self._sample = np.repeat(np.arange(len(index)), index.images)

    def fit(self, buckets: Sequence[BucketConfig] = ()) -> StageFit:
        """What becomes of every sample.

        Args:
          buckets: shapes of rows; default: the stage's, and where it has none those that would be planned for it.
        """
        stage, index = self.stage, self.index
        buckets = tuple(buckets) or stage.buckets or self.plan(stage.bucket_budget, whole=False)
        found = self._fit(buckets)
        limits, needs = found.limits, found.needs
        troubles = self._troubles | {i: Trouble(REFUSED, reason) for i, reason in found.refused.items()}
        good = np.ones(len(index), bool)
        good[list(troubles)] = False
        longest = max(bucket.tokens for bucket in buckets)
        for i in np.flatnonzero(good & (limits == 0)).tolist():
            tokens, views, *_ = needs[:, i]
            smallest = (
                f"{tokens} tokens and {views} views{'' if stage.too_long == 'drop' else ' at one view per image'}"
            )
            troubles[i] = Trouble(TOO_LONG, f"{smallest} fit into no row; the longest has {longest} tokens")
        untrained = good & (limits > 0) & (found.trained == 0)
        troubles |= {i: Trouble(UNTRAINED, NO_ANSWER) for i in np.flatnonzero(untrained).tolist()}
        limits = np.where(untrained, 0, limits)
        reasons = [(sample, *trouble) for sample, trouble in troubles.items()]
        for i in np.flatnonzero((limits > 0) & ((limits < stage.max_slices) | (found.rounds > 0))).tolist():
            reduction = Reduction(int(limits[i]), int(found.rounds[i]))
            given_up = reduction_reasons(reduction, stage.max_slices, int(index.images[i]))
            reasons += [(i, counter, reason) for counter, reason in given_up.items()]
        examples: dict[str, list[tuple[int, str]]] = {}
        for sample, counter, reason in sorted(reasons):
            if len(named := examples.setdefault(counter, [])) < EXAMPLES:
                named.append((sample, reason))
        tokens, views, largest, patches = np.where(limits > 0, needs, 0)
        return StageFit(
            limits=limits,
            rounds=np.where(limits > 0, found.rounds, 0),
            tokens=tokens,
            trained=np.where(limits > 0, found.trained, 0).astype(np.int64),
            views=views,
            largest=largest,
            patches=patches,
            counters=dict(Counter(counter for _, counter, _ in reasons)),
            examples=examples,
            buckets=buckets,
        )

    def plan(self, budget: int, whole: bool = True) -> tuple[BucketConfig, ...]:
        """At most `budget` buckets that waste little, from the first samples of the stage's stream.

        Args:
          budget: how many programs may be compiled.
          whole: the most views and the largest view of all the data have room too. A training that plans for itself has
            not seen them.
        """
        stage = self.stage
        widest = BucketConfig(slots=stage.slots or sys.maxsize, tokens=stage.packed_length, patches=sys.maxsize)
        found = self._fit((widest,))
        needs, usable = found.needs, (found.limits > 0) & (found.trained > 0)
        first = self._places[: min(PLANNING_SAMPLES, len(self.index))]
        chosen = first[usable[first]].tolist()
        kept = np.flatnonzero(usable)
        if whole and len(kept):
            chosen += [int(kept[needs[row, kept].argmax()]) for row in (1, 2)]
        samples = [Needs(*needs[:3, i].tolist()) for i in chosen]
        return plan_buckets(samples, stage.packed_length, budget, patch_work(self.model), stage.slots)

    def waste(self, fit: StageFit) -> Waste:
        """The padding that the samples of a fit cost in its buckets, packed as in training."""
        order = self._places[fit.kept[self._places]].tolist()
        order *= -(-PACKED // max(1, len(self._places)))
        samples = [Needs(int(fit.tokens[i]), int(fit.views[i]), int(fit.largest[i])) for i in order]
        patches = [int(fit.patches[i]) for i in order]
        window = self._train.packing_window
        return packing_waste(samples, patches, fit.buckets, patch_work(self.model), self.stage.rows, window)

    def _seen(self) -> np.ndarray:
        """int64[places]: the samples at the first places of the stage's stream, some epochs of those that are short."""
        options, seed = check_data(self.stage.data), self._seed
        mixed = isinstance(options, MixtureOptions)
        check_ocr_parts(self.stage, [part.name for part in options.parts] if mixed else ())
        stream = MixedStream(options.parts, self.index.parts, seed) if mixed else Stream(len(self.index), seed)
        wanted = max(_EPOCHS * stream.epoch, min(PLANNING_SAMPLES, len(self.index)))
        return np.array([stream[place] for place in range(min(PACKED, wanted))], np.int64)

    def _altered(self) -> np.ndarray:
        """int32[images, 3]: height and width in the first epoch, and whether pre_resize.refill_slices is for it."""
        index, slicing, augment = self.index, self.model.slicing, self.stage.augment
        refill = slicing.pre_resize.refill_probability
        cases = np.concatenate([index.sizes, np.zeros((len(index.sizes), 1), np.int32)], axis=1)
        if augment.resize_probability or refill:
            for sample in np.flatnonzero(index.images).tolist():
                key = self._seed, sample, 0
                drawn = draw(index.sizes_of(sample), augment, slicing, self.stage.max_slices, key)
                of_sample = slice(index.starts[sample], index.starts[sample + 1])
                cases[of_sample] = [(*one.alteration.size, one.refill < refill) for one in drawn]
        return cases

    def _fit(self, buckets: Sequence[BucketConfig]) -> _Found:
        """What becomes of the samples that are not in trouble already."""
        count, policy = len(self.index), self.stage.too_long
        found = _Found.of(count, self._texts.trained)
        waiting = np.ones(count, bool)
        waiting[list(self._troubles)] = False
        for limit in range(self.stage.max_slices, 0, -1):
            needs, refused = self._needs(limit, waiting)
            found.refused.update(refused)
            waiting[list(refused)] = False
            tokens, views, largest, _ = needs
            room = np.zeros(count, bool)
            for bucket in buckets:
                room |= (tokens <= bucket.tokens) & (views <= bucket.slots) & (largest <= bucket.patches)
            room &= waiting
            found.needs[:, room], found.limits[room] = needs[:, room], limit
            waiting &= ~room
            found.needs[:, waiting] = needs[:, waiting]
            if policy == "drop" or not waiting.any():
                break
        if policy == "cut_turns":
            for sample in np.flatnonzero(waiting).tolist():
                self._cut(sample, buckets, found)
        return found

    def _cut(self, sample: int, buckets: Sequence[BucketConfig], found: _Found) -> None:
        """Cuts turns of a sample that does not fit with one view per image, if that is of use."""
        if sample not in self._turns:
            self._turns[sample] = cuttable(self._source.messages(sample))

        def fits_somewhere(reduction: Reduction) -> bool:
            return any(fits(self._reduced(sample, reduction)[0], bucket) for bucket in buckets)

        reduction = reduce_to_fit(fits_somewhere, self.stage.too_long, self.stage.max_slices, self._turns[sample])
        if reduction:
            needs, patches, trained = self._reduced(sample, reduction)
            found.limits[sample], found.rounds[sample] = reduction
            found.needs[:, sample], found.trained[sample] = (*needs, patches), trained

    def _reduced(self, sample: int, reduction: Reduction) -> tuple[Needs, int, int]:
        """What a sample needs after a reduction, patches of all its views, and trained tokens."""
        limit, rounds = reduction
        if (sample, rounds) not in self._shortened:
            kept, first = without_oldest(self._source.messages(sample), rounds)
            plans = [REFERENCE] * (int(self.index.images[sample]) - first)
            encoded = encode_chat(kept, plans, self._tokenizer, self.model.chat)
            self._shortened[sample, rounds] = len(encoded.tokens), int(encoded.trained.sum()), first
        tokens, trained, first = self._shortened[sample, rounds]
        cases = self._case[self.index.starts[sample] + first : self.index.starts[sample + 1]]
        more, views, largest, patches = self._tables[limit][cases].T
        needs = Needs(tokens + int(more.sum()), int(views.sum()), int(largest.max(initial=0)))
        return needs, int(patches.sum()), trained

    def _needs(self, limit: int, wanted: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        """What the wanted samples need with at most `limit` slices per image, and why some images cannot be sliced.

        Returns:
          int64[4, N]: tokens, views, patches of the largest view and of all views; and reasons by sample.
        """
        of_wanted = wanted[self._sample]
        sample, case = self._sample[of_wanted], self._case[of_wanted]
        table = self._tables.setdefault(limit, np.zeros((len(self._cases), 4), np.int64))
        used = np.unique(case)
        for i in used[table[used, 1] == 0].tolist():  # an image has at least one view
            try:
                table[i] = self._view_needs(*self._cases[i].tolist(), limit)
            except ImageRefused as error:
                table[i], self._refused[limit, i] = -1, str(error)
        needs = np.zeros((4, len(wanted)), np.int64)
        needs[0] = self._texts.tokens
        for row, column in ((0, 0), (1, 1), (3, 3)):
            np.add.at(needs[row], sample, table[case, column])
        np.maximum.at(needs[2], sample, table[case, 2])
        bad = np.flatnonzero(table[case, 1] < 0)[::-1]  # of several of a sample, the first one counts
        return needs, {int(sample[i]): self._refused[limit, int(case[i])] for i in bad}

    def _view_needs(self, height: int, width: int, refill: int, limit: int) -> tuple[int, int, int, int]:
        plan = plan_image(Size(height, width), self.model, max_slices=limit, draw=0.0 if refill else 1.0)
        areas = [view.patch_grid.area for view in plan.views]
        return self._blocks.of(plan), len(areas), max(areas), sum(areas)

    @functools.cached_property
    def _source(self) -> Source:
        return make_source(self.stage.data, self.model.slicing.limits)


def stage_report(data: StageData, budgets: Sequence[int]) -> tuple[dict[str, Any], StageFit]:
    """Everything about a stage's data, with JSON types only, and the fit that it was read from.

    Args:
      data: of the stage.
      budgets: numbers of programs whose bucket lists are compared with the stage's own.
    """
    stage, index = data.stage, data.index
    fit = data.fit()
    lists = {"the stage's own": fit} if stage.buckets else {}
    for budget in sorted({*budgets} | ({stage.bucket_budget} if not stage.buckets else set())):
        own = budget == stage.bucket_budget and not stage.buckets
        lists[f"{budget} program{'s' * (budget > 1)}{', as now' * own}"] = fit if own else data.fit(data.plan(budget))
    kept = fit.kept
    report = {
        "stage": stage.name,
        "data": to_dict(stage.data),
        "samples": len(index),
        "images": len(index.sizes),
        "kept": int(kept.sum()),
        "counters": fit.counters,
        "examples": {name: [list(one) for one in found] for name, found in fit.examples.items()},
        "image_height": _quantiles(index.sizes[:, 0]),
        "image_width": _quantiles(index.sizes[:, 1]),
        "tokens": _quantiles(fit.tokens[kept]),
        "trained_tokens": _quantiles(fit.trained[kept]),
        "views": _quantiles(fit.views[kept]),
        "largest_view_patches": _quantiles(fit.largest[kept]),
        "bucket_lists": [bucket_list(name, data, one) for name, one in lists.items()],
    }
    return report, fit


def bucket_list(name: str, data: StageData, fit: StageFit) -> dict[str, Any]:
    """A list of buckets with the padding that it costs, with JSON types only; no padding is known without a batch."""
    waste = data.waste(fit)
    known = waste.rows > 0
    return {
        "name": name,
        "buckets": [to_dict(bucket) for bucket in fit.buckets],
        "dropped": int((~fit.kept).sum()),
        "fewer_slices": fit.counters.get(FEWER_SLICES, 0),
        "turns_cut": fit.counters.get(TURNS_CUT, 0),
        "padding": {key: getattr(waste, key) if known else None for key in ("tokens", "slots", "patches", "work")},
    }


def _quantiles(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    names = ("min", "p5", "median", "p95", "p99", "max")
    found = np.quantile(values, _SHARES, method="nearest").tolist()
    return dict(zip(names, found, strict=True)) | {"mean": float(values.mean())}
