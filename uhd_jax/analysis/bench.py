"""How fast the parts of a model are on this machine: the numbers behind `uhd-jax bench`.

Parts are measured apart, on random inputs that fill a bucket: every slot a view of all its patches, every row one
sample. Of several repeats the median counts, in seconds by the clock and in seconds of processor time of this process;
on CPU the latter is what other programs on the machine disturb least.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uhd_jax import cost
from uhd_jax.analysis.aot_compile import bucket_of, memory_of
from uhd_jax.batch import Batch, Bucket, empty_batch
from uhd_jax.config import ModelConfig, StageConfig
from uhd_jax.models import uhd
from uhd_jax.models.patches import for_bytes, normalise_bytes, normalise_patches

FORWARD, TRAINING = "forward", "training"


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and what one call of it works on."""

    model: ModelConfig
    stage: StageConfig
    bucket: Bucket
    grid: tuple[int, int]  # patch rows and columns of every view

    @property
    def views(self) -> int:
        """Of all rows."""
        return self.bucket.rows * self.bucket.slots


@dataclasses.dataclass(frozen=True)
class Timing:
    """Of one call: medians."""

    seconds: float
    cpu_seconds: float


@dataclasses.dataclass(frozen=True)
class Part:
    """Something to be called again and again, and how much it does."""

    name: str
    kind: str  # FORWARD or TRAINING
    call: Callable[[], Any]
    flops: float
    counts: dict[str, float]  # views, tokens, ..: per call
    compile_seconds: float
    memory_bytes: int  # of its program on a device


def case_of(model: ModelConfig, stage: StageConfig, rows: int | None) -> Case:
    """What `uhd-jax bench` measures of a stage: its bucket with another number of rows."""
    stage = dataclasses.replace(stage, rows=rows or stage.rows, accumulation=1 if rows else stage.accumulation)
    bucket = bucket_of(model, stage)
    return Case(model, stage, bucket, view_grid(bucket.patches, 2 ** max(model.merge_levels(), 1)))


