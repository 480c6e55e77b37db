"""Projectors without attention: LLaVA-1.5's MLP, and v2's ablation on bilinearly reduced maps.

Dimension letters: V views, P patches per view, C tower width, D decoder width, Q visual tokens per view.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from uhd_jax.config import ConnectorConfig
from uhd_jax.models import layers
from uhd_jax.models.pyramid import Pyramid
from uhd_jax.ops.resize import resize_bilinear


class PlainMlp(nn.Module):
    """Linear, GELU (erf), linear on every patch: one visual token per patch, in the order of the patches."""

    config: ConnectorConfig
    width: int  # of the decoder
    heads: int
    dtype: layers.Dtype

    @nn.compact
    def __call__(self, features: jax.Array, grids: jax.Array, patches: jax.Array) -> jax.Array:
        """features float[V, P, C] -> float[V, P, width]; grids and patches are not used."""
        return _mlp(features, self.width, self.dtype)


class BilinearMlp(nn.Module):
    """The same MLP on maps reduced to query_side x query_side, a pyramid's levels joined (v2 section 4.3, "mlp-v2").

    v2's code has one more GELU in front of the MLP; no weights of this ablation are published.
    """

    config: ConnectorConfig
    width: int  # of the decoder
    heads: int
    dtype: layers.Dtype

    @nn.compact
    def __call__(self, features: jax.Array, grids: jax.Array, patches: jax.Array) -> jax.Array:
        """Condenses views.

        Args:
          features: float[V, P, C] of the tower, in raster order.
          grids: int32[V, 2] rows and columns of the features; (0, 0) for an empty slot.
          patches: float32[V, P, patch_dim] normalised pixels, which guide a pyramid's upsampling.

        Returns:
          float[V, Q, width] in raster order.
        """
        pyramid, side = Pyramid(self.config.pyramid, self.dtype, name="upsampler"), self.config.query_side
        reduced = [resize_bilinear(level, sizes, side) for level, sizes in pyramid(features, grids, patches)]
        return _mlp(jnp.concatenate(reduced, axis=-1), self.width, self.dtype)


def _mlp(x: jax.Array, width: int, dtype: layers.Dtype) -> jax.Array:
    init = layers.torch_linear_init
    hidden = nn.gelu(layers.dense(width, dtype, "linear_1", init=init)(x), approximate=False)
    return layers.dense(width, dtype, "linear_2", init=init)(hidden)
