"""The training loop: stages in order, automatic resume, checkpoints, signals, logs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import jax
from jax.sharding import Mesh

from uhd_jax import __version__, cost
from uhd_jax.batch import Batch
from uhd_jax.checkpoint import (
    Checkpointer,
    newest_step,
    require_same_model,
)
from uhd_jax.config import RunConfig, StageConfig, to_dict
from uhd_jax.models import uhd
from uhd_jax.sharding import multihost
from uhd_jax.sharding.checksums import checksums, differing_copies
from uhd_jax.sharding.mesh import make_mesh
from uhd_jax.sharding.rules import check_decoder, check_params, check_rows, place_batch
from uhd_jax.training import vdim
from uhd_jax.training.metrics import (
    JSONL_FILE,
    TENSORBOARD_FOLDER,
    Console,
    Fill,
    JsonlWriter,
    Quiet,
    TensorBoardWriter,
)
from uhd_jax.training.objective import loss_sums_of, scaffold_init
from uhd_jax.training.optimizer import make_optimizer
from uhd_jax.training.resume import beside_params, resume
from uhd_jax.training.signals import Interrupted, Signals
from uhd_jax.training.stages import SCAFFOLD, with_longest
from uhd_jax.training.start import read_start, start_config
from uhd_jax.training.state import TrainState, abstract_state, draw_params, enter_stage, first_state, shardings_of
from uhd_jax.training.step import CompiledSteps, make_train_step
from uhd_jax.training.step_log import Pending, StepLog, TrainingError
from uhd_jax.training.watchdog import Watchdog
from uhd_jax.training.workdir import claimed


class Batches(Protocol):
    """A stage's data: an endless iterator whose state is a JSON dict.

    If what one process finds in a batch counts for all, as damaged samples do, it also has `damaged`, the counts of the
    last batch here, and `count_damaged`, which takes those of all processes: see `batches.StageBatches`.
    """

    def __next__(self) -> tuple[Batch, Mapping[str, Any]]:
        """A batch of this process's rows, in NumPy and never written to again, and counters to log."""

    def get_state(self) -> dict[str, Any]:
        """State after the last batch that was returned, whatever has been prepared beyond it."""

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues after the batch at which `state` was taken."""


MakeBatches = Callable[[RunConfig, int], contextlib.AbstractContextManager[Batches]]  # of the stage with this index


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    state: TrainState
    step: int
    finished: bool
    interrupted_by: int | None  # number of the signal
    elapsed_seconds: float  # of all processes that worked on this run

    @property
    def exit_status(self) -> int:
        """0 when finished or asked to leave by SIGTERM, 130 after SIGINT."""
        return 130 if self.interrupted_by == signal.SIGINT else 0


def train(
    config: RunConfig,
    workdir: str | os.PathLike[str],
    make_batches: MakeBatches,
    *,
    devices: Sequence[jax.Device] | None = None,
    stream: TextIO | None = None,
) -> TrainResult:
    """Trains through all stages, or on from the newest checkpoint in `workdir`.

    A checkpoint is written every `checkpoint_every` steps, at the end of each stage, on SIGTERM and on SIGINT (the
    step in progress is finished first, data that is not there yet is not waited for), and before giving up on
    non-finite losses. A SIGINT after that ends the process at once; so may SIGKILL at any time: the run then continues
    from its last checkpoint, with the same losses as if nothing had happened, bit for bit on CPU.

    Of several processes the first one writes and shows; of the others only warnings are shown. A signal to one or more
    is told to all with the next step, and all leave after the same step. Data that is late is waited for then.

    Args:
      config: the run.
      workdir: where checkpoints, metrics.jsonl and TensorBoard files go; made if absent.
      make_batches: opens the data of a stage.
      devices: None for all.
      stream: where progress goes; None for standard error.

    Returns:
      The last state, and how the run ended.

    Raises:
      ConfigError: a stage trains parts that the model does not have.
      ShardingError: rows or parameters do not divide over the devices.
      WorkdirError: `workdir` cannot be made, or another training is at work there.
      ConfigMismatch: `workdir` holds a run of another config.
      CheckpointError: a checkpoint cannot be read or written.
      MetricsError: the log cannot be written.
      TrainingError: `max_bad_steps` steps in a row were not finite or had nothing to train on, a stage's data came
        to an end, or another process did.
    """
    run = Run(config, Path(workdir), make_batches, make_mesh(config.train.mesh, devices), stream)
    try:
        with Signals() as signals:
            return run(signals)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise TrainingError(_why_lost(run.workdir, error)) from error


class Run:
    """One call of `train`."""

    def __init__(self, config: RunConfig, workdir: Path, make_batches: MakeBatches, mesh: Mesh, stream: TextIO | None):
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self.make_batches, self.stream = make_batches, stream
        for stage in config.train.stages:
            check_rows(stage.rows, stage.accumulation, mesh)
        self.init_params = functools.partial(uhd.init_params, config.model)
        self.abstract_params = jax.eval_shape(self.init_params, jax.random.key(0))
        check_decoder(config.model.decoder, mesh)
        check_params(self.abstract_params, mesh, config.train.mesh.unsharded_tolerance)
        for index in range(len(config.train.stages)):
            self._target(index)  # what cannot be trained or sharded is refused before the workdir is made
        init_from = config.train.init_from
        if init_from and newest_step(workdir) is None:
            require_same_model(init_from, start_config(init_from), config.model)
        self.peak = cost.peak_flops(mesh.devices.flatten().tolist(), config.train.peak_flops)
        self.together = jax.process_count() > 1
        self.poll = multihost.Poll(mesh) if self.together else None
        self.told: int | None = None  # a signal to any process, as all have read it
        self.saved_step: int | None = None
        self.warnings: tuple[str, ...] = ()
        self.start, self.seconds_before = time.monotonic(), 0.0
        self.empty_total = self.empty_in_a_row = 0  # steps that had nothing to train on; in a row within a stage

    def __call__(self, signals: Signals) -> TrainResult:
        """Trains until the end or a signal."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(claimed(self.workdir))
            train = self.config.train
            self.watchdog = stack.enter_context(Watchdog(self.workdir, train.hang_seconds, train.hang_exits).watching())
            self.checkpointer = Checkpointer(self.workdir, self.config.train.keep_checkpoints)
            stack.push(self._close)
            state, first, iterator = self._start_or_resume()
            step = int(state.step)
            if jax.process_index() == 0:
                self.console = Console(sum(stage.steps for stage in self.config.train.stages), step, self.stream)
                stack.callback(self.console.close)
                self.writers = (
                    JsonlWriter(self.workdir / JSONL_FILE, step),
                    TensorBoardWriter(self.workdir / TENSORBOARD_FOLDER, step),
                )
            else:
                self.console, self.writers = Quiet(f"process {jax.process_index()}: ", self.stream), ()
                stack.callback(self.console.close)
            for writer in self.writers:
                stack.callback(writer.close)
            for warning in self.warnings:
                self.console.say(warning)
            if self.saved_step is not None:
                self.console.say(f"resuming {self.workdir} at step {step}")

            for index in range(first, len(self.config.train.stages)):
                if index > first:
                    target = self._target(index)
                    state = enter_stage(state, *self._optimizer(index), target, self._draw_scaffold(index, target))
                state = self._stage(index, state, iterator, signals)
                iterator = None
                if self._asked(signals):
                    break
            self.checkpointer.wait()
            finished = index == len(self.config.train.stages) - 1 and int(state.stage_step) >= self._config(index).steps
            if self._asked(signals):
                saved = "nothing to save yet" if self.saved_step is None else f"step {self.saved_step} is saved"
                self.console.say(f"interrupted: {saved}; start again to continue")
        return TrainResult(state, int(state.step), finished, self._asked(signals), self._elapsed())

    def _asked(self, signals: Signals) -> int | None:
        """The signal that asks this run to leave."""
        return self.told if self.together else signals.received

    def _waiting(self, signals: Signals) -> contextlib.AbstractContextManager[None]:
        """Several processes leave after a step only, so none leaves while it waits."""
        return contextlib.nullcontext() if self.together else signals.waiting()

    def _close(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None or not self.together:  # else another process may be gone, and the writing never end
            self.checkpointer.close()

    def _elapsed(self) -> float:
        return self.seconds_before + time.monotonic() - self.start

    def _config(self, index: int) -> StageConfig:
        return self.config.train.stages[index]

    def _optimizer(self, index: int) -> tuple[Any, tuple[str, ...]]:
        stage = self._config(index)
        return make_optimizer(self.config.train.optimizer, stage), stage.trainable

    def _target(self, index: int) -> TrainState:
        scaffold = jax.eval_shape(self._scaffold(index), jax.random.key(0))
        return abstract_state({**self.abstract_params, SCAFFOLD: scaffold}, *self._optimizer(index), self.mesh)

    def _scaffold(self, index: int) -> Callable[[jax.Array], dict[str, Any]]:
        return scaffold_init(self.config.model, self._config(index))

    def _draw_scaffold(self, index: int, target: TrainState) -> dict[str, Any]:
        seed = self.config.train.seed
        return draw_params(self._scaffold(index), seed, shardings_of(target.scaffold))

    def _start_or_resume(self) -> tuple[TrainState, int, dict[str, Any] | None]:
        """The state, the index of its stage, and the state of that stage's iterator (None for a new one)."""
        found = resume(self.checkpointer, self.workdir, self.config, self._target)
        if found is None:
            target = self._target(0)
            seed, init_from, known = self.config.train.seed, self.config.train.init_from, 0
            if init_from:
                params, source = read_start(init_from, target.params)
                known = source.decoder.max_positions
            else:
                params = draw_params(self.init_params, seed, shardings_of(target.params))
            self.config = with_longest(self.config, known)
            params = {**params, SCAFFOLD: self._draw_scaffold(0, target)}
            return first_state(params, seed, *self._optimizer(0), target), 0, None
        self.warnings, self.saved_step, meta = found.warnings, found.step, found.meta
        self.seconds_before = meta["elapsed_seconds"]
        self.config = with_longest(self.config, meta["config"]["model"]["decoder"].get("max_positions", 0))
        self.empty_total, self.empty_in_a_row = meta.get("empty_total", 0), meta.get("empty_in_a_row", 0)
        return found.state, meta["stage_index"], found.iterator

    def _stage(self, index: int, state: TrainState, iterator: dict[str, Any] | None, signals: Signals) -> TrainState:
        """Runs a stage from the state's step to the stage's end or a signal."""
        stage = self._config(index)
        step, stage_step = int(state.step), int(state.stage_step)
        if stage_step >= stage.steps:
            return state
        if stage_step == 0:
            self.empty_in_a_row = 0
        steps = CompiledSteps(
            make_train_step(
                loss_sums_of(self.config.model, stage),
                stage,
                self.config.train.optimizer,
                self._target(index),
                self.mesh,
            )
        )
        share = multihost.row_share(self.mesh)[1] / jax.process_count()  # of this process in the rows it provides
        with contextlib.ExitStack() as stack:
            try:
                with self._waiting(signals):
                    batches = stack.enter_context(self.make_batches(self.config, index))
                    if iterator is not None:
                        batches.set_state(iterator)
            except Interrupted:
                return state
            log = StepLog(self, stage, steps, batches)
            taken = batches.get_state()
            while stage_step < stage.steps and not self._asked(signals):
                asked = time.monotonic()
                self.watchdog.alive(f"step {step + 1} waits for its data")
                try:
                    with self._waiting(signals):
                        batch, info = next(batches)
                except Interrupted:
                    break  # perhaps when the data had moved on
                except StopIteration:
                    raise TrainingError(
                        f"the data of stage {stage.name!r} ended after {stage_step} of {stage.steps} steps: give it "
                        f"more samples, or set the stage's steps to {stage_step}"
                    ) from None
                taken = batches.get_state()
                if stage.objective == "reconstruction":
                    vdim.check_views(batch, stage.reconstruction)
                waited = time.monotonic() - asked
                self.watchdog.alive(f"step {step + 1} has its data")
                fill = Fill.of(batch, info)
                state, metrics = steps(state, place_batch(batch, self.mesh))
                told = None
                if self.poll:
                    damaged = [share * count for count in getattr(batches, "damaged", ())]
                    told = self.poll(signals.received or 0, [*fill.numbers(share), *damaged])
                step, stage_step = step + 1, stage_step + 1
                too_many_bad = log.dispatched(
                    Pending(step, stage_step, metrics, told, info, fill, waited, steps.compilations)
                )
                if self.mesh.size > 1 and step % (self.config.train.checksum_every or step + 1) == 0:
                    self._compare_copies(step, state)
                due = step % self.config.train.checkpoint_every == 0 or stage_step == stage.steps
                if due or too_many_bad:
                    # Before the save: a step in the checkpoint must not be missing from the log after a kill.
                    too_many_bad |= log.catch_up()
                    self._save(index, state, self._data_state(batches, taken))
                if too_many_bad:
                    self.checkpointer.wait()
                    raise TrainingError(
                        f"step {step}: {self.config.train.max_bad_steps} steps in a row had a loss or gradient that is "
                        f"not finite; parameters are as before them, saved as checkpoint {step}. Lower the learning "
                        f"rate in a new workdir with train.init_from={self.workdir}, or look at the data"
                    )
            log.catch_up()
            if step not in (0, self.saved_step):
                self._save(index, state, self._data_state(batches, taken))
        return state

    def _data_state(self, batches: Batches, taken: dict[str, Any]) -> dict[str, Any]:
        """The state of the data to save, where `taken` is that of the last batch trained on.

        Several processes learn of each other's damaged samples when a step is read, so they ask again; none of them is
        interrupted. One that is alone may have been interrupted when the data had moved on already.
        """
        return batches.get_state() if self.together else taken

    def _compare_copies(self, step: int, state: TrainState) -> None:
        odd = differing_copies({"params": state.params, **beside_params(state)}, self.mesh)
        if odd:
            path, devices = next(iter(odd.items()))
            where = ", ".join(f"{device} of process {device.process_index}" for device in devices[:4])
            raise TrainingError(
                f"step {step}: devices that should hold the same do not: {where} differ in {path}"
                f"{f' and {len(odd) - 1} more arrays' if len(odd) > 1 else ''}. Nothing of it is saved; start again, "
                f"without that device if it happens again: the run goes on from checkpoint {self.saved_step}, which "
                f"may be from after it began: delete it to go on from the one before"
            )

    def _save(self, index: int, state: TrainState, iterator: dict[str, Any]) -> None:
        step = int(state.step)
        self.watchdog.alive(f"the saving of step {step}")
        meta = {
            "config": to_dict(self.config),
            "stage": self._config(index).name,
            "stage_index": index,
            "step": step,
            "stage_step": int(state.stage_step),
            "elapsed_seconds": self._elapsed(),
            "empty_total": self.empty_total,
            "empty_in_a_row": self.empty_in_a_row,
            "checksums": checksums({"params": state.params, **beside_params(state)}),
            "version": __version__,
        }
        self.checkpointer.save(step, state.params, beside_params(state), iterator, meta)
        self.saved_step = step


def _why_lost(workdir: Path, error: Exception) -> str:
    step, cause = newest_step(workdir), " ".join(str(error).split())[:300]
    return (
        f"process {jax.process_index()} of {jax.process_count()} cannot go on, most likely because another one ended "
        f"or cannot be reached. Start all of them again: the run goes on from "
        f"{'its start' if step is None else f'checkpoint {step}'}. Cause: {cause}"
    )
