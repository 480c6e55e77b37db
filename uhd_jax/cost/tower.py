"""Multiply-accumulates of the tower and of the compressor inside it.

Dimension letters: d tower width, f tower mlp width.
"""

from __future__ import annotations

import math

from uhd_jax.config import CompressorConfig, ConfigError, ModelConfig, TowerConfig
from uhd_jax.cost.stretches import Stretch
from uhd_jax.cost.work import Work

KINDS = ("siglip2", "clip", "moonvit")


def tower_stretches(config: ModelConfig, work: Work, compress: bool, all_layers: bool) -> list[Stretch]:
    """From the pixels to the features, in data order.

    Args:
      config: the model.
      work: of the views.
      compress: whether the compressor runs.
      all_layers: counts also the last layers of a CLIP tower that never run.

    Raises:
      ConfigError: a kind that is not known here.
    """
    tower, d = config.tower, config.tower.width
    if tower.kind not in KINDS:
        raise ConfigError(f"tower.kind: the cost of a tower of kind {tower.kind!r} is not known")
    stretches = [Stretch("patch_embedding", work.patches * tower.patch_dim * d)]
    if tower.kind != "siglip2":
        table = math.prod(tower.table_shape)
        stretches.append(Stretch("position_table", overhead_macs=work.patches * table * d))
    upstream = ("patch_embedding", "position_table", "tower")

    def layers(count: int, tokens: float, pairs: float) -> Stretch:
        return Stretch("tower", count * tokens * layer_weights(tower), count * 2 * d * pairs, upstream=upstream)

    depth = tower.layers - (0 if all_layers else tower.skipped_layers)
    if tower.kind == "clip":  # with its class token
        return [*stretches, layers(depth, work.patches + work.views, work.patch_pairs + 2 * work.patches + work.views)]
    before = config.compressor.after_layer + 1 if compress else depth
    stretches.append(layers(before, work.patches, work.patch_pairs))
    if compress:
        upstream += ("compressor",)
        weights, pairs = _compressor(config.compressor, tower, work.patches)
        stretches.append(Stretch("compressor", weights, pairs, upstream=upstream))
        stretches.append(layers(depth - before, work.patches / 4, work.patch_pairs / 16))
    return stretches


def layer_weights(tower: TowerConfig) -> int:
    """Entries of the weight matrices of one layer."""
    return 4 * tower.width**2 + 2 * tower.width * tower.mlp_width


def _compressor(compressor: CompressorConfig, tower: TowerConfig, patches: int) -> tuple[float, float]:
    """Products with weights, and in attention."""
    d, f, merged = tower.width, tower.mlp_width, patches / 4
    plain_mlp = merged * (16 * d * d + 4 * d * d)
    reused_mlp = merged * (16 * d * f + 4 * d * f)
    windows = patches * 4 * d * d
    # One query per window, keys and values of all four tokens, then a layer's mlp on the merged token.
    cross = merged * (2 * d * d + 2 * d * f) + patches * 2 * d * d
    return {
        "average_pool": (0, 0),
        "unshuffle_mlp": (plain_mlp, 0),
        "reused_mlp": (reused_mlp, 0),
        "cross_attention_top_left": (cross, 2 * d * 4 * merged),
        "cross_attention_mean": (cross, 2 * d * 4 * merged),
        "window_attention_mlp": (windows + plain_mlp, 2 * d * 4 * patches),
        "window_attention_reused_mlp": (windows + reused_mlp, 2 * d * 4 * patches),
    }[compressor.kind]
