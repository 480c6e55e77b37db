"""Neighbourhoods of the cells of a feature pyramid, for any patch grid in one compiled program.

Level l of a pyramid has 2**l x 2**l cells in every patch. In here cells stand in *patch order*: patch by patch, and in
raster order inside a patch; cell (a, b) of patch p is number p * 4**l + a * 2**l + b. So what concerns one patch is a
reshape, whatever the patch grid, and all cells of a patch share one square *window* of cells around it. What a cell
takes from its neighbours is then a small matrix product per patch, weights [cells, window] x features [window, C],
with the border rules (clamped, reflected) worked into indices and weights.

Dimension letters: V views, P patches per view, C width, Q results per patch, K cells per window.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from uhd_jax.ops.merge import patch_coordinates
from uhd_jax.ops.precision import wide_dtype
from uhd_jax.ops.resize import bicubic_taps

GATHERED_BYTES = 2**24  # per view, of windows that exist at one time


def clamped(coords: jax.Array, sizes: jax.Array) -> jax.Array:
    """Coordinates int32[V, ...] brought inside an axis of `sizes` int32[V] cells: the border cell is repeated."""
    last = jnp.maximum(sizes, 1).reshape(-1, *[1] * (coords.ndim - 1)) - 1
    return jnp.clip(coords, 0, last)


def reflected(coords: jax.Array, sizes: jax.Array) -> jax.Array:
    """Coordinates int32[V, ...] brought inside an axis of `sizes` int32[V] cells by reflection at its border cells.

    Where the axis is shorter than the overhang, it is reflected at the far end again, and so on: numpy's "reflect".
    torch refuses such axes; a view one patch high has one, of 2 cells (spec v1-v2 section 3.3).
    """
    last = jnp.maximum(sizes, 1).reshape(-1, *[1] * (coords.ndim - 1)) - 1
    around = coords % jnp.maximum(2 * last, 1)
    return jnp.minimum(around, 2 * last - around)


def cell_number(rows: jax.Array, cols: jax.Array, grids: jax.Array, level: int) -> jax.Array:
    """Number in patch order of the cells int32[V, ...] at (rows, cols) of a level, all of them inside their view."""
    side = 2**level
    patch_cols = jnp.maximum(grids[:, 1], 1).reshape(-1, *[1] * (rows.ndim - 1))
    patch = rows // side * patch_cols + cols // side
    return patch * side**2 + rows % side * side + cols % side


def take_cells(cells: jax.Array, numbers: jax.Array) -> jax.Array:
    """[V, N, C] and int32[V, M] -> [V, M, C]."""
    return jax.vmap(lambda view, index: view.at[index].get(mode="promise_in_bounds"))(cells, numbers)


def to_raster(cells: jax.Array, grids: jax.Array, level: int) -> jax.Array:
    """Cells [V, 4**level * P, C] from patch order to raster order; what lies behind a view's own cells is arbitrary."""
    if level == 0:
        return cells
    index = jnp.arange(cells.shape[1], dtype=jnp.int32)[None]
    cols = jnp.maximum(grids[:, 1:], 1) * 2**level
    rows = clamped(index // cols, grids[:, 0] * 2**level)
    return take_cells(cells, cell_number(rows, index % cols, grids, level))


def window_cells(grids: jax.Array, patches: int, level: int, radius: int, border=clamped) -> jax.Array:
    """The cells of each patch's window: its own and `radius` more on every side.

    Args:
      grids: int32[V, 2] patch rows and columns; (0, 0) for an empty slot.
      patches: P.
      level: of the cells.
      radius: in cells.
      border: `clamped` or `reflected`, for coordinates outside the view.

    Returns:
      int32[V, P, n * n] numbers in patch order, n = 2**level + 2 * radius, in raster order inside the window.
    """
    offsets = jnp.arange(-radius, 2**level + radius, dtype=jnp.int32)
    rows, cols = (
        border(2**level * patch[..., None] + offsets, 2**level * grids[:, axis])
        for axis, patch in enumerate(patch_coordinates(grids, patches, 0))
    )
    rows, cols = jnp.broadcast_arrays(rows[..., :, None], cols[..., None, :])
    return cell_number(rows, cols, grids, level).reshape(*rows.shape[:2], -1)


def neighbour_taps(sizes: jax.Array, patch: jax.Array, level: int, radius: int) -> jax.Array:
    """Along one axis: how the neighbours of each cell, in a map enlarged twice by bicubic interpolation and continued
    by reflection, are made of the cells of the map itself.

    Args:
      sizes: int32[V] patches of the axis.
      patch: int32[V, P] coordinate of each patch.
      level: of the enlarged map.
      radius: neighbours on either side.

    Returns:
      float32[V, P, 2**level, 2 * radius + 1, n]: cell of the patch, neighbour, cell of the patch's window of the same
      `radius` at level - 1, n = 2**(level - 1) + 2 * radius.
    """
    side, half = 2**level, 2 ** (level - 1)
    offsets = jnp.arange(-radius, side + radius, dtype=jnp.int32)
    coords = reflected(side * patch[..., None] + offsets, side * sizes)
    taps, weight = bicubic_taps(side * sizes, coords.reshape(len(sizes), -1), half * sizes)
    shape = (*coords.shape, 4)
    window = half * patch[..., None] + jnp.arange(-radius, half + radius)
    here = taps.reshape(shape)[..., None] == window[:, :, None, None]
    made_of = jnp.sum(jnp.where(here, weight.reshape(shape)[..., None], 0.0), axis=-2)
    return jnp.stack([made_of[:, :, cell : cell + 2 * radius + 1] for cell in range(side)], axis=2)


def combine_windows(cells: jax.Array, windows: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted sums over windows, a few patches at a time and never keeping the gathered windows.

    Args:
      cells: float[V, N, C].
      windows: int32[V, P, K] numbers of cells.
      weights: float[V, P, Q, K], taken in the cells' dtype.

    Returns:
      float[V, P, Q, C] of the cells' dtype, summed in float32.
    """
    views, patches, size = windows.shape
    results, width = weights.shape[2], cells.shape[-1]
    weights = weights.astype(cells.dtype)

    @jax.checkpoint
    def combine(cells, windows, weights):
        gathered = take_cells(cells, windows.reshape(views, -1)).reshape(*windows.shape, width)
        summed = jnp.einsum("vpqk,vpkc->vpqc", weights, gathered, preferred_element_type=wide_dtype(gathered))
        return summed.astype(cells.dtype)

    chunk = max(1, GATHERED_BYTES // (size * width * cells.dtype.itemsize))
    if chunk >= patches:
        return combine(cells, windows, weights)
    chunks = -(-patches // chunk)
    chunk = -(-patches // chunks)

    def split(array):
        padded = jnp.pad(array, [(0, 0), (0, chunks * chunk - patches), *[(0, 0)] * (array.ndim - 2)])
        return jnp.moveaxis(padded.reshape(views, chunks, chunk, *array.shape[2:]), 1, 0)

    out = jax.lax.map(lambda one: combine(cells, *one), (split(windows), split(weights)))
    return jnp.moveaxis(out, 0, 1).reshape(views, chunks * chunk, results, width)[:, :patches]
