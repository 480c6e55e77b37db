"""The merging MLP connector: 2x2 tokens of the tower become one visual token (spec v4 section 2.6)."""

from __future__ import annotations

import flax.linen as nn
import jax

from uhd_jax.config import ConnectorConfig
from uhd_jax.models import layers
from uhd_jax.ops.merge import merge_windows


class MergingMlp(nn.Module):
    """One round merges 4x; two rounds are the paper's post-ViT 16x baseline. GELU in the exact (erf) form."""

    config: ConnectorConfig
    width: int  # of the decoder
    dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array, grids: jax.Array | None = None, patches: jax.Array | None = None) -> jax.Array:
        """float[V, P', D] in merge order -> float[V, P' / 4**rounds, width] in raster order; the rest is not needed."""
        tower_width = x.shape[-1]
        for number in range(self.config.rounds):
            last = number == self.config.rounds - 1
            x = _Round(self.width if last else tower_width, self.config.norm_eps, self.dtype, name=f"round_{number}")(x)
        return x


class _Round(nn.Module):
    """LN(4d), linear 4d -> 4d, GELU, linear 4d -> features, on the joined tokens of each window."""

    features: int
    eps: float
    dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        windows = merge_windows(x)
        joined = windows.reshape(*windows.shape[:-2], -1)
        normed = layers.LayerNorm(self.eps, self.dtype, name="norm")(joined)
        init = layers.torch_linear_init
        hidden = nn.gelu(layers.dense(joined.shape[-1], self.dtype, "linear_1", init=init)(normed), approximate=False)
        return layers.dense(self.features, self.dtype, "linear_2", init=init)(hidden)
