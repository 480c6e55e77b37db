"""The tower: a ViT for patch grids of any shape (SigLIP 2 or MoonViT) with a compressor between two of its layers.

The two differ in their positions. SigLIP 2 looks each patch up in its table at the nearest entry. MoonViT resizes its
table to the view's grid with torch's bicubic rule, and turns queries and keys by row and column besides.

Source: LLaVA-UHD v4 (arXiv 2605.08985) sections on the visual encoder; spec v4 sections 2.2 and 2.3; spec moonvit.
Dimension letters: V views, P patches per view, D width, N heads, H head dim.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from uhd_jax.config import CompressorConfig, TowerConfig
from uhd_jax.models import layers
from uhd_jax.models.compressor import Compressor
from uhd_jax.models.stacks import run_stack, stack_init, stack_param
from uhd_jax.ops.attention import view_segments
from uhd_jax.ops.merge import nearest_table_index, patch_coordinates
from uhd_jax.ops.resize import resize_table
from uhd_jax.ops.rope import rope_angles_2d
from uhd_jax.sharding.gathering import GatherLayer

ROPE_THETA = 10_000.0  # MoonViT's; its config does not have it


class TowerLayer(nn.Module):
    """Pre-norm transformer layer: x + Attention(norm1(x)), then x + Mlp(norm2(x)). CLIP's has its own GELU."""

    config: TowerConfig
    dtype: layers.Dtype
    attention: str = "auto"  # `ModelConfig.attention`

    @nn.compact
    def __call__(
        self, x: jax.Array, segments: jax.Array | None, angles: tuple[jax.Array, jax.Array] | None = None
    ) -> jax.Array:
        """One layer on x float[V, P, D] with segments int32[V, P] and rotary angles, if any -> float[V, P, D]."""
        cfg, dtype = self.config, self.dtype
        attended = layers.Attention(cfg.heads, dtype, self.attention, name="attention")(
            layers.LayerNorm(cfg.norm_eps, dtype, name="norm1")(x), segments, angles
        )
        x = x + attended
        gelu = layers.quick_gelu if cfg.kind == "clip" else layers.gelu_tanh
        normed = layers.LayerNorm(cfg.norm_eps, dtype, name="norm2")(x)
        return x + layers.Mlp(cfg.mlp_width, dtype, gelu, name="mlp")(normed)


class Tower(nn.Module):
    """Patch embedding, position table, layers with the compressor after one of them, final norm.

    MoonViT behind the compressor: a merged token takes its row and column in the halved grid, so neighbours stay one
    apart. Inside the compressor's 2x2 windows nothing is rotated. (The paper has no MoonViT with a compressor.)
    """

    config: TowerConfig
    compressor: CompressorConfig
    dtype: layers.Dtype = jnp.float32
    scan: bool = True
    remat: str = "none"
    attention: str = "auto"
    gather: GatherLayer | None = None

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
        rotary = cfg.kind == "moonvit"
        layer = TowerLayer(cfg, self.dtype, self.attention, parent=None)
        example = jnp.zeros((1, 4, cfg.width), self.dtype)
        stacked = stack_param(self, "layers", stack_init(layer, depth, example, None))
        entries = math.prod(cfg.table_shape)
        table = self.param("position_table", nn.initializers.normal(0.02), (entries, cfg.width), jnp.float32)

        rows, cols = patch_coordinates(grids, patches.shape[1], levels)
        if rotary:
            positions = resize_table(table, cfg.table_shape, grids, rows, cols)
        else:
            positions = table[nearest_table_index(grids, rows, cols, cfg.table_side)]
        x = layers.dense(cfg.width, self.dtype, "patch_embedding")(patches) + positions.astype(self.dtype)
        taps = {"embeddings": x} if collect else {}

        def run(x, grids, levels, start, stop):
            segments = view_segments(grids[:, 0] * grids[:, 1], x.shape[1])
            angles = None
            if rotary:
                rows, cols = patch_coordinates(grids, x.shape[1], levels)
                angles = rope_angles_2d(rows, cols, cfg.width // cfg.heads, ROPE_THETA)

            def step(x, params):
                x = layer.apply({"params": params}, x, segments, angles)
                return x, x if collect else None

            return run_stack(
                step, x, stacked, scan=self.scan, remat=self.remat, gather=self.gather, start=start, stop=stop
            )

        if not (compress and self.compressor.kind != "none"):
            x, outputs = run(x, grids, levels, 0, depth)
            if collect:
                taps["layers_before"] = outputs
        else:
            split = self.compressor.after_layer + 1
            x, before = run(x, grids, levels, 0, split)
            compressor = Compressor(self.compressor.kind, cfg, self.dtype, name="compressor")
            x, attended = compressor(x)
            compressed = x
            x, after = run(x, grids // 2, levels - 1, split, depth)
            if collect:
                taps |= {"layers_before": before, "compressor": compressed, "layers_after": after}
                taps |= {} if attended is None else {"compressor_attention": attended}
        return layers.LayerNorm(cfg.norm_eps, self.dtype, name="final_norm")(x), taps
