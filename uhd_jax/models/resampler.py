"""Resamplers: a fixed number of learnable queries condenses a view of any size (v1's connectors).

`Perceiver` is the first paper's (arXiv 2403.11703v1; spec v1-v2 section 3.1), where each query sees the whole view.
`SpatialResampler` is the published one's (ECCV 2024; section 3.2), where each query sees its own window.
Dimension letters: V views, P patches per view, C tower width, D decoder width, Q queries, G windows, S queries of a
window, K keys of a window.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from uhd_jax.config import ConfigError, ConnectorConfig
from uhd_jax.models import layers
from uhd_jax.models.pyramid import Pyramid
from uhd_jax.ops.attention import attention
from uhd_jax.ops.resize import resize_table
from uhd_jax.ops.roi_align import choose_bins, pool_table, pool_windows

# The released code cuts this at +-2, which is a hundred deviations.
query_init = nn.initializers.normal(0.02)
_in_init = nn.initializers.variance_scaling(0.5, "fan_in", "uniform")  # Xavier's for the three joined: [D, 3 * D]


def position_table(side: int, width: int) -> np.ndarray:
    """float32[side * side, width]: sine and cosine of the column in the first half, of the row in the second.

    What a learnable table starts from (spec v1-v2 section 3.2).

    Raises:
      ConfigError: the width is not a multiple of 4.
    """
    if width % 4:
        raise ConfigError(f"decoder.width: {width} is not a multiple of 4, as a connector's position table needs")
    frequencies = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
    angles = np.arange(side)[:, None] * frequencies
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    rows, cols = np.repeat(axis, side, axis=0), np.tile(axis, (side, 1))
    return np.concatenate([cols, rows], axis=1).astype(np.float32)


class WindowAttention(nn.Module):
    """Multi-head attention of queries that are the same in every view, each group of them in its own window."""

    heads: int
    dtype: layers.Dtype

    @nn.compact
    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
        """query float[G, S, D], key and value float[V, G, K, D], mask bool[V, K] -> float[V, G, S, D]."""
        views, windows, keys, width = key.shape

        def project(x: jax.Array, name: str) -> jax.Array:
            x = layers.dense(width, self.dtype, name, init=_in_init)(x)
            return x.reshape(*x.shape[:-1], self.heads, width // self.heads)

        query, key, value = project(query, "query"), project(key, "key"), project(value, "value")
        query = jnp.broadcast_to(query, (views, *query.shape))
        query, key, value = (x.reshape(views * windows, *x.shape[2:]) for x in (query, key, value))
        seen = jnp.broadcast_to(mask[:, None], (views, windows, keys)).reshape(-1, keys).astype(jnp.int32)
        ones = jnp.ones(query.shape[:2], jnp.int32)
        out = attention(query, key, value, ones, seen).reshape(views, windows, -1, width)
        return layers.dense(width, self.dtype, "out", init=query_init)(out)


class Resampler(nn.Module):
    """What resamplers have in common: their configuration, and all but keys and values."""

    config: ConnectorConfig
    width: int  # of the decoder
    heads: int
    dtype: layers.Dtype

    def _norm(self, name: str) -> layers.LayerNorm:
        return layers.LayerNorm(self.config.norm_eps, self.dtype, name=name)

    def _positions(self) -> jax.Array:
        side, width = self.config.query_side, self.width
        return self.param("position_table", lambda _: jnp.asarray(position_table(side, width)))

    def _queries(self, positions: jax.Array) -> jax.Array:
        queries = self.param("queries", query_init, (self.config.queries, self.width), jnp.float32)
        return self._norm("query_norm")(queries) + positions.astype(self.dtype)

    def _finish(self, attended: jax.Array) -> jax.Array:
        kernel = self.param("output", nn.initializers.normal(self.width**-0.5), (self.width, self.width), jnp.float32)
        return self._norm("post_norm")(attended) @ kernel.astype(self.dtype)


class Perceiver(Resampler):
    """Every query attends to all patches of a view, and on a pyramid to those of all levels.

    The original resized its positions to 24 x 24 whatever the view; here they are resized to its own patch grid.
    """

    @nn.compact
    def __call__(self, features: jax.Array, grids: jax.Array, patches: jax.Array) -> jax.Array:
        """Condenses views.

        Args:
          features: float[V, P, C] of the tower, in raster order.
          grids: int32[V, 2] rows and columns of the features; (0, 0) for an empty slot.
          patches: float32[V, P, patch_dim] normalised pixels, which guide a pyramid's upsampling.

        Returns:
          float[V, Q, width].
        """
        side, dtype = self.config.query_side, self.dtype
        positions = self._positions()
        project = layers.dense(self.width, dtype, "key_value", bias=False, init=query_init)
        norm = self._norm("key_value_norm")
        keys, values, masks = [], [], []
        pyramid = Pyramid(self.config.pyramid, dtype, name="upsampler")
        for level, level_grids in pyramid(features, grids, patches):
            index, cols = jnp.arange(level.shape[1])[None], jnp.maximum(level_grids[:, 1:], 1)
            value = norm(project(level))
            places = resize_table(positions, (side, side), level_grids, index // cols, index % cols)
            keys.append(value + places.astype(dtype))
            values.append(value)
            masks.append(index < level_grids[:, :1] * level_grids[:, 1:])
        key, value, mask = (jnp.concatenate(parts, axis=1) for parts in (keys, values, masks))
        attend = WindowAttention(self.heads, dtype, name="attention")
        return self._finish(attend(self._queries(positions)[None], key[:, None], value[:, None], mask)[:, 0])


class SpatialResampler(Resampler):
    """Every query attends to the few pooled bins of its own window of the view."""

    @nn.compact
    def __call__(self, features: jax.Array, grids: jax.Array, patches: jax.Array) -> jax.Array:
        """Condenses views.

        Args:
          features: float[V, P, C] of the tower, in raster order.
          grids: int32[V, 2] rows and columns of the features; (0, 0) for an empty slot.
          patches: not used.

        Returns:
          float[V, Q, width], windows in raster order.
        """
        side, boxes = self.config.query_side, self.config.box_dtype
        positions = self._positions()
        project = layers.dense(self.width, self.dtype, "key_value", bias=False, init=query_init)
        values = self._norm("key_value_norm")(project(features))
        bins = choose_bins(grids)
        # Positions are added before pooling, which is linear: pooled apart, they need no map of their own.
        value, mask = pool_windows(values, grids, bins, side, boxes)
        key = value + pool_table(positions, (side, side), grids, bins, side, boxes).astype(self.dtype)
        attend = WindowAttention(self.heads, self.dtype, name="attention")
        return self._finish(attend(self._queries(positions)[:, None], key, value, mask)[:, :, 0])
