"""Saved models: a folder with `params` and `model.json`."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from uhd_jax import __version__
from uhd_jax.checkpoint.faults import (
    FOLDER,
    MODEL_FILE,
    CheckpointError,
    cannot_write,
    newest_step,
    quiet_orbax,
    reading,
)
from uhd_jax.config import ModelConfig, from_config_dict, to_dict

AT_ONCE = 4  # blocks of a streamed parameter that are being written while the next is made
TOGETHER = 2**26  # bytes of small parameters that are written together
DATA_FILE = 2**28  # bytes of a streamed model's files, each of which is gathered in memory


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A parameter that is made while it is written, so that it need never be in memory whole."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]  # shape of what is stored, and later read, together
    blocks: Callable[[], Iterable[tuple[tuple[slice, ...], np.ndarray]]]  # places, of whole chunks, and what is there
    compress: bool = False  # for what was a narrower type, whose zeros cost nothing then

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return self.size * self.dtype.itemsize


class _StreamedHandler(ocp.type_handlers.NumpyHandler):
    """Writes `Streamed` parameters, few at a time, as what Orbax reads back as arrays."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self.failed: Exception | None = None  # of the making, not of the writing

    async def _background_serialize(self, values: Any, infos: Any, args: Any = None) -> None:
        write, rest = super()._background_serialize, list(zip(values, infos, args, strict=True))
        while rest:
            count, nbytes = 0, 0
            while count < len(rest) and (not count or nbytes + rest[count][0].nbytes <= TOGETHER):
                nbytes += rest[count][0].nbytes
                count += 1
            some, rest = rest[:count], rest[count:]
            # All are waited for also after an error: whoever then removes the files must not find new ones.
            done = await asyncio.gather(*(write([v], [i], [a]) for v, i, a in some), return_exceptions=True)
            for problem in filter(None, done):
                raise problem

    async def _open_and_write(self, value: Streamed, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        compressor = {"id": "blosc", "cname": "lz4", "clevel": 1, "shuffle": 1} if value.compress else None
        tspec["metadata"] |= {"chunks": list(value.chunk), "compressor": compressor}
        # Not confirmed by the disk file by file, which takes longer than all else, but in the end.
        context = ts.Context({"file_io_sync": False}, parent=ts_context)
        array = await ts.open(ts.Spec(tspec), create=True, open=True, context=context)
        blocks, writing = iter(value.blocks()), collections.deque()
        try:
            while (made := self._next(blocks)) is not None:
                place, block = made
                writing.append(array[place].write(block, can_reference_source_data_indefinitely=True))
                if len(writing) > AT_ONCE:
                    await writing.popleft()
            while writing:
                await writing.popleft()
        finally:
            for one in writing:
                with contextlib.suppress(Exception):
                    await one

    def _next(self, blocks: Iterator[Any]) -> Any:
        try:
            return next(blocks, None)
        except Exception as error:
            self.failed = error
            raise


def save_model(directory: str | os.PathLike[str], params: Any, config: ModelConfig) -> None:
    """Writes a model for inference: `params/` and `model.json`. An earlier one in the folder is replaced.

    Args:
      directory: made if absent.
      params: a tree of arrays, or of `Streamed`.
      config: the model.

    Raises:
      CheckpointError: it could not be written. What the blocks of a `Streamed` raise is raised as it is.
    """
    directory = Path(directory).absolute()
    streamed = _StreamedHandler()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MODEL_FILE).unlink(missing_ok=True)  # present means complete
        with quiet_orbax():
            if any(isinstance(leaf, Streamed) for leaf in jax.tree.leaves(params)):
                registry = ocp.type_handlers.create_type_handler_registry((Streamed, streamed))
                handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
                arguments = ocp.args.PyTreeSave(params, ocdbt_target_data_file_size=DATA_FILE)
                with ocp.Checkpointer(handler) as checkpointer:
                    checkpointer.save(directory / "params", arguments, force=True)
                for file in filter(Path.is_file, (directory / "params").rglob("*")):
                    with file.open("rb") as opened:
                        os.fsync(opened.fileno())
            else:
                with ocp.StandardCheckpointer() as checkpointer:
                    checkpointer.save(directory / "params", params, force=True)
        partial = directory / (MODEL_FILE + ".partial")
        partial.write_text(json.dumps({"model": to_dict(config), "version": __version__}, indent=2) + "\n")
        partial.replace(directory / MODEL_FILE)
    except Exception as error:
        if streamed.failed is not None:
            raise streamed.failed from None
        raise CheckpointError(cannot_write(directory, error)) from error


def load_model_config(directory: str | os.PathLike[str]) -> ModelConfig:
    """The config of the model that `load_model` would read.

    Raises:
      CheckpointError: there is no model there, or its description is damaged.
    """
    folder = _model_folder(directory)
    if (folder / MODEL_FILE).is_file():
        with reading(folder):
            return from_config_dict(json.loads((folder / MODEL_FILE).read_text())["model"], ModelConfig, "model")
    with reading(folder, ("meta",)), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
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
    with reading(folder, ("params",)), ocp.StandardCheckpointer() as checkpointer:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), _tree(checkpointer, folder)
        )
        return checkpointer.restore(folder / "params", place(target) if place else target), config


class SavedModel:
    """A model on disk whose parameters are read one at a time."""

    def __init__(self, directory: str | os.PathLike[str]):
        """Opens what `load_model` would read; errors as there."""
        self.config = load_model_config(directory)
        self._folder = _model_folder(directory)
        with reading(self._folder, ("params",)), ocp.StandardCheckpointer() as checkpointer:
            self.tree = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), _tree(checkpointer, self._folder)
            )

    def read(self, path: str) -> np.ndarray:
        """The parameter at `path`, e.g. "decoder/layers/mlp/gate/kernel", as on disk.

        Raises:
          CheckpointError: it is damaged.
        """
        keys = path.split("/")
        item: Any = jax.ShapeDtypeStruct((), np.float32)  # stands for the one to be read
        restore_args: Any = ocp.RestoreArgs(restore_type=np.ndarray)
        for key in reversed(keys):
            item, restore_args = {key: item}, {key: restore_args}
        arguments = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
        with reading(self._folder), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            found = checkpointer.restore(self._folder / "params", arguments)
        for key in keys:
            found = found[key]
        return np.asarray(found)


def _tree(checkpointer: ocp.StandardCheckpointer, folder: Path) -> Any:
    """Shapes and dtypes of the parameters on disk."""
    metadata = checkpointer.metadata(folder / "params").item_metadata
    if metadata is None:
        raise CheckpointError("the files in its folder params are damaged or incomplete")
    return metadata.tree


def _model_folder(directory: str | os.PathLike[str]) -> Path:
    """The folder with the model's `params`: a saved model's own, or a run's newest checkpoint."""
    directory = Path(directory).absolute()
    if (directory / MODEL_FILE).is_file():
        return directory
    step = newest_step(directory)
    if step is None:
        problem = (
            f"{directory} holds no model: neither {MODEL_FILE} nor a complete checkpoint in {FOLDER}/ was found there"
        )
        if (directory / "config.json").is_file():
            problem += "; if it is a checkpoint of another framework, uhd-jax convert import makes a model of it"
        raise CheckpointError(problem)
    return directory / FOLDER / str(step)
