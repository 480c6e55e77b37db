"""Rotary position embedding: the half-split ("rotate half") form of Llama and Qwen, and MoonViT's on two axes."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rope_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin, float32[B, T, H/2], of positions int[B, T] times theta**(-2i/H)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates float[B, T, N, H]; dimension i pairs with i + H/2. Computed in float32, returned in x's dtype."""
    cos, sin = (a[:, :, None, :] for a in angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rope_angles_2d(rows: jax.Array, cols: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """MoonViT's angles on the two axes of an image, for `apply_rope_pairs` (spec moonvit section 4).

    Even pairs turn with the column, odd pairs with the row: pair 2i by cols * theta**(-4i/H), pair 2i + 1 by
    rows * theta**(-4i/H).

    Args:
      rows: int32[V, P].
      cols: int32[V, P].
      head_dim: H, a multiple of 4.
      theta: base of the frequencies.

    Returns:
      cos and sin, float32[V, P, H/2].
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 4, dtype=jnp.float32) / head_dim)
    angles = jnp.stack([cols, rows], axis=-1).astype(jnp.float32)[..., None, :] * frequencies[:, None]
    angles = angles.reshape(*rows.shape, head_dim // 2)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope_pairs(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates float[B, T, N, H]; dimension 2j pairs with 2j + 1. Computed in float32, returned in x's dtype."""
    cos, sin = (a[:, :, None, :] for a in angles)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
