"""Name tables between our parameter tree and a PyTorch state dict, and moving tensors along them.

A table is a list of `Entry`. `{L}` in the foreign name stands for the layer index of a stacked parameter. Reading is
strict in both directions: whatever is missing, unexpected or of another shape is listed, all of it, with both shapes.

The work is in two steps, so that no more than one tensor need be in memory. `match` and `match_back` compare names and
shapes alone and say what is to be moved; a `Move` makes one parameter of ours, a `MoveBack` one tensor of theirs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

BLOCK = 2**24  # bytes of a parameter that are made, written and later read together
_CHECKED = 2**16  # elements that are looked at together: what stays in the cache
_STRIPE = 256  # bytes of a transposed matrix's columns that are copied together, likewise


class ConvertError(ValueError):
    """A checkpoint does not fit the table of its family."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one tensor changes; `back` undoes `forth`. Shapes are those of a single layer.

    A rule only moves numbers about, in whatever dtype they are, and is best a view.
    """

    forth: Callable[[np.ndarray], np.ndarray]
    back: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]  # (ours, shape of theirs)
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]  # shape of ours from shape of theirs


SAME = Rule(lambda a: a, lambda a, _: a, lambda s: s)
TRANSPOSE = Rule(lambda a: a.T, lambda a, _: a.T, lambda s: s[::-1])
# torch convolution [out, channel, y, x] <-> matmul kernel [(channel, y, x), out]
PATCH_CONVOLUTION = Rule(
    lambda a: a.reshape(a.shape[0], -1).T,
    lambda a, shape: a.T.reshape(shape),
    lambda s: (int(np.prod(s[1:])), s[0]),
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter of ours and the tensor, or with `{L}` the tensors, it is made of."""

    ours: str  # path in the parameter tree, "tower/layers/norm1/scale"
    theirs: str
    rule: Rule = SAME
    foreign_shape: tuple[int, ...] | None = None  # where theirs can't be told from ours (convolutions)
    part: tuple[int, int] | None = None  # (i, n): part i of n equal ones along theirs' first axis; all have entries
    groups: int = 1  # with `part`: theirs is so many equal blocks (heads), each with n parts
    layers: tuple[int, ...] = ()  # what `{L}` stands for, one number per layer of ours; empty: 0, 1, 2, ..

    @property
    def stacked(self) -> bool:
        """Whether ours has a leading layer axis."""
        return "{L}" in self.theirs

    def names(self, layers: int) -> list[str]:
        """Foreign names, one per layer, or one."""
        if not self.stacked:
            return [self.theirs]
        return [self.theirs.replace("{L}", str(index)) for index in self.layers or range(layers)]

    def shape(self, theirs: tuple[int, ...]) -> tuple[int, ...] | None:
        """Shape of ours, of a single layer, from the shape of theirs; None where that has no such part."""
        if self.part is not None:
            if not theirs or theirs[0] % (self.part[1] * self.groups):
                return None
            theirs = (theirs[0] // self.part[1], *theirs[1:])
        return self.rule.shape(theirs)

    def forth(self, tensor: np.ndarray) -> np.ndarray:
        """Ours, of a single layer, from theirs."""
        if self.part is not None:
            index, count = self.part
            blocks = tensor.reshape(self.groups, count, -1, *tensor.shape[1:])
            tensor = blocks[:, index].reshape(-1, *tensor.shape[1:])
        return self.rule.forth(tensor)


def dense(ours: str, theirs: str, *, bias: bool = True) -> list[Entry]:
    """A linear layer: [out, in] weight to [in, out] kernel, and its bias."""
    entries = [Entry(f"{ours}/kernel", f"{theirs}.weight", TRANSPOSE)]
    return entries + ([Entry(f"{ours}/bias", f"{theirs}.bias")] if bias else [])


def joined_dense(ours: str, names: Sequence[str], weight: str, bias: str) -> list[Entry]:
    """Linear layers `ours`/name whose weights and biases are one below the other in theirs."""
    entries = []
    for index, name in enumerate(names):
        part = index, len(names)
        entries.append(Entry(f"{ours}/{name}/kernel", weight, TRANSPOSE, part=part))
        entries.append(Entry(f"{ours}/{name}/bias", bias, part=part))
    return entries


def layer_norm(ours: str, theirs: str) -> list[Entry]:
    """A LayerNorm's weight and bias."""
    return [Entry(f"{ours}/scale", f"{theirs}.weight"), Entry(f"{ours}/bias", f"{theirs}.bias")]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict to {path: leaf}, paths joined by "/"."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


class Described(Protocol):
    """What is known of a tensor without its data."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Move:
    """One parameter of ours and where it comes from."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype  # of theirs; the widest where the layers differ
    names: tuple[str, ...]  # one per layer, or one
    entry: Entry

    def layers(self, read: Callable[[str], np.ndarray]) -> Iterator[np.ndarray]:
        """Ours layer by layer, or whole where it is not stacked, in their dtype; perhaps views in another order."""
        return (self.entry.forth(read(name)) for name in self.names)

    def blocks(
        self, read: Callable[[str], np.ndarray], dtype: Any = None, limit: int = BLOCK
    ) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """Ours in pieces of `block_shape`, each with its place; one tensor of theirs is held at a time."""
        shape, dtype = self.block_shape(dtype, limit), np.dtype(dtype or self.dtype)
        if not self.entry.stacked or shape[0] == 1:
            for number, layer in enumerate(self.layers(read)):
                lead = (slice(number, number + 1),) if self.entry.stacked else ()
                for start in range(0, layer.shape[0], shape[len(lead)]) if layer.ndim else (None,):
                    place = () if start is None else (slice(start, min(start + shape[len(lead)], layer.shape[0])),)
                    block = cast(self.names[number], contiguous(layer[place]), dtype)
                    yield lead + place, block.reshape((1,) * len(lead) + block.shape)
            return
        block = np.empty(shape, dtype)
        for number, layer in enumerate(self.layers(read)):
            block[number % shape[0]] = cast(self.names[number], contiguous(layer), dtype)
            if (done := number % shape[0] + 1) == shape[0] or number + 1 == self.shape[0]:
                yield (slice(number + 1 - done, number + 1),), block[:done]
                block = np.empty(shape, dtype)

    def block_shape(self, dtype: Any = None, limit: int = BLOCK) -> tuple[int, ...]:
        """As many layers of ours as go into `limit` bytes; where not even one does, so many of its rows, evenly."""
        single = self.shape[1:] if self.entry.stacked else self.shape
        nbytes = math.prod(single) * np.dtype(dtype or self.dtype).itemsize
        if single and nbytes > limit:
            single = (max(1, -(-single[0] // -(-nbytes // limit))), *single[1:])
        return (max(1, min(self.shape[0], limit // nbytes)), *single) if self.entry.stacked else single


def match(
    table: Iterable[Entry],
    infos: Mapping[str, Described],
    abstract: Mapping[str, Any],
    dropped: Callable[[str], bool] = lambda name: False,
) -> list[Move]:
    """What is to be moved so that our whole tree is filled and all of theirs is used.

    Args:
      table: the family's entries.
      infos: foreign name -> anything with a shape and a dtype.
      abstract: our tree of shapes (`jax.eval_shape` of the initialiser).
      dropped: foreign names left out on purpose.

    Raises:
      ConvertError: lists every missing, unexpected and misshaped tensor.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(abstract).items()}
    problems, moves, used, unused = [], [], set(), {}
    entries = {entry.ours: entry for entry in table}
    for path, shape in shapes.items():
        if path not in entries:
            problems.append(f"no entry in the table for {path} {shape}")
            continue
        entry = entries[path]
        single = shape[1:] if entry.stacked else shape
        names = entry.names(shape[0] if entry.stacked else 1)
        used.update(names)
        for name in names if entry.part else ():
            unused.setdefault(name, set(range(entry.part[1]))).discard(entry.part[0])
        found = []
        for name in names:
            if name not in infos:
                problems.append(f"missing {name} (for {path} {single})")
            elif entry.shape(tuple(infos[name].shape)) != single:
                problems.append(f"{name} has shape {tuple(infos[name].shape)}, which does not give {path} {single}")
            elif np.dtype(infos[name].dtype).kind in "iub":
                problems.append(f"{name} has dtype {np.dtype(infos[name].dtype)}: {path} needs floating point")
            else:
                found.append(np.dtype(infos[name].dtype))
        if found and len(found) == len(names):
            moves.append(Move(path, shape, functools.reduce(np.promote_types, found), tuple(names), entry))
    left = [name for name in infos if name not in used and not dropped(name)]
    problems += [f"unexpected {name} {tuple(infos[name].shape)}" for name in left]
    problems += [f"the model does not use part {i} of {name}" for name, parts in unused.items() for i in sorted(parts)]
    if problems:
        raise ConvertError("the checkpoint does not fit the model:\n  " + "\n  ".join(problems))
    return moves


def load(move: Move, read: Callable[[str], np.ndarray], dtype: Any = None) -> np.ndarray:
    """One parameter of ours, whole: an array of `move.shape`.

    Args:
      move: from `match`.
      read: foreign name -> array, e.g. `Source.read`.
      dtype: of the result; None for theirs.
    """
    result = np.empty(move.shape, dtype or move.dtype)
    for place, block in move.blocks(read, dtype):
        result[place] = block
    return result


def import_tensors(
    table: Iterable[Entry],
    tensors: Mapping[str, np.ndarray],
    abstract: Mapping[str, Any],
    dropped: Callable[[str], bool] = lambda name: False,
) -> dict[str, Any]:
    """A foreign state dict as our parameter tree, in float32. Arguments and errors as in `match`."""
    tensors = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    moves = match(table, tensors, abstract, dropped)
    return unflatten({move.path: load(move, tensors.__getitem__, np.float32) for move in moves})


@dataclasses.dataclass(frozen=True)
class MoveBack:
    """One tensor of theirs and where it comes from."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype  # of ours
    entries: tuple[Entry, ...]  # one, or one per part
    layer: int | None  # of ours; None where ours is not stacked

    def make(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """The tensor, in the dtype of ours and C order; `read` gives a whole parameter of ours from its path."""
        made = []
        for entry in self.entries:
            value = read(entry.ours)
            made.append(entry.rule.back(value if self.layer is None else value[self.layer], entry.foreign_shape))
        if len(made) == 1:
            return contiguous(made[0])
        blocks = [part.reshape(self.entries[0].groups, -1, *part.shape[1:]) for part in made]
        return contiguous(np.concatenate(blocks, axis=1).reshape(-1, *made[0].shape[1:]))


def match_back(table: Iterable[Entry], infos: Mapping[str, Described]) -> list[MoveBack]:
    """Every tensor of theirs that our parameters make; a stack's tensors come one after the other.

    Args:
      table: the family's entries.
      infos: our path -> anything with a shape and a dtype; every parameter must have an entry.

    Raises:
      ConvertError: lists parameters without an entry, and tensors of which a part is missing.
    """
    entries = {entry.ours: entry for entry in table}
    if missing := sorted(set(infos) - set(entries)):
        raise ConvertError("no entry in the table for:\n  " + "\n  ".join(missing))
    found: dict[str, dict[int, tuple[Entry, int | None]]] = {}
    for path, info in infos.items():
        entry = entries[path]
        names = entry.names(info.shape[0] if entry.stacked else 1)
        if entry.stacked and len(names) != info.shape[0]:
            raise ConvertError(f"{path} has {info.shape[0]} layers, the table names {len(names)}")
        for layer, name in enumerate(names):
            parts = found.setdefault(name, {})
            parts[entry.part[0] if entry.part else 0] = entry, layer if entry.stacked else None
    moves, incomplete = [], []
    for name, parts in found.items():
        ordered = [parts[index] for index in sorted(parts)]
        entry, layer = ordered[0]
        if entry.part and len(parts) != entry.part[1]:
            incomplete.append(name)
            continue
        ours = infos[entry.ours]
        single = tuple(ours.shape) if layer is None else tuple(ours.shape[1:])
        # What a rule does to the shape, it does to an array without memory of its own.
        shape = entry.rule.back(np.broadcast_to(np.int8(0), single), entry.foreign_shape).shape
        shape = (shape[0] * len(parts), *shape[1:]) if entry.part else shape
        moves.append(MoveBack(name, shape, np.dtype(ours.dtype), tuple(entry for entry, _ in ordered), layer))
    if incomplete:
        raise ConvertError("parts without a parameter in:\n  " + "\n  ".join(sorted(incomplete)))
    return moves


def export_tensors(table: Iterable[Entry], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our parameter tree as a foreign state dict; every parameter must have an entry. Errors as in `match_back`."""
    flat = {path: np.asarray(value) for path, value in flatten(params).items()}
    return {move.name: move.make(flat.__getitem__) for move in match_back(table, flat)}


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array in C order; itself if it is. Several times faster than NumPy on a transposed matrix."""
    if array.ndim != 2 or array.flags.c_contiguous or array.strides[0] > array.strides[1]:
        return np.asarray(array, order="C")
    result = np.empty(array.shape, array.dtype)
    width = max(1, _STRIPE // array.itemsize)
    for start in range(0, array.shape[1], width):
        result[:, start : start + width] = array[:, start : start + width]
    return result


def cast(name: str, array: np.ndarray, dtype: Any) -> np.ndarray:
    """The array in another dtype; itself if it is of that.

    Raises:
      ConvertError: a finite value is infinite there; `name` says of which tensor.
    """
    dtype = np.dtype(dtype)
    if np.can_cast(array.dtype, dtype, "safe"):
        return array.astype(dtype, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        made = array.astype(dtype)
    flat = made.reshape(-1)
    if (found := not_finite(flat)) is not None:
        value = array.reshape(-1)[found[0]]
        raise ConvertError(f"{name} holds {value} ({array.dtype}), which {dtype} cannot; choose a wider dtype")
    return made


def not_finite(array: np.ndarray) -> tuple[int, float] | None:
    """The first place of a flat array with NaN or an infinity, and the value there."""
    if array.dtype.kind in "iub":
        return None
    # On the bits, many times faster than isfinite on bfloat16: all ones in the exponent.
    exponent = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000, "float64": 0x7FF << 52}[array.dtype.name]
    bits = array.view(f"u{array.itemsize}")
    for start in range(0, bits.size, _CHECKED):
        block = bits[start : start + _CHECKED] & exponent
        if block.max() == exponent:
            place = start + int(np.argmax(block == exponent))
            return place, float(array[place])
    return None
