"""From a foreign checkpoint to a saved model or onto a mesh, and back: one parameter, mostly one layer, at a time."""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from uhd_jax.checkpoint import SavedModel, Streamed, save_model
from uhd_jax.config import ModelConfig
from uhd_jax.convert import sentencepiece
from uhd_jax.convert.families import FAMILIES, Dropped, Family, drops, family_named, find_family, select
from uhd_jax.convert.source import Source
from uhd_jax.convert.tables import ConvertError, Move, cast, flatten, load, match, match_back, not_finite, unflatten
from uhd_jax.convert.tensors import DTYPES
from uhd_jax.convert.writer import Item, whole_folder, write_safetensors

WHOLE = {"tower", "connector", "decoder"}  # parts of a model that can answer
AS_IS = "as-is"
STORED = {AS_IS: None, "float32": DTYPES["F32"], "bfloat16": DTYPES["BF16"]}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_REASON = 300  # characters of why a layout has no room
Abstract = Callable[[ModelConfig], Any]  # a model's tree of shapes
Progress = Callable[[int], None]  # called with bytes that were read


@dataclasses.dataclass(frozen=True)
class Recognised:
    """What the headers of a checkpoint say."""

    family: Family
    config: ModelConfig
    abstract: Mapping[str, Any]  # our tree of shapes, of the family's parts

    def moves(self, source: Source) -> list[Move]:
        """Where every parameter comes from; raises ConvertError as `tables.match`."""
        dropped = drops(self.family.dropped(self.config))
        return match(self.family.table(self.config), source.tensors, self.abstract, dropped)

    def dropped(self, source: Source) -> dict[Dropped, list[str]]:
        """Tensors that are left out on purpose, by reason; of those the checkpoint has."""
        found = {one: [n for n in source.tensors if drops([one])(n)] for one in self.family.dropped(self.config)}
        return {one: names for one, names in found.items() if names}

    @property
    def counts(self) -> dict[str, int]:
        """Parameters of each part; the compressor apart from its tower."""
        counts = dict.fromkeys(("tower", "compressor", "connector", "decoder"), 0)
        for path, leaf in flatten(self.abstract).items():
            part, inner = path.split("/")[:2] if "/" in path else (path, "")
            counts["compressor" if inner == "compressor" else part] += int(np.prod(leaf.shape, dtype=np.int64))
        return {part: count for part, count in counts.items() if count}


def recognise(source: Source, abstract_of: Abstract) -> Recognised:
    """Family, configuration and shapes of a checkpoint; `abstract_of` gives the tree of shapes of a whole model.

    Raises:
      ConvertError: the family is not known, or its files do not say what they must.
    """
    family = find_family(source)
    config = family.config(source)
    return Recognised(family, config, select(abstract_of(config), family.parts))


def bytes_read(source: Source, moves: list[Move]) -> int:
    """How many bytes the moves will read; a tensor of which several parameters are made counts for each."""
    return sum(source.tensors[name].nbytes for move in moves for name in move.names)


def import_model(
    source: Source,
    destination: str | Path,
    found: Recognised,
    dtype: str = "float32",
    progress: Progress = lambda nbytes: None,
) -> None:
    """Writes a checkpoint of a whole model as `checkpoint.save_model` does, with its tokenizer.

    At no time is more in memory than one foreign tensor and some 200 MB.

    Args:
      source: the checkpoint.
      destination: absent or an empty folder.
      found: from `recognise`.
      dtype: of the parameters on disk, "float32", "bfloat16" or "as-is". Training reads them as float32 in any case.
      progress: called with the number of bytes read, again and again.

    Raises:
      ConvertError: the checkpoint does not fit its family or holds no whole model; a weight is not finite, or not so in
        `dtype`; or the destination cannot be used.
      CheckpointError: it cannot be written.
    """
    if set(found.family.parts) != WHOLE:
        raise ConvertError(
            f"{source.path} is of the family {found.family.name}, which holds {' and '.join(found.family.parts)} only; "
            "uhd-jax convert combine makes a model of several"
        )
    moves, read = found.moves(source), _counting(source, progress)
    params = {move.path: _streamed(move, read, STORED[dtype]) for move in moves}
    with whole_folder(destination, source.folder, _on_disk(moves, params)) as folder:
        tokenizer = _copy_tokenizer(source.folder, folder / "tokenizer")
        chat = dataclasses.replace(found.config.chat, tokenizer="tokenizer") if tokenizer else found.config.chat
        save_model(folder, unflatten(params), dataclasses.replace(found.config, chat=chat))


