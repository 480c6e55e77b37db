"""Start-up weights of a first stage: a tower, a language model and perhaps VDIM put together, the rest made new.

- The position table is resized where sizes differ, once, by torch's bicubic rule; CLIP's class token keeps its entry.
- Marks that the prompts need and the tokenizer lacks are added. Their rows in the embedding and the head, and rows the
  vocabulary has beyond the checkpoint's, begin as the mean of the checkpoint's rows.
- The compressor begins from the layer it follows (spec v4 section 2.5); the connector is random, from the seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uhd_jax.checkpoint import Streamed, load_model, load_model_config, save_model
from uhd_jax.config import ChatConfig, ModelConfig
from uhd_jax.convert import sentencepiece
from uhd_jax.convert.source import Source, open_source
from uhd_jax.convert.tables import ConvertError, Move, flatten, load, unflatten
from uhd_jax.convert.transfer import load_params, recognise
from uhd_jax.convert.writer import whole_folder
from uhd_jax.data.tokenizer import Tokenizer, load_tokenizer
from uhd_jax.models import uhd
from uhd_jax.models.compressor import reuse_init
from uhd_jax.ops.resize import resize_table

TOWER_SIZES = ("kind", "width", "mlp_width", "layers", "heads", "patch_size", "norm_eps")
TABLE = "tower/position_table"
FLOAT = np.dtype(np.float32)
_BLOCK = 2**25  # bytes of a streamed block


def combine(
    config: ModelConfig,
    destination: str | Path,
    tower: str | Path,
    decoder: str | Path,
    upsampler: str | Path | None = None,
    seed: int = 0,
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """Writes a model that `train.init_from` takes, in float32, with its tokenizer.

    Args:
      config: the model to be.
      destination: absent or an empty folder.
      tower: a checkpoint of a tower, or of a whole model, of which all but the tower is left.
      decoder: of a language model likewise; its folder holds tokenizer.json or tokenizer.model.
      upsampler: of VDIM, alone or in a whole v2; None: random, as the connector.
      seed: of what is random; the connector is the one that training from the same seed begins with.
      allow_pickle: also read .bin, .pt and .ckpt files.

    Returns:
      What was done, with JSON types only: the families, the resized position table, the added marks and rows.

    Raises:
      ConvertError: a checkpoint does not hold the part, or its sizes are not the config's; names both.
      CheckpointError: the model cannot be written.
    """
    with contextlib.ExitStack() as opened:
        source = opened.enter_context(open_source(tower, allow_pickle))
        tower_family, tower_model, tower_moves = _part(source, "tower")
        _require_equal("tower", source, tower_model, config, TOWER_SIZES)
        params: dict[str, Any] = {
            path: _streamed(move, source) for path, move in tower_moves.items() if "/compressor/" not in path
        }
        theirs, ours = tower_model.tower.table_shape, config.tower.table_shape
        if theirs != ours:
            table = load(tower_moves[TABLE], source.read, FLOAT)
            params[TABLE] = _resized(table, theirs, ours)
        made = _made(config, seed)
        if "compressor" in made:
            layer = _layer(tower_moves, source, config.compressor.after_layer)
            start = reuse_init(config.compressor.kind, layer, made["compressor"])
            params |= {f"tower/compressor/{path}": np.asarray(leaf) for path, leaf in flatten(start).items()}
        params |= {f"connector/{path}": leaf for path, leaf in flatten(made["connector"]).items()}

        source = opened.enter_context(open_source(decoder, allow_pickle))
        decoder_family, decoder_model, decoder_moves = _part(source, "decoder")
        sizes = [
            field.name for field in dataclasses.fields(config.decoder) if field.compare and field.name != "vocab_size"
        ]
        _require_equal("decoder", source, decoder_model, config, sizes)
        before, tokenizer, added = _tokenizer(source, config)
        _require_room(source, decoder_model, config, tokenizer, added)
        rows, wanted = decoder_model.decoder.vocab_size, config.decoder.vocab_size
        ids = {tokenizer.special(mark) for mark in added} - set(range(before.vocab_size))
        new = np.array(sorted(ids | set(range(rows, wanted))), np.int64)  # whose rows say nothing yet
        params |= {path: _streamed(move, source) for path, move in decoder_moves.items()}
        for path, axis in (("decoder/embedding", 0), ("decoder/head", 1)):
            if path in decoder_moves and len(new):
                move = decoder_moves[path]
                shape = tuple(wanted if i == axis else n for i, n in enumerate(move.shape))
                params[path] = _whole(shape, lambda move=move, axis=axis: _with_rows(move, source, axis, new))
        if upsampler is not None:
            params |= _upsampler(opened.enter_context(open_source(upsampler, allow_pickle)), config, params)

        count = sum(math.prod(leaf.shape) for leaf in params.values())
        with whole_folder(destination, source.folder, count * FLOAT.itemsize) as folder:
            (folder / "tokenizer").mkdir()
            tokenizer.save(folder / "tokenizer")
            chat = dataclasses.replace(config.chat, tokenizer="tokenizer")
            longest = decoder_model.decoder.max_positions or config.decoder.max_positions
            words = dataclasses.replace(config.decoder, max_positions=longest)
            streamed = {
                path: leaf if isinstance(leaf, Streamed) else _whole(leaf.shape, lambda leaf=leaf: leaf)
                for path, leaf in params.items()
            }
            save_model(folder, unflatten(streamed), dataclasses.replace(config, chat=chat, decoder=words))
    return {
        "tower": tower_family,
        "decoder": decoder_family,
        "position_table": {"from": list(theirs), "to": list(ours)},
        "added_marks": added,
        "new_rows": len(new),
        "parameters": count,
    }


def start_config(directory: str | Path) -> ModelConfig:
    """The config of the model that `read_start` would read.

    Raises:
      CheckpointError, ConvertError: there is none, or what is there is damaged.
    """
    if not _is_foreign(directory):
        return load_model_config(directory)
    with open_source(directory) as source:
        return recognise(source, abstract_of).config


def read_start(directory: str | Path, target: Any) -> tuple[Any, ModelConfig]:
    """Parameters that a training starts from, read straight into the shardings of its mesh.

    Args:
      directory: a saved model or the workdir of a run, or a checkpoint of a whole model in a foreign layout.
      target: tree of ShapeDtypeStruct with shardings.

    Returns:
      The parameters and the config of the model that is there.

    Raises:
      CheckpointError, ConvertError: there is none, or what is there is damaged.
    """
    if not _is_foreign(directory):
        return load_model(directory, lambda on_disk: target)
    with open_source(directory) as source:
        found = recognise(source, abstract_of)
        return load_params(source, found, target), found.config


def _is_foreign(directory: str | Path) -> bool:
    return (Path(directory) / "config.json").exists()  # which no folder of ours has


def abstract_of(config: ModelConfig) -> Any:
    """A whole model's tree of shapes."""
    return jax.eval_shape(lambda: uhd.init_params(config, jax.random.key(0)))


