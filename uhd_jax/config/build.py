"""From a ConfigDict or plain mapping to the dataclasses, and back."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any, Literal

from uhd_jax.config.checks import ConfigError
from uhd_jax.config.run import RunConfig


def from_config_dict(config: Any, cls: type = RunConfig, path: str = "config") -> Any:
    """Builds `cls` from a ConfigDict or plain mapping.

    Raises:
      ConfigError: an unknown or missing key, a value of the wrong type, or an impossible mix; the message holds the
        full key, e.g. `config.model.tower.heads`.
    """
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    return _build(cls, config, path)


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `from_config_dict`, with JSON types only (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=dict))


def _build(annotation: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(annotation):
        return _build_dataclass(annotation, value, path)
    origin = typing.get_origin(annotation)
    if origin is Literal:
        if value not in typing.get_args(annotation):
            raise ConfigError(f"{path}: {value!r} is not one of {typing.get_args(annotation)}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}: expected a list, got {type(value).__name__}")
        item = typing.get_args(annotation)[0]
        return tuple(_build(item, v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: expected a mapping, got {type(value).__name__}")
        return dict(value)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, annotation) or (annotation is int and isinstance(value, bool)):
        raise ConfigError(f"{path}: expected {annotation.__name__}, got {type(value).__name__} {value!r}")
    return value


def _build_dataclass(cls: type, value: Any, path: str) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: expected a mapping, got {type(value).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in value:
        if key not in fields:
            raise ConfigError(f"{path}.{key}: unknown key; known keys here: {', '.join(fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise ConfigError(f"{path}.{name}: missing")
    arguments = {key: _build(hints[key], v, f"{path}.{key}") for key, v in value.items()}
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{path}.{error}") from None
