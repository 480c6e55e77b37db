"""Checkpoints of training runs."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from uhd_jax.checkpoint.faults import FOLDER, CheckpointError, cannot_write, reading, silence_orbax
from uhd_jax.config import ModelConfig, RunConfig, to_dict

ITEMS = ("params", "training", "iterator", "meta")

# What may differ between a checkpoint and the run that resumes from it. Nothing here changes what a parameter is or
# what the data iterator counts: how long, how often, on which devices, in how many pieces the same sums are computed,
# and where the samples lie. That they are the same samples, the iterator's own state ensures.
RESUMABLE = (
    r"name",
    r"model\.(tower_remat|decoder_remat|scan_layers|attention|loss_chunk)",
    r"(model\.)?decoder\.max_positions",
    r"train\.(init_from|checkpoint_every|keep_checkpoints|log_every|prefetch|data_workers|peak_flops)",
    r"train\.(max_bad_steps|max_broken_samples|checksum_every|hang_seconds|hang_exits)",
    r"train\.mesh\.\w+",
    r"train\.stages\.\d+\.(steps|accumulation|data\.options\.(parts\.\d+\.options\.)?(path|image_root|row_groups))",
    r"train\.stages\.\d+\.data\.(options\.parts\.\d+\.)?index",
)


class ConfigMismatch(CheckpointError):
    """A checkpoint belongs to another config than the run that would resume from it."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held."""

    params: Any
    training: Any
    iterator: dict[str, Any]
    meta: dict[str, Any]


