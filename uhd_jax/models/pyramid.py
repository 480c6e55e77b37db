"""The inverse semantic pyramid of v2: the tower's features at 2, 4 and 8 times their resolution.

VDIM enlarges a map twice by bicubic interpolation and then replaces each cell by a weighted sum over its 7x7
neighbours; the weights come from the image (v2 Eq. 1 and 6 to 8, as the released code executes them: spec v1-v2 section
3.3). The two ablations of v2 are here too: bilinear interpolation, and transposed convolutions.
Dimension letters: V views, P patches per view, C width of the features.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from uhd_jax.config import PyramidConfig
from uhd_jax.models import layers
from uhd_jax.ops import neighbourhood as nb
from uhd_jax.ops.merge import patch_coordinates
from uhd_jax.ops.precision import wide, wide_dtype

RADIUS = 3
DIAMETER = 2 * RADIUS + 1
KEY_WIDTH = 32
LEVEL_DROPOUT, FIXUP_DROPOUT = 0.1, 0.2

HIGHEST = jax.lax.Precision.HIGHEST


class Pyramid(nn.Module):
    """The levels that `config` names, from the features of the tower."""

    config: PyramidConfig
    dtype: layers.Dtype

    def __call__(self, features: jax.Array, grids: jax.Array, patches: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        """Builds the pyramid, without dropout.

        Args:
          features: float[V, P, C] of the tower, in raster order.
          grids: int32[V, 2] their rows and columns; (0, 0) for an empty slot.
          patches: float32[V, P, patch_dim] normalised pixels, (channel, y, x) inside a patch.

        Returns:
          For each level l of the config, ascending: float[V, 4**l * P, C] of the compute dtype in raster order, and its
          grids, 2**l * `grids`. What lies behind a view's own cells is meaningless but finite.
        """
        cells = self.cells(features, grids, patches)
        return [(nb.to_raster(cells[level], grids, level), 2**level * grids) for level in self.config.levels]

    @nn.compact
    def cells(
        self,
        features: jax.Array,
        grids: jax.Array,
        patches: jax.Array,
        *,
        dropout: bool = False,
        detach: bool = False,
    ) -> list[jax.Array]:
        """All levels from 0 to the highest of the config, each float[V, 4**l * P, C], cells in patch order.

        Args:
          features: as in `__call__`.
          grids: as in `__call__`.
          patches: as in `__call__`.
          dropout: of whole channels of a view, as in the released pre-training; needs the key "dropout".
          detach: no gradient goes from a level to the one below, as in the released pre-training.
        """
        top, kind = max(self.config.levels), self.config.upsampling
        cells = [features.astype(self.dtype)]
        for level in range(1, top + 1):
            source = jax.lax.stop_gradient(cells[-1]) if detach else cells[-1]
            if kind == "bilinear":
                cells.append(_bilinear(cells[0], grids, level))
            elif kind == "deconvolution":
                cells.append(_Deconvolution(level, self.dtype, name=f"deconvolution_{level}")(source))
            else:
                cells.append(Vdim(level, self.dtype, name=f"up{level}")(source, grids, patches, dropout))
        if kind == "vdim" and top > 0:
            dropped = nn.Dropout(FIXUP_DROPOUT, broadcast_dims=(1,), deterministic=not dropout)(cells[-1])
            cells[-1] += 0.1 * layers.dense(features.shape[-1], self.dtype, "fixup")(dropped)
        return cells


def pool_patches(patches: jax.Array, level: int) -> jax.Array:
    """Average of the pixels under each cell of a level: torch's adaptive pooling of the whole image, patch by patch.

    The bin of a cell covers every pixel that it touches; the borders between patches lie on borders of pixels, so a bin
    never reaches into another patch.

    Args:
      patches: float32[V, P, 3 * side * side], (channel, y, x) inside a patch.
      level: 2**level cells per side of a patch.

    Returns:
      float32[V, 4**level * P, 3] in patch order.
    """
    views, count, size = patches.shape
    side, cells = round((size / 3) ** 0.5), 2**level
    weights = np.zeros((cells, side), np.float32)
    for cell in range(cells):
        start, stop = cell * side // cells, -(-(cell + 1) * side // cells)
        weights[cell, start:stop] = 1 / (stop - start)
    pixels = patches.astype(jnp.float32).reshape(views, count, 3, side, side)
    pooled = jnp.einsum("vpcyx,ay,bx->vpabc", pixels, weights, weights, precision=HIGHEST)
    return pooled.reshape(views, -1, 3)


class Vdim(nn.Module):
    """One level made from the level below: bicubic enlargement, then a sum over 7x7 neighbours guided by the image."""

    level: int
    dtype: layers.Dtype

    def setup(self):
        """Parameters; the dense layers are convolutions of one cell."""
        init = layers.torch_linear_init
        self.range_temperature = self.param("range_temperature", nn.initializers.zeros, (), jnp.float32)
        self.spatial_sigma = self.param("spatial_sigma", nn.initializers.ones, (), jnp.float32)
        self.range_0 = layers.dense(KEY_WIDTH, self.dtype, None, init=init)
        self.range_1 = layers.dense(KEY_WIDTH, self.dtype, None, init=init)
        self.kernel_0 = layers.dense(DIAMETER**2, self.dtype, None, init=init)
        self.kernel_1 = layers.dense(DIAMETER**2, self.dtype, None, init=init)
        self.dropout = nn.Dropout(LEVEL_DROPOUT, broadcast_dims=(1,))

    def __call__(self, source: jax.Array, grids: jax.Array, patches: jax.Array, dropout: bool = False) -> jax.Array:
        """float[V, 4**(level - 1) * P, C] -> float[V, 4**level * P, C], both in patch order."""
        kernel = self.kernel(pool_patches(patches, self.level), grids, patches.shape[1], dropout)
        return fold_kernel(source, kernel, grids, self.level)

    def kernel(self, guidance: jax.Array, grids: jax.Array, patches: int, dropout: bool = False) -> jax.Array:
        """Weights float32[V, N, 49] of the neighbours of each cell, (dy, dx) in raster order.

        Args:
          guidance: float32[V, N, 3], the image at this level, N = 4**level * P in patch order.
          grids: int32[V, 2] patch rows and columns.
          patches: P.
          dropout: as in `Pyramid.cells`.
        """
        kernel = self.range_kernel(guidance, grids, patches, dropout) * spatial_kernel(self.spatial_sigma)
        kernel /= jnp.maximum(jnp.sum(kernel, axis=-1, keepdims=True), 1e-7)
        hidden = nn.gelu(self.kernel_0(jnp.concatenate([kernel, guidance], axis=-1)), approximate=False)
        residual = self.kernel_1(self.dropout(hidden, deterministic=not dropout))
        return kernel + 0.1 * wide(residual)  # need not be positive, nor sum to one

    def range_kernel(self, guidance: jax.Array, grids: jax.Array, patches: int, dropout: bool = False) -> jax.Array:
        """Softmax float32[V, N, 49] over each cell's neighbours of how alike the image is there; args of `kernel`."""
        hidden = nn.gelu(self.range_0(guidance), approximate=False)
        keys = self.range_1(self.dropout(hidden, deterministic=not dropout))
        windows = nb.window_cells(grids, patches, self.level, RADIUS, nb.reflected)
        views, cells, size = len(keys), 4**self.level, windows.shape[2]
        around = nb.take_cells(keys, windows.reshape(views, -1)).reshape(views, patches, size, KEY_WIDTH)
        own = keys.reshape(views, patches, cells, KEY_WIDTH)
        alike = jnp.einsum("vpqd,vpkd->vpqk", own, around, preferred_element_type=wide_dtype(own))
        side = 2**self.level
        alike = alike.reshape(views, patches, side, side, side + 2 * RADIUS, side + 2 * RADIUS)
        neighbours = [
            alike[:, :, row, col, row : row + DIAMETER, col : col + DIAMETER]
            for row in range(side)
            for col in range(side)
        ]
        alike = jnp.stack(neighbours, axis=2).reshape(views, -1, DIAMETER**2)
        return nn.softmax(jnp.clip(jnp.exp(self.range_temperature), 1e-4, 1e4) * alike)