def _part(source: Source, part: str) -> tuple[str, ModelConfig, dict[str, Move]]:
    """Family and config of a checkpoint, and the moves of one of its parts by our path."""
    found = recognise(source, abstract_of)
    moves = {move.path: move for move in found.moves(source) if move.path.startswith(f"{part}/")}
    if not moves:
        raise ConvertError(f"{source.path} is of the family {found.family.name}, which holds no {part}")
    return found.family.name, found.config, moves


def _require_equal(part: str, source: Source, theirs: ModelConfig, ours: ModelConfig, keys: Any) -> None:
    there, here = getattr(theirs, part), getattr(ours, part)
    differing = [key for key in keys if getattr(there, key) != getattr(here, key)]
    if differing:
        shown = "; ".join(
            f"{part}.{key}: {getattr(there, key)!r} there, {getattr(here, key)!r} here" for key in differing
        )
        raise ConvertError(f"{source.path} is not the config's {part} (model.{shown})")


def _made(config: ModelConfig, seed: int) -> dict[str, Any]:
    """Connector and compressor as random initialisation makes them; nothing else is computed."""

    @jax.jit
    def make(key: jax.Array) -> dict[str, Any]:
        params = uhd.init_params(config, key)
        kept = {"connector": params["connector"]}
        return kept | ({"compressor": params["tower"]["compressor"]} if "compressor" in params["tower"] else {})

    return jax.tree.map(np.asarray, make(jax.random.key(seed)))


def _layer(moves: Mapping[str, Move], source: Source, number: int) -> dict[str, Any]:
    """Parameters of one layer of the tower."""
    prefix = "tower/layers/"
    layer = {}
    for path, move in moves.items():
        if path.startswith(prefix):
            layer[path.removeprefix(prefix)] = move.entry.forth(source.read(move.names[number])).astype(FLOAT)
    return unflatten(layer)


