"""Towers of other families in PyTorch checkpoints: CLIP (LLaVA-UHD v1, v2) and MoonViT."""

from __future__ import annotations

from uhd_jax.config import TowerConfig
from uhd_jax.convert import minicpmv
from uhd_jax.convert.tables import Entry, layer_norm


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
