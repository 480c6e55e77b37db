"""Rotary position embedding: the half-split ("rotate half") form of Llama and Qwen, and MoonViT's on two axes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from uhd_jax.ops.precision import wide


def rope_angles(
    positions: jax.Array, rotary_dim: int, theta: float, sections: tuple[int, ...] = ()
) -> tuple[jax.Array, jax.Array]:
    """Angles of positions times theta**(-2i/R), for `apply_rope`.

    Args:
      positions: int32[B, T], or int32[3, B, T]: temporal, row and column position (spec v4 section 4.4).
      rotary_dim: R, how many values of a head are rotated.
      theta: base of the frequencies.
      sections: for positions on three axes, how many of the R/2 frequencies each axis has, in turn as long as it has
        any left: frequency i belongs to axis i mod 3, the surplus to the temporal one.

    Returns:
      cos and sin, float32[B, T, R/2].
    """
    frequencies = theta ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    if positions.ndim == 3:
        index = jnp.arange(len(frequencies))
        temporal, rows, cols = angles
        angles = jnp.where((index % 3 == 1) & (index < 3 * sections[1]), rows, temporal)
        angles = jnp.where((index % 3 == 2) & (index < 3 * sections[2]), cols, angles)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the first R values of float[B, T, N, H]; i pairs with i + R/2. In float32, returned in x's dtype."""
    cos, sin = (a[:, :, None, :] for a in angles)
    half = cos.shape[-1]
    first, second, rest = jnp.split(wide(x), [half, 2 * half], axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)


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
    pairs = wide(x).reshape(*x.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