def differing_keys(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Keys, as `train.stages.0.rows`, whose values differ and may not (`RESUMABLE`), in alphabetical order.

    Args:
      saved: `config.to_dict` of the run that wrote the checkpoint.
      current: the same of the run that reads it.
    """
    old, new = dict(_flatten(saved)), dict(_flatten(current))
    missing = object()
    keys = sorted(key for key in old | new if old.get(key, missing) != new.get(key, missing))
    return [key for key in keys if not any(re.fullmatch(pattern, key) for pattern in RESUMABLE)]


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    else:
        pairs = []
    if not pairs:
        yield path, value
    for key, item in pairs:
        yield from _flatten(item, f"{path}.{key}" if path else str(key))


class Checkpointer:
    """Writes and reads a run's checkpoints; writing goes on beside the training."""

    def __init__(self, workdir: str | os.PathLike[str], keep: int = 2):
        """Opens `workdir`/checkpoints, made if absent; the newest `keep` checkpoints stay."""
        self.directory = Path(workdir).absolute() / FOLDER
        self._unsilence, self._failed = silence_orbax(), False
        with self._writing():
            self.directory.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=ITEMS,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(keep), enable_async_checkpointing=True
            ),
        )

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint; None when there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def set_aside(self, step: int) -> Path:
        """Takes checkpoint `step` out of the way, under another name beside the others, which it returns.

        Raises:
          CheckpointError: it cannot be renamed.
        """
        folder = self.directory / str(step)
        number = next(n for n in itertools.count(1) if not folder.with_name(f"{step}.damaged-{n}").exists())
        aside = folder.with_name(f"{step}.damaged-{number}")
        with self._writing():
            if jax.process_index() == 0:
                folder.rename(aside)
        return aside

    def reload(self) -> None:
        """Reads again which checkpoints there are, once those set aside are gone for every process."""
        self._manager.reload()

    def save(self, step: int, params: Any, training: Any, iterator: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Starts writing checkpoint `step`; returns once the arrays are copied, so that they may then be donated.

        Raises:
          CheckpointError: this save, or the one before it, could not be written. Earlier checkpoints are intact.
          JaxRuntimeError: another process cannot be reached.
        """
        with self._writing():
            begun = self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),
                    training=ocp.args.StandardSave(training),
                    iterator=ocp.args.JsonSave(dict(iterator)),
                    meta=ocp.args.JsonSave(dict(meta)),
                ),
            )
        if not begun:
            raise CheckpointError(
                f"{self.directory}: step {step} is not saved, as checkpoint {self.latest_step()} is there already; "
                f"another run may be writing there"
            )

    def check(self) -> None:
        """Raises the error of a save that has failed in the background, if one has, as `save`; does not wait."""
        with self._writing():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns when everything is on disk; raises as `save`."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go of the threads; raises as `save`."""
        with self._writing():
            self._manager.close()
        if not self._failed:  # what its threads say of that may come at any time
            self._unsilence()

    def read_meta(self, step: int) -> dict[str, Any]:
        """The meta item of checkpoint `step`.

        Raises:
          CheckpointError: missing or unreadable.
        """
        folder = self.directory / str(step)
        with reading(folder, ITEMS):
            return self._read(ocp.JsonCheckpointHandler(), step, "meta")

    def restore(self, step: int, params: Any, training: Any) -> Restored:
        """Reads checkpoint `step` into the given shapes and shardings, on whatever devices they name.

        Each process reads what its own devices need and waits for no other.

        Args:
          step: one of the checkpoints on disk.
          params: tree of ShapeDtypeStruct with shardings.
          training: the same for the training item.

        Raises:
          CheckpointError: an item is missing, damaged or of other shapes.
        """
        folder = self.directory / str(step)
        with reading(folder, ITEMS):
            trees = {
                name: self._read(ocp.StandardCheckpointHandler(), step, name, ocp.args.StandardRestore(target))
                for name, target in (("params", params), ("training", training))
            }
            iterator = self._read(ocp.JsonCheckpointHandler(), step, "iterator")
        return Restored(iterator=iterator, meta=self.read_meta(step), **trees)

    def _read(self, handler: Any, step: int, item: str, arguments: Any = None) -> Any:
        """An item by its handler alone: Orbax's checkpointers would wait for all processes behind it, also for one that
        has failed."""
        try:
            return handler.restore(self._manager.directory / str(step) / item, args=arguments or ocp.args.JsonRestore())
        finally:
            handler.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failed = True
            if lost := _of_jax(error):
                raise lost from None
            raise CheckpointError(cannot_write(self.directory, error)) from error


def _of_jax(error: BaseException | None) -> jax.errors.JaxRuntimeError | None:
    """JAX's own error behind Orbax's: with several processes another one is gone, which is no matter of storage."""
    while error and not isinstance(error, jax.errors.JaxRuntimeError):
        error = error.__cause__
    return error if jax.process_count() > 1 else None


def require_same_config(workdir: str | os.PathLike[str], saved: Mapping[str, Any], config: RunConfig) -> None:
    """Refuses to resume a run of another config; `saved` is the config in the checkpoint's meta.

    Raises:
      ConfigMismatch: names the differing keys with both values.
    """
    current = to_dict(config)
    keys = differing_keys(saved, current)
    if keys:
        raise ConfigMismatch(
            f"{workdir} holds checkpoints of another config ({_show(keys, saved, current)}). Resume with the config "
            f"they were made with, or use a new workdir, with train.init_from={workdir} if only parameters are wanted"
        )


def require_same_model(directory: str | os.PathLike[str], saved: ModelConfig, config: ModelConfig) -> None:
    """Refuses parameters that would mean something else in the model of `config`.

    Raises:
      ConfigMismatch: tower, compressor, connector or decoder differ; names the keys with both values.
    """
    parts = ("tower", "compressor", "connector", "decoder")
    there, here = ({part: to_dict(getattr(model, part)) for part in parts} for model in (saved, config))
    keys = differing_keys(there, here)
    if keys:
        raise ConfigMismatch(f"the model in {directory} is not this config's: model.{_show(keys, there, here)}")


def _show(keys: list[str], saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    old, new = dict(_flatten(saved)), dict(_flatten(current))
    shown = "; ".join(f"{key}: {old.get(key, 'absent')!r} there, {new.get(key, 'absent')!r} here" for key in keys[:8])
    return shown + (f"; and {len(keys) - 8} more" if len(keys) > 8 else "")
