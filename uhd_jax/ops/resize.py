"""Bicubic resizing as torch does it, for every view's own patch grid in one program.

Cubic kernel with a = -0.75, half-pixel centres, indices clamped at the border, no antialiasing: `interpolate` with
`align_corners=False` (spec v1-v2 sections 2.2 and 3.2). `jax.image.resize` has a = -0.5 and renormalises at the border.
Dimension letters: V views, P patches per view, D width, R x C the cells of a table.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from uhd_jax.ops.precision import wide

_A = -0.75


def bicubic_taps(sizes: jax.Array, coords: jax.Array, source: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """The four source cells, and their weights, that make a cell of a resized axis.

    Args:
      sizes: int32[V], cells of the resized axis; 0 for an empty slot.
      coords: int32[V, P], cells of it; those not below the size get taps to be ignored.
      source: cells of the axis it is made from, one number or int32[V].

    Returns:
      int32[V, P, 4] indices, all of them inside the source, and float32[V, P, 4] weights; equal sizes give the weights
      (0, 1, 0, 0) exactly.
    """
    sizes = jnp.maximum(sizes, 1)[:, None]
    source = jnp.maximum(jnp.asarray(source, jnp.int32), 1).reshape(-1, 1)
    # The source coordinate (i + 1/2) * source / size - 1/2 as a whole number of 2 * size-ths: nothing is rounded.
    numerator, denominator = (2 * coords + 1) * source - sizes, 2 * sizes
    low = numerator // denominator
    fraction = (numerator - low * denominator).astype(jnp.float32) / denominator
    offsets = jnp.arange(-1, 3)
    index = jnp.clip(low[..., None] + offsets, 0, source[..., None] - 1)
    return index, _cubic(jnp.abs(fraction[..., None] - offsets))


def _cubic(distance: jax.Array) -> jax.Array:
    near = ((_A + 2) * distance - (_A + 3)) * distance * distance + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * _A
    return jnp.where(distance <= 1, near, far)


def bicubic_rows(sizes: jax.Array, coords: jax.Array, source: int) -> jax.Array:
    """`bicubic_taps` written out over the source: float32[V, P, source], the rows of a resizing matrix."""
    index, weight = bicubic_taps(sizes, coords, source)
    return jnp.sum(jnp.where(index[..., None] == jnp.arange(source), weight[..., None], 0), axis=-2)


def resize_table(
    table: jax.Array, shape: tuple[int, int], grids: jax.Array, rows: jax.Array, cols: jax.Array
) -> jax.Array:
    """A position table resized to each view's patch grid and read at its patches.

    One matrix product: gathering 16 taps would turn into scattered additions in the gradient. It is exact where the
    grid has the table's shape.

    Args:
      table: float[R * C, D] in raster order.
      shape: (R, C).
      grids: int32[V, 2] patch rows and columns; (0, 0) for an empty slot.
      rows: int32[V, P], row of each patch; patches behind a view's own get finite values to be ignored.
      cols: int32[V, P], its column.

    Returns:
      float32[V, P, D].
    """

    @jax.checkpoint  # the weights are cheaper to make again than to keep
    def read(table: jax.Array) -> jax.Array:
        down, across = bicubic_rows(grids[:, 0], rows, shape[0]), bicubic_rows(grids[:, 1], cols, shape[1])
        weights = (down[..., :, None] * across[..., None, :]).reshape(*rows.shape, shape[0] * shape[1])
        return jnp.matmul(weights, wide(table), precision=jax.lax.Precision.HIGHEST)

    return read(table)


def upsample_2x(features: jax.Array, grids: jax.Array) -> jax.Array:
    """Every view's own map enlarged twice in both directions.

    Args:
      features: float[V, P, C] in raster order.
      grids: int32[V, 2] its rows and columns; (0, 0) for an empty slot.

    Returns:
      float[V, 4 * P, C] in raster order of 2 * grids, computed in float32; what lies behind is finite.
    """
    grids = jnp.maximum(grids, 1)
    cols = grids[:, 1:]
    patches = features.shape[1]
    index = jnp.arange(2 * patches)[None]
    taps, weight = bicubic_taps(2 * grids[:, 1], index % (2 * cols), grids[:, 1])
    broad = _combine(wide(features), (index // (2 * cols))[..., None] * cols[..., None] + taps, weight)
    index = jnp.arange(4 * patches)[None]
    taps, weight = bicubic_taps(2 * grids[:, 0], index // (2 * cols), grids[:, 0])
    index = taps * 2 * cols[..., None] + (index % (2 * cols))[..., None]
    return _combine(broad, index, weight).astype(features.dtype)


def _combine(x: jax.Array, index: jax.Array, weight: jax.Array) -> jax.Array:
    """float32[V, N, C], int32[V, M, 4], float32[V, M, 4] -> float32[V, M, C]: weighted sums of four cells."""
    index = jnp.minimum(index, x.shape[1] - 1)  # behind a view's own cells
    gathered = (jnp.take_along_axis(x, index[..., tap, None], axis=1) * weight[..., tap, None] for tap in range(4))
    return functools.reduce(jnp.add, gathered)


def resize_bilinear(features: jax.Array, grids: jax.Array, side: int) -> jax.Array:
    """Every view's own map resized to side x side cells, without antialiasing.

    Args:
      features: float[V, P, C] in raster order, finite also behind a view's own.
      grids: int32[V, 2] its rows and columns; (0, 0) for an empty slot, which gets finite values.
      side: rows and columns of the result.

    Returns:
      float[V, side * side, C] in raster order.
    """
    index, cols = jnp.arange(features.shape[1])[None], jnp.maximum(grids[:, 1:], 1)

    def weights(sizes: jax.Array, cells: jax.Array) -> jax.Array:
        position = (jnp.arange(side) + 0.5) * sizes[:, None] / side - 0.5
        position = jnp.clip(position, 0, jnp.maximum(sizes - 1, 0)[:, None])
        return jnp.maximum(1 - jnp.abs(position[..., None] - cells[:, None].astype(jnp.float32)), 0)

    down, across = weights(grids[:, 0], index // cols), weights(grids[:, 1], index % cols)
    both = (down[:, :, None] * across[:, None]).reshape(len(grids), side * side, -1)
    return jnp.matmul(both.astype(features.dtype), features)
