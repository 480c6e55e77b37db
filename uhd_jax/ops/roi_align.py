"""RoI-align of uniform windows, for every view's own patch grid in one program.

A side x side grid of equal windows covers a view; each window is pooled to a few bins. RoI-align is linear and, for
such windows, separable: the weight of a patch in a bin is a product of one weight by its row and one by its column.
Source: spec v1-v2 section 3.2 (steps 4 to 6), torchvision's `roi_align(aligned=False, sampling_ratio=-1)`.
Dimension letters: V views, P patches per view, D width, R x C the cells of a table.

How the weights are applied: as one dense matrix [side**2 * 12, P] per view. Columns first and rows second would take
fewer operations, but need each map on a canvas of (greatest height) x (greatest width), and a room of P patches holds
grids from 1 x P to P x 1. Nor were canvases for ordinary shapes alone any faster on two CPU cores: 4 views of P = 576,
D = 512 and side 12 took 4.1 GFLOP and 0.14 s dense, 0.9 GFLOP and 0.16 s on canvases of 48 x 48, 1.8 GFLOP and 0.31 s
on 75 x 75 (aspect ratios up to 10), these with three to five times the memory; 2 views of P = 2304 took 0.29 s dense
and 0.25 s on 96 x 96.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from uhd_jax.ops.precision import wide
from uhd_jax.ops.resize import bicubic_rows

MAX_BINS = 12  # of a window
# (height, width), in the order that decides ties. There are none: no product of two of the ratios is a square.
_PROPOSALS = np.array([(2, 4), (2, 3), (3, 4), (3, 3), (4, 2), (3, 2), (4, 3)], np.int32)
_MOST = 4  # bins along an axis

Reader = Callable[[jax.Array], jax.Array]


def choose_bins(grids: jax.Array) -> jax.Array:
    """Bins of a view's windows: the proposal whose aspect ratio is nearest to the view's, by |ln(w/h) - ln(a/b)|.

    Args:
      grids: int32[V, 2] patch rows and columns, up to 30 million patches; (0, 0) for an empty slot.

    Returns:
      int32[V, 2], (height, width).
    """
    height, width = jnp.maximum(grids[:, :1], 1), jnp.maximum(grids[:, 1:], 1)
    # exp of the distance is the larger cross product over the smaller: whole numbers, compared by cross products again.
    one, other = width * _PROPOSALS[:, 0], height * _PROPOSALS[:, 1]
    large, small = jnp.maximum(one, other), jnp.minimum(one, other)
    best_large, best_small = large[:, 0], small[:, 0]
    chosen = jnp.zeros_like(best_large)
    for number in range(1, len(_PROPOSALS)):
        closer = large[:, number] * best_small < best_large * small[:, number]
        chosen = jnp.where(closer, number, chosen)
        best_large = jnp.where(closer, large[:, number], best_large)
        best_small = jnp.where(closer, small[:, number], best_small)
    return jnp.asarray(_PROPOSALS)[chosen]


def pool_windows(
    features: jax.Array, grids: jax.Array, bins: jax.Array, side: int, box_dtype: str = "float32"
) -> tuple[jax.Array, jax.Array]:
    """RoI-align of side x side uniform windows; a window is at least one cell high and wide.

    Args:
      features: float[V, P, D] in raster order, finite also behind a view's own patches.
      grids: int32[V, 2] patch rows and columns; (0, 0) for an empty slot, whose bins are zeros.
      bins: int32[V, 2] from `choose_bins`, or any with at most 4 along an axis and 12 in a window.
      side: windows along each axis.
      box_dtype: "bfloat16" rounds the windows' borders as the released models do (spec v1-v2 section 3.2).

    Returns:
      float[V, side * side, 12, D], windows and the bins of each in raster order, zeros behind a window's own bins; and
      bool[V, 12], which bins are a window's own.
    """
    cols = jnp.maximum(grids[:, 1:], 1)
    index = jnp.arange(features.shape[1])[None]

    def near(cells: jax.Array) -> Reader:
        cells = cells[:, None, None].astype(jnp.float32)
        return lambda position: jnp.maximum(1 - jnp.abs(position[..., None] - cells), 0)

    @jax.checkpoint  # the weights are cheaper to make again than to keep
    def pool(features: jax.Array) -> jax.Array:
        weights = _weights(grids, bins, side, box_dtype, near(index // cols), near(index % cols))
        return jnp.matmul(weights.astype(features.dtype), features)

    return pool(features).reshape(len(grids), side * side, MAX_BINS, -1), _own(bins)


def pool_table(
    table: jax.Array, shape: tuple[int, int], grids: jax.Array, bins: jax.Array, side: int, box_dtype: str = "float32"
) -> jax.Array:
    """What `pool_windows` gives for a position table resized to each view's grid, without making that large map.

    Args:
      table: float[R * C, D] in raster order.
      shape: (R, C).
      grids: int32[V, 2].
      bins: int32[V, 2].
      side: windows along each axis.
      box_dtype: as in `pool_windows`.

    Returns:
      float32[V, side * side, 12, D].
    """

    def resized(axis: int) -> Reader:
        sizes, source = grids[:, axis], shape[axis]

        def read(position: jax.Array) -> jax.Array:
            low = jnp.floor(position).astype(jnp.int32)
            at = [bicubic_rows(sizes, (low + step).reshape(len(low), -1), source) for step in (0, 1)]
            first, second = (a.reshape(*position.shape, source) for a in at)
            fraction = (position - low)[..., None]
            return jnp.expand_dims(first * (1 - fraction) + second * fraction, axis=-1 - axis)

        return read

    @jax.checkpoint
    def pool(table: jax.Array) -> jax.Array:
        weights = _weights(grids, bins, side, box_dtype, resized(0), resized(1))
        return jnp.matmul(weights, wide(table), precision=jax.lax.Precision.HIGHEST)

    return pool(table).reshape(len(grids), side * side, MAX_BINS, -1)


def _own(bins: jax.Array) -> jax.Array:
    return jnp.arange(MAX_BINS) < bins[:, :1] * bins[:, 1:]


def _weights(
    grids: jax.Array, bins: jax.Array, side: int, box_dtype: str, read_row: Reader, read_col: Reader
) -> jax.Array:
    """float32[V, side * side * 12, cells] from readers of the cells' weights by row and by column."""
    slot = jnp.arange(MAX_BINS)[None]
    down = _axis_weights(grids[:, 0], bins[:, 0], slot // bins[:, 1:], side, box_dtype, read_row)
    across = _axis_weights(grids[:, 1], bins[:, 1], slot % bins[:, 1:], side, box_dtype, read_col)
    own = _own(bins).reshape(len(bins), 1, MAX_BINS, *[1] * (down.ndim - 3))
    return (jnp.where(own, down, 0)[:, :, None] * across[:, None]).reshape(len(grids), side * side * MAX_BINS, -1)


def _axis_weights(
    sizes: jax.Array, bins: jax.Array, slot_bin: jax.Array, side: int, box_dtype: str, read: Reader
) -> jax.Array:
    """RoI-align along one axis.

    Args:
      sizes: int32[V], cells of the axis.
      bins: int32[V], bins along it.
      slot_bin: int32[V, 12], the bin in which each of a window's 12 slots stands along it.
      side: windows along it.
      box_dtype: see `pool_windows`.
      read: what a bilinear sample at float32[V, side, 12] takes from where, float32[V, side, 12, ...].

    Returns:
      float32[V, side, 12, ...], the mean over the samples of each bin.
    """
    size = sizes[:, None, None].astype(jnp.float32)
    borders = jnp.arange(side + 1) * sizes[:, None] / side
    if box_dtype == "bfloat16":
        borders = jax.lax.reduce_precision(borders, exponent_bits=8, mantissa_bits=7)
    extent = jnp.maximum(borders[:, 1:] - borders[:, :-1], 1)[..., None]
    step = extent / bins[:, None, None]
    start = borders[:, :-1, None] + slot_bin[:, None] * step
    samples = jnp.ceil(step - 1e-3)  # whole numbers stay themselves however a division is rounded; nothing else is near
    windows = jnp.arange(side)[None, :, None]
    few = jnp.asarray(_inside_small(side, box_dtype))[
        jnp.minimum(sizes, side)[:, None, None], bins[:, None, None], windows, jnp.minimum(slot_bin, _MOST - 1)[:, None]
    ]

    def add(number: jax.Array, total: jax.Array) -> jax.Array:
        position = start + (number + 0.5) * (step / samples)
        inside = (number < samples) & jnp.where(size < side, few, position <= size)
        sample = read(jnp.clip(position, 0, jnp.maximum(size - 1, 0)))
        weight = jnp.where(inside, 1 / samples, 0)
        return total + weight.reshape(*weight.shape, *[1] * (sample.ndim - 3)) * sample

    first = add(jnp.int32(0), jnp.float32(0))
    # The commonest bin has one sample an axis, the longest of a long room hundreds.
    return jax.lax.fori_loop(1, jnp.max(samples, initial=1).astype(jnp.int32), add, first)


@functools.cache
def _inside_small(side: int, box_dtype: str) -> np.ndarray:
    """Whether a bin's sample counts on an axis with fewer cells than windows, bool[size, bins, window, bin].

    Windows are then one cell long, those at the end reach beyond the last cell, and a sample beyond `size` counts as
    zero. Some lie at `size` exactly, and how float32 rounds them decides: of 10 cells in 12 windows of 3 bins the very
    last does not count. So it is decided here, in the released models' own order of operations, for every device.
    """
    kind = jnp.dtype(box_dtype)
    sizes = np.arange(side + 1)[:, None, None, None]
    bins = np.maximum(np.arange(_MOST + 1), 1).astype(np.float32)[None, :, None, None]
    windows, number = np.arange(side)[None, None, :, None], np.arange(_MOST, dtype=np.float32)
    start = (windows * sizes / side).astype(kind).astype(np.float32)
    step = np.float32(1) / bins
    return start + number * step + np.float32(0.5) * step <= sizes.astype(np.float32)
