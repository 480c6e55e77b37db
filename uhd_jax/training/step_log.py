"""What a run says of its steps: read a step late, counted, written, and whether it may go on."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from uhd_jax import cost
from uhd_jax.config import StageConfig, to_dict
from uhd_jax.training import vdim
from uhd_jax.training.metrics import Fill, Meter, to_number
from uhd_jax.training.step import CompiledSteps

if TYPE_CHECKING:
    from uhd_jax.training.loop import Batches, Run

MAX_IN_FLIGHT = 1  # steps dispatched and not yet read back while the next one is prepared


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and what to do."""


@dataclasses.dataclass(frozen=True)
class Pending:
    """A dispatched step whose metrics have not been read."""

    step: int
    stage_step: int
    metrics: Mapping[str, jax.Array]
    told: tuple[jax.Array, jax.Array] | None  # of all processes: a signal's number, `Fill.numbers` and damaged samples
    info: Mapping[str, Any]
    fill: Fill
    wait_seconds: float
    compilations: int


class StepLog:
    """Reads metrics a step late, so that reading never keeps the device waiting, and writes the records."""

    def __init__(self, run: Run, stage: StageConfig, steps: CompiledSteps, batches: Batches):
        self._run, self._stage, self._steps, self._batches = run, stage, steps, batches
        self._pending: collections.deque[Pending] = collections.deque()
        self._meter = Meter()
        self._last_time, self._last_compile = time.monotonic(), steps.compile_seconds

    def dispatched(self, pending: Pending) -> bool:
        """Takes a step just dispatched, reads those before it; True when too many in a row were bad."""
        self._pending.append(pending)
        return any([self._read() for _ in range(len(self._pending) - MAX_IN_FLIGHT)])

    def catch_up(self) -> bool:
        """Reads all that are left; True when too many in a row were bad."""
        return any([self._read() for _ in range(len(self._pending))])

    def _read(self) -> bool:
        run, train, entry = self._run, self._run.config.train, self._pending.popleft()
        metrics = {key: to_number(value) for key, value in jax.device_get(dict(entry.metrics)).items()}
        fill, info = entry.fill, {key: to_number(value) for key, value in entry.info.items()}
        if entry.told is not None:  # not of one process alone
            number, counts = jax.device_get(entry.told)
            filled = len(fill.numbers())
            run.told, fill = run.told or int(number) or None, Fill.of_numbers(counts[:filled].tolist())
            if len(counts) > filled:
                damaged = self._batches.count_damaged(counts[filled:].tolist())
                info |= {key: info[key] + count for key, count in damaged.items()}
        now, compile_seconds = time.monotonic(), self._steps.compile_seconds
        seconds = (now - self._last_time) - (compile_seconds - self._last_compile)
        self._last_time, self._last_compile = now, compile_seconds
        if self._stage.objective == "language":
            flops = cost.train_flops(run.config.model, fill.used, self._stage.trainable)
        else:
            flops = vdim.step_flops(run.config.model, fill.used, self._stage.reconstruction)
        self._meter.add(fill, flops, entry.wait_seconds, seconds)
        run.checkpointer.check()
        run.console.step(self._stage.name)
        bad = metrics["skipped_in_a_row"]
        empty = metrics["weight_sum"] == 0
        run.empty_total += empty
        run.empty_in_a_row = (run.empty_in_a_row + 1) * empty
        metrics |= {"empty_total": run.empty_total, "empty_in_a_row": run.empty_in_a_row}
        if empty:
            run.console.say(f"step {entry.step}: nothing to train on, skipped ({run.empty_in_a_row} in a row)")
        elif bad:
            run.console.say(f"step {entry.step}: loss or gradient is not finite, skipped ({bad} in a row)")
        if entry.step % train.log_every == 0 or entry.stage_step == self._stage.steps:
            record = {"stage": self._stage.name, "step": entry.step, "stage_step": entry.stage_step, **metrics}
            record |= self._meter.take(run.peak)
            record |= {"compilations": entry.compilations, "compile_seconds": compile_seconds}
            record |= {f"data/{key}": value for key, value in info.items()}
            for writer in (*run.writers, run.console):
                writer.write(record)
        if run.empty_in_a_row >= min(train.max_bad_steps, self._stage.steps):
            raise TrainingError(self._why_nothing(entry.step, info))
        return not empty and bad >= train.max_bad_steps

    def _why_nothing(self, step: int, info: Mapping[str, float]) -> str:
        data = self._stage.data
        counts = [f"{key} {value}" for key, value in info.items() if "dropped" in key and value]
        return (
            f"step {step}: {self._run.empty_in_a_row} steps in a row had nothing to train on. Samples dropped so "
            f"far, the first of them named above: {', '.join(counts) or 'none'}. Mend the data of stage "
            f"{self._stage.name!r}, source {data.source!r} {to_dict(data)['options']}, and start again: the run goes "
            f"on from its last checkpoint"
        )