def view_grid(patches: int, multiple: int) -> tuple[int, int]:
    """The largest, then squarest patch grid that fits, its sides multiples of `multiple`."""
    cells = patches // multiple**2
    grids = [(rows, cells // rows) for rows in range(1, math.isqrt(cells) + 1)]
    rows, cols = max(grids, key=lambda grid: (grid[0] * grid[1], grid[0]))
    return rows * multiple, cols * multiple


def full_batch(case: Case, seed: int = 0) -> Batch:
    """A random batch (NumPy) that fills the case's bucket."""
    random, bucket = np.random.default_rng(seed), case.bucket
    batch = empty_batch(bucket)
    batch.tokens[:] = random.integers(0, case.model.decoder.vocab_size, batch.tokens.shape)
    batch.positions[:] = np.arange(bucket.tokens)
    batch.segments[:] = 1
    batch.loss_weights[:, 1:] = 1
    area = case.grid[0] * case.grid[1]
    batch.patches[:, :, :area] = random.integers(0, 256, batch.patches[:, :, :area].shape)
    batch.patch_grids[:] = case.grid
    of_view, room = case.model.visual_tokens(area), case.model.visual_tokens(bucket.patches)
    places = (np.arange(bucket.slots)[:, None] * room + np.arange(of_view)).ravel()[: bucket.tokens - 1]
    batch.visual_index[:, : len(places)] = places
    return batch


def parts_of(case: Case, names: Sequence[str], passes: Sequence[str] = (FORWARD, TRAINING)) -> list[Part]:
    """Compiles tower (as configured, and without the compressor where it has one), connector and decoder.

    Args:
      case: what each of them works on.
      names: "tower", "connector", "decoder".
      passes: FORWARD, and TRAINING: forward and the gradient of all of the part's parameters.
    """
    model, bucket = case.model, case.bucket
    params = jax.jit(uhd.init_params, static_argnums=0)(model, jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, full_batch(case))
    patches = batch.patches.reshape(case.views, *batch.patches.shape[2:])
    grids = batch.patch_grids.reshape(-1, 2)
    parts = []
    if "tower" in names:
        compresses = model.compressor.kind != "none" and model.mode == "16x"
        for mode in ("16x", "4x") if compresses else (model.mode,):
            named = "tower" if mode == model.mode else "tower, no compressor"
            parts += _passes(case, named, passes, _tower(case, mode), params["tower"], (patches, grids), mode)
    if "connector" in names and params["connector"]:
        inside = model.compressor.kind != "none" and model.mode == "16x"
        features = jax.random.normal(
            jax.random.key(1), (case.views, bucket.patches // 4**inside, model.tower.width), jnp.dtype(model.dtype)
        )
        pixels = normalise_patches(patches, model.tower)

        def connect(params, features, grids, pixels):
            return uhd.connector(model).apply({"params": params}, features, grids, pixels)

        inputs = (features, grids // 2**inside, pixels)
        parts += _passes(case, "connector", passes, connect, params["connector"], inputs, model.mode)
    if "decoder" in names:
        text = dataclasses.replace(
            batch,
            patches=jnp.zeros((bucket.rows, 0, *batch.patches.shape[2:]), jnp.uint8),
            patch_grids=jnp.zeros((bucket.rows, 0, 2), jnp.int32),
        )

        def decode(params, text):
            return uhd.loss_sums({"decoder": params}, text, model)[0]

        parts += _passes(case, "decoder", passes, decode, params["decoder"], (text,), model.mode)
    return parts


def _tower(case: Case, mode: str) -> Callable[..., jax.Array]:
    model = case.model

    def encode(params, patches, grids):
        weights, pixels = for_bytes(params, model.tower), normalise_bytes(patches, model.tower)
        levels, compress = model.merge_levels(mode), mode == "16x"
        return uhd.tower(model).apply({"params": weights}, pixels, grids, levels=levels, compress=compress)[0]

    return encode


def _passes(case, name, passes, function, params, inputs, mode) -> list[Part]:
    group = name.partition(",")[0]
    work = cost.bucket_work(case.bucket)
    area = case.grid[0] * case.grid[1]
    work = dataclasses.replace(work, patches=case.views * area, patch_pairs=case.views * area**2)
    stretches = [
        stretch for stretch in cost.forward_stretches(case.model, work, mode) if stretch.part in cost.GROUPS[group]
    ]
    counts = {"tokens": case.bucket.rows * case.bucket.tokens} if group == "decoder" else {"views": case.views}
    made = []
    for kind in passes:
        if kind == FORWARD:
            run, macs = function, sum(stretch.weight_macs + stretch.pair_macs for stretch in stretches)
        else:
            run = jax.grad(lambda params, *inputs: jnp.sum(function(params, *inputs).astype(jnp.float32)))
            macs = sum(stretch.training_macs(cost.GROUPS[group]) for stretch in stretches)
        start = time.monotonic()
        program = jax.jit(run).lower(params, *inputs).compile()
        seconds = time.monotonic() - start

        def call(program=program):
            jax.block_until_ready(program(params, *inputs))

        memory = memory_of(program)
        used = memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporary"]
        made.append(Part(name, kind, call, 2 * macs, counts, seconds, used))
    return made


def measure(calls: Sequence[Callable[[], Any]], repeats: int) -> list[Timing]:
    """Times of several calls, taken in turns so that what disturbs one disturbs all; each is first called once."""
    times: list[list[tuple[float, float]]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(repeats):
        for call, taken in zip(calls, times, strict=True):
            start, start_cpu = time.perf_counter(), time.process_time()
            call()
            taken.append((time.perf_counter() - start, time.process_time() - start_cpu))
    return [Timing(*map(statistics.median, zip(*taken, strict=True))) for taken in times]


def result(part: Part, timing: Timing, peak: float, image_views: int) -> dict[str, Any]:
    """A part's figures, with JSON types only. `peak` is FLOP/s of the devices that it ran on."""
    rates = {name: count / timing.seconds for name, count in part.counts.items()}
    if "views" in rates:
        rates["images"] = rates["views"] / image_views
    return {
        "part": part.name,
        "pass": part.kind,
        "seconds": timing.seconds,
        "cpu_seconds": timing.cpu_seconds,
        "per_second": rates,
        "flops": part.flops,
        "utilisation": part.flops / timing.seconds / peak,
        "memory_bytes": part.memory_bytes,
        "compile_seconds": part.compile_seconds,
    }
