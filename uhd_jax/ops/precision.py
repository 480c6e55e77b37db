"""What norms, softmax, rotations and recurrences are computed in."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def wide_dtype(x: jax.Array) -> jnp.dtype:
    """float32, or float64 for x in float64 (models run in double, to be compared with references in double)."""
    return jnp.promote_types(x.dtype, jnp.float32)


def wide(x: jax.Array) -> jax.Array:
    """x in `wide_dtype`."""
    return x.astype(wide_dtype(x))
