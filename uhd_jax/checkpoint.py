"""Checkpoints of training runs and saved models. The only file that imports orbax.

A run keeps `WORKDIR/checkpoints/STEP/` with four items: `params` (the model's parameters), `training` (optimiser,
counters, key), `iterator` and `meta` (JSON). A step is written beside its final name and renamed once complete, so a
kill at any moment leaves the last complete one as the newest; half-written folders are ignored and overwritten.
A saved model is a folder with `params` and `model.json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from traceback import walk_tb
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from uhd_jax import __version__
from uhd_jax.config import ModelConfig, RunConfig, from_config_dict, to_dict

ITEMS = ("params", "training", "iterator", "meta")
FOLDER = "checkpoints"
MODEL_FILE = "model.json"

# What may differ between a checkpoint and the run that resumes from it. Nothing here changes what a parameter is or
# what the data iterator counts: how long, how often, on which devices, in how many pieces the same sums are computed,
# and where the samples lie. That they are the same samples, the iterator's own state ensures.
RESUMABLE = (
    r"name",
    r"model\.(tower_remat|decoder_remat|scan_layers|loss_chunk)",
    r"train\.(init_from|checkpoint_every|keep_checkpoints|log_every|max_bad_steps|prefetch|data_workers|peak_flops)",
    r"train\.mesh\.\w+",
    r"train\.stages\.\d+\.(steps|accumulation|data\.options\.path)",
)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names the folder and what to do."""


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
        self._unsilence, self._failed = _silence_orbax(), False
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

    def save(self, step: int, params: Any, training: Any, iterator: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Starts writing checkpoint `step`; returns once the arrays are copied, so that they may then be donated.

        Raises:
          CheckpointError: this save, or the one before it, could not be written. Earlier checkpoints are intact.
        """
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),
                    training=ocp.args.StandardSave(training),
                    iterator=ocp.args.JsonSave(dict(iterator)),
                    meta=ocp.args.JsonSave(dict(meta)),
                ),
            )

    def check(self) -> None:
        """Raises the CheckpointError of a save that has failed in the background, if one has; does not wait."""
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
        with _reading(self.directory / str(step), ITEMS):
            return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, step: int, params: Any, training: Any) -> Restored:
        """Reads checkpoint `step` into the given shapes and shardings, on whatever devices they name.

        Args:
          step: one of the checkpoints on disk.
          params: tree of ShapeDtypeStruct with shardings.
          training: the same for the training item.

        Raises:
          CheckpointError: an item is missing, damaged or of other shapes.
        """
        with _reading(self.directory / str(step), ITEMS):
            items = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(params),
                    training=ocp.args.StandardRestore(training),
                    iterator=ocp.args.JsonRestore(),
                    meta=ocp.args.JsonRestore(),
                ),
            )
        return Restored(items["params"], items["training"], items["iterator"], items["meta"])

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failed = True
            raise CheckpointError(_cannot_write(self.directory, error)) from error


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


def save_model(directory: str | os.PathLike[str], params: Any, config: ModelConfig) -> None:
    """Writes a model for inference: `params/` and `model.json`. An earlier one in the folder is replaced.

    Raises:
      CheckpointError: it could not be written.
    """
    directory = Path(directory).absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MODEL_FILE).unlink(missing_ok=True)  # present means complete
        with _quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(directory / "params", params, force=True)
        partial = directory / (MODEL_FILE + ".partial")
        partial.write_text(json.dumps({"model": to_dict(config), "version": __version__}, indent=2) + "\n")
        partial.replace(directory / MODEL_FILE)
    except Exception as error:
        raise CheckpointError(_cannot_write(directory, error)) from error


def load_model_config(directory: str | os.PathLike[str]) -> ModelConfig:
    """The config of the model that `load_model` would read.

    Raises:
      CheckpointError: there is no model there, or its description is damaged.
    """
    folder = _model_folder(directory)
    if (folder / MODEL_FILE).is_file():
        with _reading(folder):
            return from_config_dict(json.loads((folder / MODEL_FILE).read_text())["model"], ModelConfig, "model")
    with _reading(folder, ("meta",)), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return from_config_dict(checkpointer.restore(folder / "meta")["config"]["model"], ModelConfig, "model")


def load_model(directory: str | os.PathLike[str], place: Callable[[Any], Any] | None = None) -> tuple[Any, ModelConfig]:
    """Reads a model's parameters, nothing else, from a saved model or from a run's newest checkpoint.

    Args:
      directory: as given to `save_model`, or the workdir of a run.
      place: from the tree of ShapeDtypeStruct on disk to the one to read into, with shardings and perhaps other dtypes,
        e.g. `functools.partial(rules.with_shardings, mesh=mesh)`. None: as on disk, on the first device.

    Returns:
      The parameters and the model's config.

    Raises:
      CheckpointError: there is no model there, or it is damaged.
    """
    config, folder = load_model_config(directory), _model_folder(directory)
    with _reading(folder, ("params",)), ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(folder / "params").item_metadata
        if metadata is None:
            raise CheckpointError("the files in its folder params are damaged or incomplete")
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), metadata.tree)
        return checkpointer.restore(folder / "params", place(target) if place else target), config


def _model_folder(directory: str | os.PathLike[str]) -> Path:
    """The folder with the model's `params`: a saved model's own, or a run's newest checkpoint."""
    directory = Path(directory).absolute()
    if (directory / MODEL_FILE).is_file():
        return directory
    step = newest_step(directory)
    if step is None:
        raise CheckpointError(
            f"{directory} holds no model: neither {MODEL_FILE} nor a complete checkpoint in {FOLDER}/ was found there"
        )
    return directory / FOLDER / str(step)


def newest_step(workdir: str | os.PathLike[str]) -> int | None:
    """Step of the newest complete checkpoint of a run; None when there is none. Makes and locks nothing."""
    return max(_steps(Path(workdir) / FOLDER), default=None)


def _steps(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]


@contextlib.contextmanager
def _reading(folder: Path, parts: Sequence[str] = ()) -> Iterator[None]:
    """Turns whatever goes wrong into a CheckpointError about the checkpoint or saved model in `folder`."""
    others = [step for step in _steps(folder.parent) if str(step) != folder.name]
    if (folder / MODEL_FILE).is_file():
        advice = "copy it there again, or save it again with save_model"
    elif others:
        advice = f"delete {folder} to go on from checkpoint {max(others)}"
    else:
        advice = "no other checkpoint is there: copy it there again, or train again"
    lacking = [part for part in parts if not (folder / part).is_dir()]
    if lacking:
        raise CheckpointError(f"{folder} lacks {', '.join(lacking)}; {advice}")
    try:
        with _quiet_orbax():
            yield
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be read; {advice}. Cause: {_brief(error)}") from error


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    unsilence = _silence_orbax()
    yield
    unsilence()  # not after an error: what went wrong in other threads is printed whenever they come to it


def _silence_orbax() -> Callable[[], None]:
    """Holds back what Orbax and its threads print, and returns what ends that.

    Orbax warns of files it can do without. When a disk is full or a file is damaged, it raises one error and prints
    pages beside it, from its threads, from tasks that nobody awaits and from TensorStore, for as long as they last.
    """
    unraisablehook = sys.unraisablehook

    def to_show(record: logging.LogRecord) -> bool:
        return not (_of_orbax(Path(record.pathname)) or (record.exc_info and _from_orbax(*record.exc_info[1:])))

    def on_unraisable(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
        of_orbax = _from_orbax(unraisable.exc_value, unraisable.exc_traceback)
        if not (of_orbax or (code and _of_orbax(Path(code.co_filename)))):
            unraisablehook(unraisable)

    def end() -> None:
        for logger in loggers:
            logger.removeFilter(to_show)
        if sys.unraisablehook is on_unraisable:
            sys.unraisablehook = unraisablehook

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:
        logger.addFilter(to_show)
    sys.unraisablehook = on_unraisable
    return end


def _from_orbax(error: BaseException | None, traceback: TracebackType | None) -> bool:
    files = [Path(frame.f_code.co_filename) for frame, _ in walk_tb(traceback)]
    # TensorStore's own errors, in tasks of their own; and its calling back to where nobody waits any more.
    alone = any(words in str(error) for words in ("tensorstore", "OCDBT", "Event loop is closed"))
    return any(map(_of_orbax, files)) or (alone and all("asyncio" in file.parts for file in files))


def _of_orbax(file: Path) -> bool:
    return "orbax" in file.parts


def _brief(error: BaseException) -> str:
    """The first line of where the error came from; storage libraries append pages of context."""
    while error.__cause__:
        error = error.__cause__
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    line = next(iter(str(error).strip().splitlines()), "")[:300]
    return line if isinstance(error, CheckpointError) else f"{type(error).__name__}: {line}"


def _cannot_write(directory: Path, error: BaseException) -> str:
    there = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(there).free / 2**20
    return (
        f"cannot write {directory} ({free:.0f} MiB free there). Free some space or mend the folder's permissions; what "
        f"was complete before is intact. Cause: {_brief(error)}"
    )
