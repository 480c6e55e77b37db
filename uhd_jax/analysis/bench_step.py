"""The whole training step on this machine's devices, alone and with the stage's own data."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax

from uhd_jax import cost
from uhd_jax.analysis.aot_compile import memory_of
from uhd_jax.analysis.bench import Case, full_batch, measure
from uhd_jax.config import RunConfig
from uhd_jax.models import uhd
from uhd_jax.sharding.mesh import make_mesh
from uhd_jax.sharding.rules import check_rows, place_batch
from uhd_jax.training.batches import make_batches
from uhd_jax.training.objective import loss_sums_of, scaffold_init
from uhd_jax.training.optimizer import make_optimizer
from uhd_jax.training.stages import SCAFFOLD
from uhd_jax.training.state import abstract_state, draw_params, first_state, shardings_of
from uhd_jax.training.step import CompiledSteps, make_train_step


class Step:
    """A stage's step with a state of random parameters."""

    def __init__(self, config: RunConfig, case: Case):
        model, stage = config.model, case.stage
        self.case, self.mesh = case, make_mesh(config.train.mesh)
        check_rows(stage.rows, stage.accumulation, self.mesh)
        init = functools.partial(uhd.init_params, model)
        key = jax.random.key(0)
        optimizer = make_optimizer(config.train.optimizer, stage)
        scaffold = scaffold_init(model, stage)
        shapes = {**jax.eval_shape(init, key), SCAFFOLD: jax.eval_shape(scaffold, key)}
        target = abstract_state(shapes, optimizer, stage.trainable, self.mesh)
        params = draw_params(init, 0, shardings_of(target.params))
        params = {**params, SCAFFOLD: draw_params(scaffold, 0, shardings_of(target.scaffold))}
        self.state = first_state(params, 0, optimizer, stage.trainable, target)
        self.step = make_train_step(loss_sums_of(model, stage), stage, config.train.optimizer, target, self.mesh)

    def run(self, program: Any, batch: Any) -> None:
        """One step; waits for its end."""
        self.state, metrics = program(self.state, batch)
        jax.block_until_ready((self.state, metrics))


def measure_step(config: RunConfig, case: Case, repeats: int, peak: float, image_views: int) -> dict[str, Any]:
    """The step on a random batch that fills the case's bucket: figures as of `bench.result`."""
    made = Step(config, case)
    batch = place_batch(full_batch(case), made.mesh)
    start = time.monotonic()
    program = made.step.lower(made.state, batch).compile()
    compile_seconds = time.monotonic() - start
    (timing,) = measure([lambda: made.run(program, batch)], repeats)
    area = case.grid[0] * case.grid[1]
    work = dataclasses.replace(
        cost.bucket_work(case.bucket), patches=case.views * area, patch_pairs=case.views * area**2
    )
    flops = cost.train_flops(config.model, work, case.stage.trainable)
    memory = memory_of(program)
    views = case.views / timing.seconds
    return {
        "part": "step",
        "pass": "training",
        "seconds": timing.seconds,
        "cpu_seconds": timing.cpu_seconds,
        "per_second": {
            "tokens": case.bucket.rows * case.bucket.tokens / timing.seconds,
            "views": views,
            "images": views / image_views,
        },
        "flops": flops,
        "utilisation": flops / timing.seconds / peak,
        "memory_bytes": memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporary"],
        "compile_seconds": compile_seconds,
    }


def measure_data(config: RunConfig, case: Case, steps: int) -> dict[str, Any]:
    """The stage's data: alone, as fast as it comes, and what the steps wait for it.

    Returns:
      batches and images per second of the pipeline alone; share of the time of `steps` steps that waits for a batch.
      "skipped" with the reason where the data is not there.
    """
    stages = list(config.train.stages)
    index = [stage.name for stage in stages].index(case.stage.name)
    stages[index] = case.stage
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, stages=tuple(stages)))
    try:
        with make_batches(config, index) as batches:
            next(batches)  # threads and processes are started, the window is read
            start, images = time.perf_counter(), 0.0
            for _ in range(steps):
                images += next(batches)[1]["images"]
            alone = time.perf_counter() - start
    except (OSError, ValueError) as error:
        return {"skipped": " ".join(str(error).split())}
    made, seen, waited, spent, left = Step(config, case), set(), 0.0, 0.0, steps
    programs = CompiledSteps(made.step)
    with make_batches(config, index) as batches:
        while left:
            start = time.perf_counter()
            batch, _ = next(batches)
            got = time.perf_counter()
            made.run(programs, place_batch(batch, made.mesh))
            if batch.bucket in seen:  # else the step was compiled just now
                waited, spent, left = waited + got - start, spent + time.perf_counter() - start, left - 1
            seen.add(batch.bucket)
    return {
        "steps": steps,
        "batches_per_second": steps / alone,
        "images_per_second": images / alone,
        "wait_share": waited / spent,
    }
