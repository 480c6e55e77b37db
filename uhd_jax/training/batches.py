"""The data of a stage, as the training loop takes it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from uhd_jax.batch import Batch
from uhd_jax.config import ConfigError, ModelConfig, RunConfig, StageConfig
from uhd_jax.data.balance import imbalance
from uhd_jax.data.known import Known
from uhd_jax.data.known_from_index import known_samples
from uhd_jax.data.pipeline import BatchIterator, make_iterator
from uhd_jax.data.sources import Source, make_source
from uhd_jax.data.tokenizer import Tokenizer, load_tokenizer
from uhd_jax.data.windows import DECODED
from uhd_jax.sharding.mesh import make_mesh, row_shards
from uhd_jax.sharding.multihost import all_agree, as_first, row_share

DROPPED_FILE = "dropped"  # and .jsonl

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def make_batches(config: RunConfig, stage_index: int, workdir: Path | None = None) -> Iterator[StageBatches]:
    """Opens the source of a stage; this process gets its own part of every batch.

    Samples that are left out are listed in `workdir`/dropped.jsonl (of process 1 dropped.1.jsonl, and so on).
    """
    stage = config.train.stages[stage_index]
    source = make_source(stage.data, config.model.slicing.limits, f"config.train.stages[{stage_index}].data")
    mesh = make_mesh(config.train.mesh)
    together = jax.process_count() > 1
    process = row_share(mesh) if together else (0, 1)
    model = config.model.for_stage(stage)
    suffix = f".{jax.process_index()}.jsonl" if jax.process_index() else ".jsonl"
    dropped = workdir / f"{DROPPED_FILE}{suffix}" if workdir else None
    if config.train.jpeg_draft and workdir and jax.process_index() == 0:
        logger.warning("stage %r: train.jpeg_draft is on: large JPEGs are decoded smaller; pixels change", stage.name)
    tokenizer = load_tokenizer(model.chat.tokenizer, model.chat)
    known = _known(config, stage, model, source, tokenizer)
    if known and jax.process_index() == 0:
        logger.info("stage %r: %d of %d samples are planned from an index", stage.name, known.count, len(source))
    batches = make_iterator(stage, model, config.train, source, tokenizer, process, dropped, together, known)
    try:
        yield StageBatches(batches, row_shards(mesh))
    finally:
        batches.close()


def _known(
    config: RunConfig, stage: StageConfig, model: ModelConfig, source: Source, tokenizer: Tokenizer
) -> Known | None:
    """What is known of the samples, if that is the same in all processes: else their rows could differ."""
    found = problem = None
    try:
        found = known_samples(stage.data, source, model.chat, tokenizer, config.model.slicing.limits)
    except ConfigError as error:
        problem = error
    if not all_agree(problem is None):  # before one ends for which the others would wait
        raise problem or ConfigError(
            f"stage {stage.name!r}: another process cannot use the index that data.index names"
        )
    own = int(found.digest[:7], 16) + 1 if found else 0  # a positive int32
    if all_agree([own] == as_first([own])):
        return found
    logger.warning("stage %r: the index is not the same on all hosts, and is not used", stage.name)
    return None


class StageBatches:
    """The pipeline's batches with what is to be logged about each as plain numbers."""

    def __init__(self, batches: BatchIterator, row_shards: int = 1):
        self._batches = batches
        self._row_shards = row_shards
        self.get_state = batches.get_state
        self.set_state = batches.set_state
        self.count_damaged = batches.count_damaged
        self.damaged: tuple[int, ...] = ()  # samples of the last batch in this process, in the order of `count_damaged`

    def __next__(self) -> tuple[Batch, Mapping[str, Any]]:
        """The next batch, with the epoch, numbers of samples and images, the imbalance of patches over the devices that
        rows are split over, and the counters of dropped samples."""
        batch, info = next(self._batches)
        numbers = {"epoch": info.epoch, "samples": info.samples, "images": info.images, "waiting": info.waiting}
        self.damaged = tuple(info.damaged.get(name, 0) for name in DECODED)
        numbers["patch_imbalance"] = imbalance(info.row_patches, self._row_shards)
        return batch, numbers | dict(info.counters)
