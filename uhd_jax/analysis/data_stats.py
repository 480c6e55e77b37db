"""What a stage makes of its data: lengths, views, what is dropped and why, and padding by bucket list.

All of it follows from an index (`data.index`), that is from sizes and lengths of texts; the data is not read again.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from uhd_jax.config import BucketConfig, ModelConfig, StageConfig, TrainConfig, to_dict
from uhd_jax.data.buckets import patch_work, plan_buckets
from uhd_jax.data.chat import Needs
from uhd_jax.data.index import DataIndex, Trouble, block_tokens, chat_key
from uhd_jax.data.sources import check_data
from uhd_jax.data.sources.mixture import MixedStream, MixtureOptions, Stream
from uhd_jax.data.tokenizer import load_tokenizer
from uhd_jax.data.waste import Waste, packing_waste
from uhd_jax.data.windows import FEWER_SLICES, PLANNING_SAMPLES, TOO_LONG, UNTRAINED, stage_seed
from uhd_jax.slicing.plan import Plan, Size, plan_image

PACKED = 8192  # places of the stream that are packed to measure padding
_EPOCHS = 16  # of a short stream that are looked up, at up to milliseconds a place, and then packed again and again
EXAMPLES = 3  # samples named per reason
_SHARES = (0, 0.05, 0.5, 0.95, 0.99, 1)  # of samples, at which lengths are given


@dataclasses.dataclass(frozen=True)
class StageFit:
    """N samples as a stage sees them. Arrays are int64[N]; zeros for a sample that is dropped."""

    limits: np.ndarray  # slices per image that the sample may have; 0: dropped
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
            self._troubles |= {sample: Trouble(UNTRAINED, "an answer is empty") for sample in silent}
        self._troubles |= index.troubles
        self._places = self._seen()
        self._tables: dict[int, np.ndarray] = {}  # by the limit of slices: needs of each case, zeros where not known
        self._blocks: dict[Any, int] = {}  # tokens of visual blocks
        draws = np.random.default_rng(train.seed).random(len(index.sizes))
        refilled = draws < self.model.slicing.pre_resize.refill_probability
        cases = np.concatenate([index.sizes, refilled[:, None].astype(np.int32)], axis=1)
        self._cases, self._case = np.unique(cases, axis=0, return_inverse=True)
        self._sample = np.repeat(np.arange(len(index)), index.images)

    def fit(self, buckets: Sequence[BucketConfig] = ()) -> StageFit:
        """What becomes of every sample.

        Args:
          buckets: shapes of rows; default: the stage's, and where it has none those that would be planned for it.
        """
        stage, index, texts = self.stage, self.index, self._texts
        buckets = tuple(buckets) or stage.buckets or self.plan(stage.bucket_budget, whole=False)
        limits, needs = self._fit(buckets)
        reasons = {sample: tuple(trouble) for sample, trouble in self._troubles.items()}
        bad = np.isin(np.arange(len(index)), list(reasons))
        dropped = np.flatnonzero(~bad & (limits == 0)).tolist()
        longest = max(bucket.tokens for bucket in buckets)
        for i in dropped:
            tokens, views, *_ = needs[:, i]
            smallest = f"{tokens} tokens and {views} views at one view per image"
            reasons[i] = TOO_LONG, f"{smallest} fit into no row; the longest has {longest} tokens"
        untrained = ~bad & (limits > 0) & (texts.trained == 0)
        reasons |= {i: (UNTRAINED, "no answer to train on") for i in np.flatnonzero(untrained).tolist()}
        limits = np.where(untrained, 0, limits)
        fewer = np.flatnonzero((limits > 0) & (limits < stage.max_slices)).tolist()
        reasons |= {i: (FEWER_SLICES, f"{limits[i]} instead of {stage.max_slices} slices per image") for i in fewer}
        examples: dict[str, list[tuple[int, str]]] = {}
        for sample, (counter, reason) in sorted(reasons.items()):
            if len(found := examples.setdefault(counter, [])) < EXAMPLES:
                found.append((sample, reason))
        tokens, views, largest, patches = np.where(limits > 0, needs, 0)
        return StageFit(
            limits=limits,
            tokens=tokens,
            trained=np.where(limits > 0, texts.trained, 0).astype(np.int64),
            views=views,
            largest=largest,
            patches=patches,
            counters=dict(Counter(counter for counter, _ in reasons.values())),
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
        limits, needs = self._fit((widest,))
        usable = (limits > 0) & (self._texts.trained > 0)
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
        options, seed = check_data(self.stage.data), stage_seed(self.stage, self._train)
        mixed = isinstance(options, MixtureOptions)
        stream = MixedStream(options.parts, self.index.parts, seed) if mixed else Stream(len(self.index), seed)
        wanted = max(_EPOCHS * stream.epoch, min(PLANNING_SAMPLES, len(self.index)))
        return np.array([stream[place] for place in range(min(PACKED, wanted))], np.int64)

    def _fit(self, buckets: Sequence[BucketConfig]) -> tuple[np.ndarray, np.ndarray]:
        """Slices per image, and tokens, views, largest view, patches: int64[4, N].

        Where even one slice is too much the first is 0, and the others are what one would need.
        """
        count = len(self.index)
        limits, needs = np.zeros(count, np.int64), np.zeros((4, count), np.int64)
        waiting = np.ones(count, bool)
        waiting[list(self._troubles)] = False
        for limit in range(self.stage.max_slices, 0, -1):
            found = self._needs(limit, waiting)
            tokens, views, largest, _ = found
            room = np.zeros(count, bool)
            for bucket in buckets:
                room |= (tokens <= bucket.tokens) & (views <= bucket.slots) & (largest <= bucket.patches)
            room &= waiting
            needs[:, room], limits[room] = found[:, room], limit
            waiting &= ~room
            if not waiting.any():
                break
        else:
            needs[:, waiting] = found[:, waiting]
        return limits, needs

    def _needs(self, limit: int, wanted: np.ndarray) -> np.ndarray:
        """int64[4, N]: what the wanted samples need with at most `limit` slices per image."""
        of_wanted = wanted[self._sample]
        sample, case = self._sample[of_wanted], self._case[of_wanted]
        table = self._tables.setdefault(limit, np.zeros((len(self._cases), 4), np.int64))
        used = np.unique(case)
        for i in used[table[used, 1] == 0].tolist():  # an image has at least one view
            table[i] = self._view_needs(*self._cases[i].tolist(), limit)
        needs = np.zeros((4, len(wanted)), np.int64)
        needs[0] = self._texts.tokens
        for row, column in ((0, 0), (1, 1), (3, 3)):
            np.add.at(needs[row], sample, table[case, column])
        np.maximum.at(needs[2], sample, table[case, 2])
        return needs

    def _view_needs(self, height: int, width: int, refill: int, limit: int) -> tuple[int, int, int, int]:
        plan = plan_image(Size(height, width), self.model, max_slices=limit, draw=0.0 if refill else 1.0)
        areas = [view.patch_grid.area for view in plan.views]
        return self._block_tokens(plan), len(areas), max(areas), sum(areas)

    def _block_tokens(self, plan: Plan) -> int:
        alike = plan.grid, tuple(view.visual_tokens for view in plan.views)
        if alike not in self._blocks:
            self._blocks[alike] = block_tokens(plan, self._tokenizer, self.model.chat)
        return self._blocks[alike]


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
        "padding": {key: getattr(waste, key) if known else None for key in ("tokens", "slots", "patches", "work")},
    }


def _quantiles(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    names = ("min", "p5", "median", "p95", "p99", "max")
    found = np.quantile(values, _SHARES, method="nearest").tolist()
    return dict(zip(names, found, strict=True)) | {"mean": float(values.mean())}
