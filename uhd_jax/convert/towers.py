"""Towers of other families in PyTorch checkpoints: CLIP (LLaVA-UHD v1, v2) and MoonViT."""

from __future__ import annotations

from uhd_jax.config import TowerConfig
from uhd_jax.convert import minicpmv
from uhd_jax.convert.tables import PATCH_CONVOLUTION, Entry, Rule, dense, joined_dense, layer_norm


def clip_tower_table(config: TowerConfig, prefix: str) -> list[Entry]:
    """CLIP's vision model under `prefix`, "model.vision_tower.vision_tower.vision_model." (spec v1-v2 section 6.1).

    The names are SigLIP's and three more, one of them misspelt at its origin.
    """
    siglip = minicpmv.tower_table(config, prefix)
    return [
        *(entry for entry in siglip if entry.ours != "tower/patch_embedding/bias"),
        Entry("tower/class_token", f"{prefix}embeddings.class_embedding"),
        *layer_norm("tower/pre_norm", f"{prefix}pre_layrnorm"),
    ]


def moonvit_table(config: TowerConfig, prefix: str) -> list[Entry]:
    """MoonViT under `prefix`: "" as released alone, "vision_tower." inside Kimi-VL (spec moonvit section 8)."""
    embed, block = f"{prefix}patch_embed.", f"{prefix}encoder.blocks.{{L}}."
    table_shape = (*config.table_shape, config.width)
    raster = Rule(
        lambda a: a.reshape(-1, config.width),
        lambda a, shape: a.reshape(shape),
        lambda shape: (shape[0] * shape[1], shape[2]) if shape == table_shape else (),
    )
    convolution = (config.width, 3, config.patch_size, config.patch_size)
    return [
        Entry("tower/patch_embedding/kernel", f"{embed}proj.weight", PATCH_CONVOLUTION, convolution),
        Entry("tower/patch_embedding/bias", f"{embed}proj.bias"),
        Entry("tower/position_table", f"{embed}pos_emb.weight", raster, table_shape),
        *layer_norm("tower/layers/norm1", f"{block}norm0"),
        *layer_norm("tower/layers/norm2", f"{block}norm1"),
        *joined_dense("tower/layers/attention", ("query", "key", "value"), f"{block}wqkv.weight", f"{block}wqkv.bias"),
        *dense("tower/layers/attention/out", f"{block}wo"),
        *dense("tower/layers/mlp/fc1", f"{block}mlp.fc0"),
        *dense("tower/layers/mlp/fc2", f"{block}mlp.fc1"),
        *layer_norm("tower/final_norm", f"{prefix}encoder.final_layernorm"),
    ]
