"""uhd_jax: the LLaVA-UHD family in JAX. `uhd_jax.load(directory)` gives a model to talk to."""

from __future__ import annotations

from typing import Any

__all__ = ["load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # On demand (PEP 562): importing the package, or its slicing half, must not import JAX.
    if name == "load":
        from uhd_jax.generation.assistant import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
