"""Hierarchical window attention, the connector of v2 (arXiv 2412.13871 Eq. 3 to 5; spec v1-v2 section 3.6).

A view is covered by query_side x query_side equal windows on every level of its feature pyramid. Each window is pooled
to a few bins, and the window's queries attend to the bins of all levels together.
Dimension letters: V views, P patches per view, C tower width, D decoder width, Q windows, S sets of queries.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from uhd_jax.models import layers
from uhd_jax.models.pyramid import Pyramid
from uhd_jax.models.resampler import Resampler, WindowAttention, query_init
from uhd_jax.ops.precision import wide_dtype
from uhd_jax.ops.roi_align import choose_bins, pool_table, pool_windows

# (height, width) of a window's bins on levels 0 to 3. The paper (Table 6) has only the idea, finer bins at higher
# levels, and finds it worse; here: 2x2, 3x3, then as many as there is room for.
PYRAMID_BINS = ((2, 2), (3, 3), (3, 4), (3, 4))


def level_bins(kind: str, level: int, grids: jax.Array) -> jax.Array:
    """Bins of a view's windows on a level, int32[V, 2] (height, width).

    Args:
      kind: "selective", by the view's aspect ratio and so the same on every level; "fixed", 3x3; "pyramid", see
        `PYRAMID_BINS`.
      level: of the pyramid.
      grids: int32[V, 2] rows and columns of the tower's features.
    """
    if kind == "selective":
        return choose_bins(grids)
    return jnp.broadcast_to(jnp.array((3, 3) if kind == "fixed" else PYRAMID_BINS[level], jnp.int32), grids.shape)


@functools.partial(jax.checkpoint, static_argnums=(5, 6, 7))
def pool_projected(
    cells: jax.Array,
    grids: jax.Array,
    bins: jax.Array,
    linear: dict[str, jax.Array],
    norm: dict[str, jax.Array],
    eps: float,
    side: int,
    box_dtype: str,
) -> tuple[jax.Array, jax.Array]:
    """`pool_windows` of LayerNorm(cells @ kernel + bias), without that map: it would be the largest array of the model.

    The norm divides each cell by a deviation of its own; everything else is linear and may follow the pooling. The
    variance is a quadratic form of the cell, whose matrix is the kernel's (with the bias as one more row, and less its
    mean over the width, which is the norm's subtraction) times its transpose.

    Args:
      cells: float[V, P, C] in raster order.
      grids: int32[V, 2].
      bins: int32[V, 2].
      linear: kernel float32[C, D] and bias float32[D].
      norm: scale and bias float32[D].
      eps: of the norm.
      side: windows along each axis.
      box_dtype: as in `pool_windows`.

    Returns:
      float[V, side * side, 12, D] and bool[V, 12].
    """
    one = jnp.ones((*cells.shape[:-1], 1), cells.dtype)
    cells = jnp.concatenate([cells, one], axis=-1)
    kernel = jnp.concatenate([linear["kernel"], linear["bias"][None]])
    kernel -= jnp.mean(kernel, axis=-1, keepdims=True)
    form = (kernel @ kernel.T / kernel.shape[-1]).astype(cells.dtype)
    products = jnp.matmul(cells, form, preferred_element_type=wide_dtype(cells)) * cells
    variance = jnp.sum(products, axis=-1, keepdims=True)
    cells = (cells * jax.lax.rsqrt(jnp.maximum(variance, 0) + eps)).astype(cells.dtype)
    pooled, mask = pool_windows(jnp.concatenate([cells, one], axis=-1), grids, bins, side, box_dtype)
    return pooled @ jnp.concatenate([kernel * norm["scale"], norm["bias"][None]]).astype(cells.dtype), mask


def _init_linear(key: jax.Array, features: int, width: int) -> dict[str, jax.Array]:
    return {"kernel": query_init(key, (features, width), jnp.float32), "bias": jnp.zeros(width)}


class Hiwin(Resampler):
    """The released models have four sets of queries, which share one attention; a linear layer joins what they find.

    `query_sets` = 1 is the paper's Eq. 5. There is nothing to join then: neither `set_norm` nor `join` exists, and the
    rest is as in the spatial resampler. Keys and values are projected once for all sets.
    """

    @nn.compact
    def __call__(self, features: jax.Array, grids: jax.Array, patches: jax.Array) -> jax.Array:
        """Condenses views.

        Args:
          features: float[V, P, C] of the tower, in raster order.
          grids: int32[V, 2] rows and columns of the features; (0, 0) for an empty slot.
          patches: float32[V, P, patch_dim] normalised pixels, which guide the pyramid's upsampling.

        Returns:
          float[V, Q, width], windows in raster order.
        """
        cfg, width, dtype = self.config, self.width, self.dtype
        side, levels = cfg.query_side, cfg.pyramid.levels
        positions = self._positions()
        embeddings = self.param("level_embeddings", lambda _: {f"level_{n}": jnp.zeros(width) for n in levels})
        norm = self.param("key_value_norm", lambda _: {"scale": jnp.ones(width), "bias": jnp.zeros(width)})
        keys, values, masks = [], [], []
        maps = Pyramid(cfg.pyramid, dtype, name="upsampler")(features, grids, patches)
        for level, (cells, cell_grids) in zip(levels, maps, strict=True):
            bins = level_bins(cfg.bins, level, grids)
            linear = self.param(f"level_{level}", _init_linear, cells.shape[-1], width)
            value, mask = pool_projected(cells, cell_grids, bins, linear, norm, cfg.norm_eps, side, cfg.box_dtype)
            # The weights of bicubic resizing sum to one, so the level's embedding may join the table before; pooling is
            # linear, so positions are pooled apart from the features and need no map of their own.
            table = positions + embeddings[f"level_{level}"]
            place = pool_table(table, (side, side), cell_grids, bins, side, cfg.box_dtype)
            keys.append(value + place.astype(dtype))
            values.append(value)
            masks.append(mask)
        key, value = jnp.concatenate(keys, axis=2), jnp.concatenate(values, axis=2)

        queries = self.param("queries", self._init_queries)
        query = jnp.stack([queries[f"set_{n}"] for n in range(cfg.query_sets)], axis=1)  # [Q, S, D]
        query = self._norm("query_norm")(query) + positions[:, None].astype(dtype)
        attend = WindowAttention(self.heads, dtype, name="attention")
        found = attend(query, key, value, jnp.concatenate(masks, axis=1))  # [V, Q, S, D]
        if cfg.query_sets > 1:
            found = self._norm("set_norm")(found).reshape(*found.shape[:2], -1)
            found = layers.dense(width, dtype, "join", init=query_init)(found)
        else:
            found = found[:, :, 0]
        return self._finish(found)

    def _init_queries(self, key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, self.config.query_sets)
        shape = (self.config.queries, self.width)
        return {f"set_{n}": query_init(k, shape, jnp.float32) for n, k in enumerate(keys)}
