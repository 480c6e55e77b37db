"""The error of a wrong configuration, and the checks that raise it."""

from __future__ import annotations

from typing import Any


class ConfigError(ValueError):
    """A key of the configuration is unknown, has the wrong type, or contradicts another."""


def require(condition: bool, key: str, message: str) -> None:
    """Raises `ConfigError` about a key unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key}: {message}")


def require_at_least(config: Any, smallest: int, *keys: str) -> None:
    """Raises `ConfigError` about the first of a config's keys whose value is too small."""
    for key in keys:
        value = getattr(config, key)
        require(value >= smallest, key, f"must be at least {smallest}, not {value}")