def _resized(table: np.ndarray, theirs: tuple[int, int], ours: tuple[int, int]) -> np.ndarray:
    """A position table of another size; entries before the patches', of which CLIP has one, stay."""
    first = len(table) - theirs[0] * theirs[1]
    cells = jnp.arange(ours[0] * ours[1])[None]
    resized = resize_table(jnp.asarray(table[first:]), theirs, jnp.array([ours]), cells // ours[1], cells % ours[1])[0]
    return np.concatenate([table[:first], np.asarray(resized)])


def _streamed(move: Move, source: Source) -> Streamed:
    narrow = FLOAT.itemsize > move.dtype.itemsize
    return Streamed(move.shape, FLOAT, move.block_shape(FLOAT), lambda: move.blocks(source.read, FLOAT), narrow)


def _whole(shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> Streamed:
    """A parameter that is made whole, but only when its turn comes."""
    rows = min(max(1, _BLOCK // (FLOAT.itemsize * math.prod(shape[1:]))), *shape[:1], 2**31)

    def blocks() -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        value = make()
        for start in range(0, shape[0], rows) if shape else (0,):
            place = (slice(start, min(start + rows, shape[0])),) if shape else ()
            yield place, np.asarray(value[place], FLOAT, order="C")

    return Streamed(shape, FLOAT, (rows, *shape[1:]) if shape else (), blocks)


def marks(chat: ChatConfig) -> tuple[str, ...]:
    """The marks that prompts of this form, and answers to them, need."""
    names = [chat.placeholder, chat.padding, chat.turn_end, chat.bos, *chat.stop]
    if chat.template == "chatml":
        names.append(chat.turn_start)
    if chat.layout == "v4":
        names += [chat.image_start, chat.image_end, chat.slice_start, chat.slice_end]
        names += [chat.image_id_start, chat.image_id_end] if chat.use_image_id else []
    return tuple(dict.fromkeys(filter(None, names)))


def _tokenizer(source: Source, config: ModelConfig) -> tuple[Tokenizer, Tokenizer, list[str]]:
    """The language model's tokenizer, the same with the marks it lacked, and those."""
    if not sentencepiece.has_tokenizer(source.folder):
        raise ConvertError(
            f"{source.folder}: neither tokenizer.json nor tokenizer.model; a model needs its language model's tokenizer"
        )
    if source.has("tokenizer.json"):
        tokenizer = load_tokenizer(source.folder)
    else:
        tokenizer = Tokenizer(sentencepiece.tokenizer_json(source.folder), str(source.folder))
    lacking = [mark for mark in marks(config.chat) if not tokenizer.has(mark)]
    return tokenizer, tokenizer.extended(lacking), lacking


def _require_room(source: Source, theirs: ModelConfig, ours: ModelConfig, tokenizer: Tokenizer, added: Any) -> None:
    """Refuses a vocabulary that would cut rows off or has none for a mark."""
    rows, wanted = theirs.decoder.vocab_size, ours.decoder.vocab_size
    needed = max(rows, tokenizer.vocab_size)
    if wanted < needed:
        raise ConvertError(
            f"model.decoder.vocab_size: {wanted} in the config; {source.path} has {rows} rows, and its tokenizer, with "
            f"the added marks {', '.join(added) or '(none)'}, {tokenizer.vocab_size} ids; set {needed} or more"
        )


def _with_rows(move: Move, source: Source, axis: int, new: np.ndarray) -> np.ndarray:
    """Embedding (axis 0) or head (axis 1) with the mean of the old entries at the new ids."""
    old = np.moveaxis(load(move, source.read, FLOAT), axis, 0)
    kept = np.setdiff1d(np.arange(len(old)), new)
    mean = old[kept].mean(axis=0, dtype=np.float64).astype(FLOAT)
    value = np.concatenate([old, np.empty((max(0, int(new[-1]) + 1 - len(old)), old.shape[1]), FLOAT)])
    value[new] = mean
    return np.moveaxis(value, 0, axis)


def _upsampler(source: Source, config: ModelConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of VDIM, checked against those that are there already."""
    part = "connector/upsampler"
    _, _, moves = _part(source, part)
    there = {path: tuple(move.shape) for path, move in moves.items()}
    here = {path: tuple(leaf.shape) for path, leaf in params.items() if path.startswith(f"{part}/")}
    if there != here:
        paths = sorted(path for path in there | here if there.get(path) != here.get(path))
        shown = "; ".join(
            f"{path}: {there.get(path, 'none')} there, {here.get(path, 'none')} here" for path in paths[:4]
        )
        raise ConvertError(
            f"{source.path} is not the config's up-sampler (mask {config.connector.pyramid.feature_scale_mask}, tower "
            f"of width {config.tower.width}): {shown}"
        )
    return {path: load(move, source.read, FLOAT) for path, move in moves.items()}