def fold_kernel(source: jax.Array, kernel: jax.Array, grids: jax.Array, level: int) -> jax.Array:
    """Enlarges a map twice by bicubic interpolation and sums up the neighbours of each cell with a kernel's weights.

    The enlarged map is never made, nor are 49 neighbours of every cell gathered: a neighbour is a sum of 4x4 cells of
    the small map, so the kernel is carried over to the small map, where all cells of a patch share one window.
    `analysis.neighbourhood` measures this against the obvious ways.

    Args:
      source: float[V, 4**(level - 1) * P, C] in patch order.
      kernel: float32[V, 4**level * P, 49] in patch order; neighbours outside the view are reflected at its border.
      grids: int32[V, 2] patch rows and columns.
      level: of the enlarged map.

    Returns:
      float[V, 4**level * P, C] in patch order.
    """
    side, count = 2**level, kernel.shape[1] // 4**level
    down, across = (
        nb.neighbour_taps(grids[:, axis], coords, level, RADIUS)
        for axis, coords in enumerate(patch_coordinates(grids, count, 0))
    )
    kernel = kernel.reshape(-1, count, side, side, DIAMETER, DIAMETER)
    kernel = jnp.einsum("vpabyx,vpbxj->vpabyj", kernel, across, precision=HIGHEST)
    kernel = jnp.einsum("vpabyj,vpayi->vpabij", kernel, down, precision=HIGHEST)
    kernel = kernel.reshape(-1, count, side**2, (side // 2 + 2 * RADIUS) ** 2)
    windows = nb.window_cells(grids, count, level - 1, RADIUS)
    return nb.combine_windows(source, windows, kernel).reshape(*source.shape[:1], -1, source.shape[-1])


def spatial_kernel(sigma: jax.Array) -> jax.Array:
    """float32[49]: a Gaussian of the distance, in units of the radius."""
    line = jnp.linspace(-1.0, 1.0, DIAMETER)
    return jnp.exp(-(line[:, None] ** 2 + line**2) / (2 * sigma**2)).reshape(-1)


class _Deconvolution(nn.Module):
    """Transposed convolution 2x2 with stride 2, one bias per channel: a linear layer from each cell to four."""

    level: int
    dtype: layers.Dtype

    @nn.compact
    def __call__(self, source: jax.Array) -> jax.Array:
        """float[V, 4**(level - 1) * P, C] -> float[V, 4**level * P, C], both in patch order."""
        views, count, width = source.shape
        half = 2 ** (self.level - 1)
        kernel = self.param("kernel", layers.torch_linear_init, (width, 4 * width), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
        out = jnp.matmul(source, kernel.astype(self.dtype)).reshape(views, -1, half, half, 2, 2, width)
        return (out.transpose(0, 1, 2, 4, 3, 5, 6) + bias.astype(self.dtype)).reshape(views, 4 * count, width)


def _bilinear(cells: jax.Array, grids: jax.Array, level: int) -> jax.Array:
    """float[V, P, C] -> float[V, 4**level * P, C] in patch order; half-pixel centres, border cells repeated."""
    side = 2**level
    position = (np.arange(side) + 0.5) / side + 0.5  # in the 3x3 window, whose first centre is at 0
    line = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(3))).astype(np.float32)
    weights = np.einsum("ai,bj->abij", line, line).reshape(side**2, 9)
    views, count, width = cells.shape
    weights = jnp.broadcast_to(weights, (views, count, *weights.shape))
    return nb.combine_windows(cells, nb.window_cells(grids, count, 0, 1), weights).reshape(views, -1, width)