def load_params(source: Source, found: Recognised, target: Any, progress: Progress = lambda nbytes: None) -> Any:
    """Reads a checkpoint straight onto devices, parameter by parameter.

    Args:
      source: the checkpoint.
      found: from `recognise`.
      target: tree of ShapeDtypeStruct with dtypes and shardings, e.g. `rules.with_shardings(found.abstract, mesh)`.
      progress: called with the number of bytes read, again and again.

    Returns:
      The same tree of jax.Array. Each process reads all, and keeps what its devices hold.

    Raises:
      ConvertError: the checkpoint does not fit its family.
    """
    read, leaves, params = _counting(source, progress), flatten(target), {}
    for move in found.moves(source):
        leaf = leaves[move.path]
        whole = load(move, read, leaf.dtype)
        params[move.path] = jax.make_array_from_callback(leaf.shape, leaf.sharding, whole.__getitem__)
        params[move.path].block_until_ready()  # or the next would be read while this one is still in memory
    return unflatten(params)


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an export did."""

    family: str
    dtype: str
    tensors: int
    rounded: int  # tensors of which the dtype could not hold every value


def export_model(
    directory: str | Path,
    destination: str | Path,
    family: str | None = None,
    dtype: str | None = None,
    progress: Progress = lambda nbytes: None,
    max_shard_bytes: int | None = None,
) -> Exported:
    """Writes a model, or the newest checkpoint of a run, in the layout of a family.

    Args:
      directory: as of `checkpoint.load_model`.
      destination: absent or an empty folder.
      family: name; None: the first whole layout that has room for the model.
      dtype: of the tensors, "float32" or "bfloat16", which config.json will name; None: the model's own `dtype`.
      progress: called with the number of bytes made, again and again.
      max_shard_bytes: limit of a file; None for that of `write_safetensors`.

    Raises:
      ConvertError: no layout has room for the model, a weight is not finite or is not so in `dtype`, or the destination
        cannot be used.
      CheckpointError: the model cannot be read.
    """
    saved = SavedModel(directory)
    config = dataclasses.replace(saved.config, dtype=dtype or saved.config.dtype)
    tokenizer = Path(directory) / "tokenizer"
    tokenizer = tokenizer if tokenizer.is_dir() else None
    chosen = family_named(family) if family else _fitting(config, saved, tokenizer)
    if chosen.write_files is None:
        raise ConvertError(f"{chosen.name} cannot be exported, only imported")
    try:
        infos = flatten(select(saved.tree, chosen.parts))
    except KeyError:
        raise ConvertError(f"{chosen.name} holds {', '.join(chosen.parts)}, which the model does not have") from None
    kept, rounded, wanted = _Kept(saved), [], STORED[config.dtype]

    def checked(name: str, made: np.ndarray) -> np.ndarray:
        progress(made.nbytes)
        if (bad := not_finite(made.reshape(-1))) is not None:
            raise ConvertError(f"{directory}: {name} ({made.dtype}) would hold {bad[1]}; weights must be finite")
        tensor = cast(name, made, wanted)
        if not np.can_cast(made.dtype, wanted, "safe") and (tensor.astype(made.dtype) != made).any():
            rounded.append(name)
        return tensor

    items: list[Item] = []
    for move in match_back(chosen.table(config), infos):
        kept.expect(move)
        info = jax.ShapeDtypeStruct(move.shape, wanted)
        items.append((move.name, info, lambda move=move: checked(move.name, kept.make(move))))
    for name, shape in chosen.filled(config).items():
        items.append((name, jax.ShapeDtypeStruct(shape, wanted), lambda shape=shape: np.zeros(shape, wanted)))
    nbytes = sum(int(np.prod(info.shape, dtype=np.int64)) * wanted.itemsize for _, info, _ in items)
    with whole_folder(destination, directory, nbytes) as folder:
        chosen.write_files(config, tokenizer, folder)
        write_safetensors(folder, items, **({"max_shard_bytes": max_shard_bytes} if max_shard_bytes else {}))
    return Exported(chosen.name, config.dtype, len(items), len(rounded))


class _Kept:
    """Parameters of a saved model, each read once, and let go after the last tensor that is made of it."""

    def __init__(self, saved: SavedModel):
        self._saved, self._uses, self._values = saved, Counter(), {}

    def expect(self, move: Any) -> None:
        self._uses.update(entry.ours for entry in move.entries)

    def make(self, move: Any) -> np.ndarray:
        tensor = move.make(self._read)
        for entry in move.entries:
            self._uses[entry.ours] -= 1
            if not self._uses[entry.ours]:
                del self._values[entry.ours]
        return tensor

    def _read(self, path: str) -> np.ndarray:
        if path not in self._values:
            self._values[path] = self._saved.read(path)
        return self._values[path]


def _fitting(config: ModelConfig, saved: SavedModel, tokenizer: Path | None) -> Family:
    """The first whole layout that has room for the model."""
    reasons = []
    for family in FAMILIES:
        if family.write_files is None or set(family.parts) != WHOLE:
            continue
        try:
            match_back(family.table(config), flatten(saved.tree))
            with tempfile.TemporaryDirectory() as folder:
                family.write_files(config, tokenizer, Path(folder))
            return family
        except ConvertError as error:
            reasons.append(f"{family.name}: {textwrap.shorten(str(error), _REASON, placeholder=' ..')}")
    raise ConvertError(
        "no layout has room for this model; --family=NAME says all about one:\n  " + "\n  ".join(reasons)
    )


def _streamed(move: Move, read: Callable[[str], np.ndarray], dtype: np.dtype | None) -> Streamed:
    dtype = dtype or move.dtype
    compress = dtype.itemsize > move.dtype.itemsize
    return Streamed(move.shape, dtype, move.block_shape(dtype), lambda: move.blocks(read, dtype), compress)


def _on_disk(moves: list[Move], params: Mapping[str, Streamed]) -> int:
    """Bytes that the parameters take at least: compressed ones about those of the source, a little less."""
    return sum(
        math.prod(move.shape) * move.dtype.itemsize * 9 // 10
        if params[move.path].compress
        else params[move.path].nbytes
        for move in moves
    )


def _counting(source: Source, progress: Progress) -> Callable[[str], np.ndarray]:
    def read(name: str) -> np.ndarray:
        tensor = source.read(name)
        progress(tensor.nbytes)
        return tensor

    return read


def _copy_tokenizer(source: Path, folder: Path) -> bool:
    """Copies the tokenizer's files into a new folder, tokenizer.json made if need be; False where there is none."""
    if not sentencepiece.has_tokenizer(source):
        return False
    folder.mkdir()
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if not (folder / "tokenizer.json").exists():
        (folder / "tokenizer.json").write_text(sentencepiece.tokenizer_json(source), encoding="utf-8")
    return True
