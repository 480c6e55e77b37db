"""Going on from the newest checkpoint of a run that can be read."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from uhd_jax.checkpoint import Checkpointer, CheckpointError, ConfigMismatch, Restored, require_same_config
from uhd_jax.config import RunConfig
from uhd_jax.sharding import multihost
from uhd_jax.sharding.checksums import checksums
from uhd_jax.training.state import TrainState

SEEN_BY_ALL_WITHIN = 60  # seconds, in which what one process wrote is seen by all; NFS keeps what it has read that long


@dataclasses.dataclass(frozen=True)
class Resumed:
    """Where a run goes on."""

    state: TrainState
    step: int
    iterator: dict[str, Any]  # state of the stage's data
    meta: dict[str, Any]  # as the checkpoint has it: stage_index, elapsed_seconds, ..
    warnings: tuple[str, ...]  # of newer checkpoints that could not be read


def beside_params(state: TrainState) -> dict[str, Any]:
    """What a checkpoint keeps of a state beside the model's parameters."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    del fields["params"]
    if not fields["scaffold"]:
        del fields["scaffold"]
    return fields


def resume(
    checkpointer: Checkpointer, workdir: Path, config: RunConfig, target_of: Callable[[int], TrainState]
) -> Resumed | None:
    """Reads the newest checkpoint of a run that all processes can read; None where there is none at all.

    Newer ones are renamed, not deleted, and only once an older one has been read: storage that cannot be reached for a
    while damages nothing.

    Args:
      checkpointer: of the workdir.
      workdir: the run's folder, for errors.
      config: the run that goes on.
      target_of: from the index of a stage to the shapes and shardings of its state.

    Raises:
      ConfigMismatch: the checkpoints are of another config.
      CheckpointError: not one of them can be read; the message is that of the newest.
    """
    damaged: dict[int, CheckpointError] = {}
    for step in _steps_of_all(checkpointer):
        problem = restored = None
        try:
            restored = _restore(checkpointer, step, workdir, config, target_of)
        except ConfigMismatch:
            raise
        except CheckpointError as error:
            problem = error
        if multihost.all_agree(problem is None):
            aside = [(number, checkpointer.set_aside(number), damaged[number]) for number in damaged]
            if aside:
                multihost.all_agree(True)  # nobody looks before the folders have their new names
                checkpointer.reload()
            warnings = [
                f"checkpoint {number} is damaged and lies in {path} now; going on from {step}. {error}"
                for number, path, error in aside
            ]
            training = {"scaffold": {}} | restored.training
            state = TrainState(params=restored.params, **training)
            return Resumed(state, step, restored.iterator, restored.meta, tuple(warnings))
        damaged[step] = problem or CheckpointError("Another process cannot read it")
        del restored  # its room is needed for the next
    if damaged:
        raise next(iter(damaged.values()))
    return None


def _steps_of_all(checkpointer: Checkpointer) -> list[int]:
    """The steps of the checkpoints, newest first, once all processes see the same ones.

    What a process sees of storage that has just been written may be old. One that went on from there would take what
    others have of later steps for damaged, or wait alone for a save that the others take for done.
    """
    for waited in range(SEEN_BY_ALL_WITHIN + 1):
        if waited:
            time.sleep(1)
            checkpointer.reload()
        steps = checkpointer.steps()
        first = multihost.as_first(steps)
        if multihost.all_agree(steps == first):
            return steps
    raise CheckpointError(
        f"{checkpointer.directory}: after {SEEN_BY_ALL_WITHIN} s process {jax.process_index()} sees the checkpoints "
        f"{steps} there, the first process {first}; all processes must see one folder"
    )


def _restore(
    checkpointer: Checkpointer, step: int, workdir: Path, config: RunConfig, target_of: Callable[[int], TrainState]
) -> Restored:
    meta = checkpointer.read_meta(step)
    require_same_config(workdir, meta["config"], config)
    target = target_of(meta["stage_index"])
    restored = checkpointer.restore(step, target.params, beside_params(target))
    saved = meta.get("checksums")  # older checkpoints have none
    if saved is not None:
        found = checksums({"params": restored.params, **restored.training})
        differing = sorted(path for path in saved | found if saved.get(path) != found.get(path))
        if differing:
            raise CheckpointError(
                f"{checkpointer.directory / str(step)}: {len(differing)} of {len(saved)} arrays are not what was "
                f"saved, the first is {differing[0]}"
            )
    return restored
