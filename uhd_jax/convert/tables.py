"""Name tables between our parameter tree and a PyTorch state dict, and moving tensors along them.

A table is a list of `Entry`. `{L}` in the foreign name stands for the layer index of a stacked parameter. Reading is
strict in both directions: whatever is missing, unexpected or of another shape is listed, all of it, with both shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np


class ConvertError(ValueError):
    """A checkpoint does not fit the table of its family."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one tensor changes; `back` undoes `forth`. Shapes are those of a single layer."""

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


def import_tensors(
    table: Iterable[Entry],
    tensors: Mapping[str, np.ndarray],
    abstract: Mapping[str, Any],
    dropped: Callable[[str], bool] = lambda name: False,
) -> dict[str, Any]:
    """A foreign state dict as our parameter tree, in float32.

    Args:
      table: the family's entries.
      tensors: foreign name -> array.
      abstract: our tree of shapes (`jax.eval_shape` of the initialiser).
      dropped: foreign names left out on purpose.

    Raises:
      ConvertError: lists every missing, unexpected and misshaped tensor.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(abstract).items()}
    problems, flat, used, unused = [], {}, set(), {}
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
        parts = []
        for name in names:
            if name not in tensors:
                problems.append(f"missing {name} (for {path} {single})")
            elif entry.shape(tuple(tensors[name].shape)) != single:
                problems.append(f"{name} has shape {tuple(tensors[name].shape)}, which does not give {path} {single}")
            else:
                parts.append(entry.forth(np.asarray(tensors[name], np.float32)))
        if len(parts) == len(names):
            flat[path] = np.stack(parts) if entry.stacked else np.asarray(parts[0], order="C")
    left = [name for name in tensors if name not in used and not dropped(name)]
    problems += [f"unexpected {name} {tuple(tensors[name].shape)}" for name in left]
    problems += [f"the model does not use part {i} of {name}" for name, parts in unused.items() for i in sorted(parts)]
    if problems:
        raise ConvertError("the checkpoint does not fit the model:\n  " + "\n  ".join(problems))
    return unflatten(flat)


def export_tensors(table: Iterable[Entry], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our parameter tree as a foreign state dict; every parameter must have an entry.

    Raises:
      ConvertError: lists parameters without an entry, and tensors of which a part is missing.
    """
    entries = {entry.ours: entry for entry in table}
    flat = flatten(params)
    if missing := sorted(set(flat) - set(entries)):
        raise ConvertError("no entry in the table for:\n  " + "\n  ".join(missing))
    tensors, cut = {}, {}
    for path, value in flat.items():
        entry, value = entries[path], np.asarray(value)
        layers = value if entry.stacked else [value]
        for name, layer in zip(entry.names(len(value) if entry.stacked else 1), layers, strict=True):
            tensor = entry.rule.back(layer, entry.foreign_shape)
            if entry.part is None:
                tensors[name] = np.asarray(tensor, order="C")
            else:
                blocks = tensor.reshape(entry.groups, -1, *tensor.shape[1:])
                cut.setdefault(name, [None] * entry.part[1])[entry.part[0]] = blocks
    if incomplete := sorted(name for name, parts in cut.items() if any(part is None for part in parts)):
        raise ConvertError("parts without a parameter in:\n  " + "\n  ".join(incomplete))
    joined = {name: np.concatenate(parts, axis=1) for name, parts in cut.items()}
    return tensors | {name: np.asarray(t.reshape(-1, *t.shape[2:]), order="C") for name, t in joined.items()}
