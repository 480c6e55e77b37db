"""The CLIP tower of LLaVA-UHD v1 and v2, for patch grids of any shape (spec v1-v2 section 2).

Dimension letters: V views, P patches per view, D width.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from uhd_jax.config import TowerConfig
from uhd_jax.models import layers
from uhd_jax.models.stacks import run_stack, stack_init, stack_param
from uhd_jax.models.vit import TowerLayer
from uhd_jax.ops.attention import view_segments
from uhd_jax.ops.merge import patch_coordinates
from uhd_jax.ops.resize import resize_table
from uhd_jax.sharding.gathering import GatherLayer


class ClipTower(nn.Module):
    """Patch embedding, class token, position table, pre-norm, layers.

    The features are the input of the last layer (`skipped_layers` = 1). That layer and the final norm have parameters,
    which checkpoints hold, and never run. The class token takes part in attention and is left out of the features.
    """

    config: TowerConfig
    dtype: layers.Dtype = jnp.float32
    scan: bool = True
    remat: str = "none"
    attention: str = "auto"
    gather: GatherLayer | None = None

    @nn.compact
    def __call__(
        self, patches: jax.Array, grids: jax.Array, *, levels: int, compress: bool = False, collect: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Encodes views.

        Args:
          patches: float[V, P, patch_dim], normalised by CLIP's mean and deviation, in merge order of `levels` (0 for
            raster order).
          grids: int32[V, 2] patch rows and columns; patches behind rows * cols are padding.
          levels: 2x2 merges that the order was made for.
          compress: ignored; no compressor stands in this tower.
          collect: also return every layer's output (for tests and pictures).

        Returns:
          float[V, P, D]; and named intermediates, empty unless `collect`, with the class token in front:
          "embeddings" [V, 1+P, D] before the pre-norm, "layers_before" [layers that ran, V, 1+P, D].
        """
        cfg = self.config
        layer = TowerLayer(cfg, self.dtype, self.attention, parent=None)
        example = jnp.zeros((1, 4, cfg.width), self.dtype)
        stacked = stack_param(self, "layers", stack_init(layer, cfg.layers, example, None))
        normal = nn.initializers.normal(cfg.width**-0.5)  # the original's; much less drowns in the pre-norm
        class_token = self.param("class_token", normal, (cfg.width,), jnp.float32)
        entries = 1 + math.prod(cfg.table_shape)  # the class token's, then those of the patches
        table = self.param("position_table", normal, (entries, cfg.width), jnp.float32)

        positions = resize_table(table[1:], cfg.table_shape, grids, *patch_coordinates(grids, patches.shape[1], levels))
        x = layers.dense(cfg.width, self.dtype, "patch_embedding", bias=False)(patches) + positions.astype(self.dtype)
        first = jnp.broadcast_to((class_token + table[0]).astype(self.dtype), (x.shape[0], 1, cfg.width))
        x = jnp.concatenate([first, x], axis=1)
        taps = {"embeddings": x} if collect else {}

        x = layers.LayerNorm(cfg.norm_eps, self.dtype, name="pre_norm")(x)
        segments = view_segments(1 + grids[:, 0] * grids[:, 1], x.shape[1])

        def step(x, params):
            x = layer.apply({"params": params}, x, segments)
            return x, x if collect else None

        stop = cfg.layers - cfg.skipped_layers
        x, outputs = run_stack(step, x, stacked, scan=self.scan, remat=self.remat, gather=self.gather, stop=stop)
        if collect:
            taps["layers_before"] = outputs
        final_norm = layers.LayerNorm(cfg.norm_eps, self.dtype, name="final_norm")
        if self.is_initializing():
            final_norm(x)
        return x[:, 1:], taps
