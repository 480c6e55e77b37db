"""Merge order: where a patch of a view stands, and gathering visual tokens into a row.

Patches arrive so that the four of every 2x2 window are neighbours and, with two levels, the four windows of every 4x4
block as well (`slicing.pixels` lays them out). Every 2x2 merge is then the reshape [.., P, D] -> [.., P/4, 4, D] for
any patch grid, in one compiled program.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def patch_coordinates(grids: jax.Array, patches: int, levels: int) -> tuple[jax.Array, jax.Array]:
    """Row and column of each merge-ordered patch.

    Args:
      grids: int32[V, 2], patch rows and columns of each view; (0, 0) for an empty slot.
      patches: P, the static room for patches; those behind rows x cols get coordinates to be ignored.
      levels: number of nested 2x2 merges the order was made for.

    Returns:
      rows, cols: int32[V, P].
    """
    block = 2**levels
    index = jnp.arange(patches, dtype=jnp.int32)
    inner = index % block**2
    row = jnp.zeros_like(index)
    col = jnp.zeros_like(index)
    for level in range(levels):  # two bits of the index a level: (row, col) inside the 2x2 of that level
        quad = inner // 4**level % 4
        row += (quad // 2) * 2**level
        col += (quad % 2) * 2**level
    block_cols = jnp.maximum(grids[:, 1:] // block, 1)
    number = (index // block**2)[None]
    return number // block_cols * block + row, number % block_cols * block + col


def nearest_table_index(grids: jax.Array, rows: jax.Array, cols: jax.Array, side: int) -> jax.Array:
    """Index int32[V, P] into a [side * side] position table: side * floor(side * i / h) + floor(side * j / w).

    Exact integer arithmetic, as transformers' lookup is for every h up to 160 (spec v4 section 2.2).
    """
    height = jnp.maximum(grids[:, :1], 1)
    width = jnp.maximum(grids[:, 1:], 1)
    index = side * (side * rows // height) + side * cols // width
    return jnp.clip(index, 0, side * side - 1)


def merge_windows(x: jax.Array) -> jax.Array:
    """[.., P, D] -> [.., P/4, 4, D]: the four tokens of each 2x2 window, (0,0), (0,1), (1,0), (1,1)."""
    *lead, tokens, width = x.shape
    return x.reshape(*lead, tokens // 4, 4, width)


def place_visual_tokens(embeddings: jax.Array, features: jax.Array, visual_index: jax.Array) -> jax.Array:
    """Replaces placeholder embeddings by visual tokens: one gather and one `where`.

    Args:
      embeddings: float[B, T, D] of the text ids.
      features: float[B, S * tokens per view, D], each row's own visual tokens.
      visual_index: int32[B, T], -1 for text, else an index into this row's features.
    """
    index = jnp.maximum(visual_index, 0)[..., None]
    visual = jnp.take_along_axis(features, index, axis=1).astype(embeddings.dtype)
    return jnp.where(visual_index[..., None] >= 0, visual, embeddings)
