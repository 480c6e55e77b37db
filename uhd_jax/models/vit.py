"""The tower: a NaViT-style ViT (SigLIP 2) with a compressor between two of its layers.

Source: LLaVA-UHD v4 (arXiv 2605.08985) sections on the visual encoder; spec v4 sections 2.2 and 2.3.
Dimension letters: V views, P patches per view, D width, N heads, H head dim.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from uhd_jax.config import CompressorConfig, TowerConfig
from uhd_jax.models import layers
from uhd_jax.models.compressor import Compressor
from uhd_jax.ops.attention import valid_keys_mask
from uhd_jax.ops.merge import nearest_table_index, patch_coordinates


class TowerLayer(nn.Module):
    """Pre-norm transformer layer: x + Attention(norm1(x)), then x + Mlp(norm2(x))."""

    config: TowerConfig
    dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """One layer on x float[V, P, D] with mask bool[V, 1, 1, P] -> float[V, P, D]."""
        cfg, dtype = self.config, self.dtype
        attended = layers.Attention(cfg.heads, dtype, name="attention")(
            layers.LayerNorm(cfg.norm_eps, dtype, name="norm1")(x), mask
        )
        x = x + attended
        return x + layers.Mlp(cfg.mlp_width, dtype, name="mlp")(layers.LayerNorm(cfg.norm_eps, dtype, name="norm2")(x))


class Tower(nn.Module):
    """Patch embedding, position table, layers with the compressor after one of them, final norm."""

    config: TowerConfig
    compressor: CompressorConfig
    dtype: layers.Dtype = jnp.float32
    scan: bool = True
    remat: str = "none"

    @nn.compact
    def __call__(
        self, patches: jax.Array, grids: jax.Array, *, levels: int, compress: bool, collect: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Encodes views.

        Args:
          patches: float[V, P, patch_dim], normalised to [-1, 1], in merge order of `levels`.
          grids: int32[V, 2] patch rows and columns; patches behind rows * cols are padding.
          levels: 2x2 merges from patches to visual tokens, which is what the merge order was made for.
          compress: whether the compressor runs (16x) or is skipped (4x).
          collect: also return every layer's output (for tests and pictures).

        Returns:
          float[V, P', D] with P' = P / 4 when compressed, else P; and named intermediates, empty unless `collect`:
          "embeddings", "layers_before" [k+1, V, P, D], "compressor_attention", "compressor", "layers_after".
        """
        cfg, depth = self.config, self.config.layers
        layer = TowerLayer(cfg, self.dtype, parent=None)
        example = jnp.zeros((1, 4, cfg.width), self.dtype)
        stacked = self.param("layers", layers.stack_init(layer, depth, example, None))
        table = self.param("position_table", nn.initializers.normal(0.02), (cfg.table_side**2, cfg.width), jnp.float32)

        rows, cols = patch_coordinates(grids, patches.shape[1], levels)
        positions = table[nearest_table_index(grids, rows, cols, cfg.table_side)]
        x = layers.dense(cfg.width, self.dtype, "patch_embedding")(patches) + positions.astype(self.dtype)
        taps = {"embeddings": x} if collect else {}

        def run(x, lengths, start, stop):
            mask = valid_keys_mask(lengths, x.shape[1])

            def step(x, params):
                x = layer.apply({"params": params}, x, mask)
                return x, x if collect else None

            return layers.run_stack(step, x, stacked, scan=self.scan, remat=self.remat, start=start, stop=stop)

        lengths = grids[:, 0] * grids[:, 1]
        if not (compress and self.compressor.kind != "none"):
            x, outputs = run(x, lengths, 0, depth)
            if collect:
                taps["layers_before"] = outputs
        else:
            split = self.compressor.after_layer + 1
            x, before = run(x, lengths, 0, split)
            compressor = Compressor(self.compressor.kind, cfg, self.dtype, name="compressor")
            x, attended = compressor(x)
            compressed = x
            x, after = run(x, lengths // 4, split, depth)
            if collect:
                taps |= {"layers_before": before, "compressor": compressed, "layers_after": after}
                taps |= {} if attended is None else {"compressor_attention": attended}
        return layers.LayerNorm(cfg.norm_eps, self.dtype, name="final_norm")(x), taps
