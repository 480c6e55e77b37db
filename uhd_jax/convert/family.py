"""What a family of checkpoints is: how it is recognised, what it says of the model, its table, what is left out."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uhd_jax.config import ConfigError, DecoderConfig, ModelConfig
from uhd_jax.convert.fields import check_types, in_their_words
from uhd_jax.convert.tables import ConvertError, Entry

if TYPE_CHECKING:
    from uhd_jax.convert.source import Source

Shapes = Mapping[str, tuple[int, ...]]

# Stands in the config of a checkpoint that has no decoder.
NO_DECODER = DecoderConfig(vocab_size=1, width=128, mlp_width=1, layers=1, heads=1, kv_heads=1, head_dim=2)


@dataclasses.dataclass(frozen=True)
class Dropped:
    """Tensors that are left out on purpose."""

    pattern: str  # a regular expression that matches the whole name
    reason: str


@dataclasses.dataclass(frozen=True)
class Family:
    """One layout of checkpoints.

    Attributes:
      name: on the command line and in messages.
      parts: paths in our parameter tree that its tensors fill, e.g. ("tower", "connector", "decoder").
      recognise: whether a checkpoint is of this layout; reads config.json and the tensors' names.
      config: the model's configuration; of parts that the family does not fill, it says nothing.
      table: names of all parameters; may have entries for parameters that a model lacks.
      dropped: tensors that an import leaves out.
      write_files: (config, folder of our tokenizer or None, destination) writes all but the tensors; None: no export.
      filled: tensors, name -> shape, that the original modules have and ours do not: an export writes zeros.
    """

    name: str
    parts: tuple[str, ...]
    recognise: Callable[[Source], bool]
    config: Callable[[Source], ModelConfig]
    table: Callable[[ModelConfig], list[Entry]]
    dropped: Callable[[ModelConfig], tuple[Dropped, ...]] = lambda config: ()
    write_files: Callable[[ModelConfig, Path | None, Path], None] | None = None
    filled: Callable[[ModelConfig], Shapes] = lambda config: {}

    def __post_init__(self):
        object.__setattr__(self, "config", functools.partial(_read, self.config, self.name, self.parts))


def _read(config: Callable[[Source], ModelConfig], name: str, parts: tuple[str, ...], source: Source) -> ModelConfig:
    """A family's `config`: whatever a file may hold, the only error is a ConvertError that names it."""
    path = source.folder / "config.json"
    try:
        check_types(settings(source), parts, len(source.tensors), path)
        return config(source)
    except ConfigError as error:
        raise in_their_words(error, path) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, ConvertError):
            raise
        raise ConvertError(f"{path}: a value that {name} cannot have: {type(error).__name__}: {error}") from error


def drops(dropped: Sequence[Dropped]) -> Callable[[str], bool]:
    """Whether a tensor's name is left out on purpose, as `tables.import_tensors` asks for it."""
    patterns = [re.compile(one.pattern) for one in dropped]
    return lambda name: any(pattern.fullmatch(name) for pattern in patterns)


def select(tree: Mapping[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """The sub-trees of a parameter tree at `parts`, e.g. ("tower",) or ("connector/upsampler",), in their places."""
    out: dict[str, Any] = {}
    for part in parts:
        *parents, last = part.split("/")
        node, source = out, tree
        for name in parents:
            node, source = node.setdefault(name, {}), source[name]
        node[last] = source[last]
    return out


def settings(source: Source) -> Mapping[str, Any]:
    """The checkpoint's config.json; empty where it has none.

    Raises:
      ConvertError: what tells families apart is not a string.
    """
    config = source.json("config.json") if source.has("config.json") else {}
    for key in ("model_type", "mm_projector_type", "feature_mode", "model_mode"):
        if not isinstance(config.get(key), str | None):
            raise ConvertError(f"{source.folder / 'config.json'}: {key}: {config[key]!r} is not a string")
    return config


def dtype_of(config: Mapping[str, Any]) -> str:
    """In what to compute: float32 for a checkpoint that says so or has more, else bfloat16."""
    wide = (config.get("torch_dtype") or config.get("dtype")) in ("float32", "float64")
    return "float32" if wide else "bfloat16"


def field(config: Mapping[str, Any], key: str, source: Source) -> Any:
    """A value of config.json.

    Raises:
      ConvertError: it has no such key; names both.
    """
    if key not in config:
        raise ConvertError(f"{source.folder / 'config.json'}: no {key!r}; it is needed to know the model's sizes")
    return config[key]


def shape_of(source: Source, name: str) -> tuple[int, ...]:
    """Shape of a tensor that tells a size.

    Raises:
      ConvertError: the checkpoint has no such tensor.
    """
    if name not in source.tensors:
        raise ConvertError(f"{source.path}: no tensor {name}; it is needed to know the model's sizes")
    return tuple(source.tensors[name].shape)


def count_of(source: Source, prefix: str) -> int:
    """How many different numbers follow `prefix`, e.g. "model.layers.", in the names of tensors."""
    found = {re.match(r"\d+", name.removeprefix(prefix)) for name in source.tensors if name.startswith(prefix)}
    return len({int(match[0]) for match in found if match})
