"""Names of MiniCPM-V 4.6's parameters in transformers, part by part and whole (spec v4 section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uhd_jax.config import ConnectorConfig, ModelConfig, TowerConfig
from uhd_jax.convert.decoders import decoder_table
from uhd_jax.convert.tables import PATCH_CONVOLUTION, Entry, dense, layer_norm

_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}


def tower_table(config: TowerConfig, prefix: str) -> list[Entry]:
    """SigLIP 2 tower under `prefix`, e.g. "model.vision_tower."."""
    embeddings, layer = f"{prefix}embeddings.", f"{prefix}encoder.layers.{{L}}."
    shape = (config.width, 3, config.patch_size, config.patch_size)
    return [
        Entry("tower/patch_embedding/kernel", f"{embeddings}patch_embedding.weight", PATCH_CONVOLUTION, shape),
        Entry("tower/patch_embedding/bias", f"{embeddings}patch_embedding.bias"),
        Entry("tower/position_table", f"{embeddings}position_embedding.weight"),
        *layer_norm("tower/layers/norm1", f"{layer}layer_norm1"),
        *layer_norm("tower/layers/norm2", f"{layer}layer_norm2"),
        *_attention("tower/layers/attention", f"{layer}self_attn"),
        *dense("tower/layers/mlp/fc1", f"{layer}mlp.fc1"),
        *dense("tower/layers/mlp/fc2", f"{layer}mlp.fc2"),
        *layer_norm("tower/final_norm", f"{prefix}post_layernorm"),
    ]


def _attention(ours: str, theirs: str) -> list[Entry]:
    names = _ATTENTION | {"out": "out_proj"}
    return [entry for mine, name in names.items() for entry in dense(f"{ours}/{mine}", f"{theirs}.{name}")]


def compressor_table(prefix: str) -> list[Entry]:
    """The paper's module D (`vit_merger`)."""
    return [
        *layer_norm("tower/compressor/norm1", f"{prefix}layer_norm1"),
        *_attention("tower/compressor/attention", f"{prefix}self_attn"),
        *layer_norm("tower/compressor/mlp_norm", f"{prefix}pre_norm"),
        *dense("tower/compressor/linear_1", f"{prefix}linear_1"),
        *dense("tower/compressor/linear_2", f"{prefix}linear_2"),
    ]


def connector_table(config: ConnectorConfig, prefix: str) -> list[Entry]:
    """The merging MLP, `prefix` + "0." for the first round."""
    entries = []
    for number in range(config.rounds):
        ours, theirs = f"connector/round_{number}", f"{prefix}{number}"
        entries += layer_norm(f"{ours}/norm", f"{theirs}.pre_norm")
        entries += dense(f"{ours}/linear_1", f"{theirs}.linear_1") + dense(f"{ours}/linear_2", f"{theirs}.linear_2")
    return entries


def table(config: ModelConfig) -> list[Entry]:
    """Every parameter of a MiniCPM-V 4.6 layout checkpoint."""
    entries = tower_table(config.tower, "model.vision_tower.")
    if config.compressor.kind == "window_attention_reused_mlp":
        entries += compressor_table("model.vision_tower.vit_merger.")
    entries += connector_table(config.connector, "model.merger.mlp.")
    return entries + decoder_table(config.decoder, "model.language_model.", "lm_head.weight")


def tower_config(vision: Mapping[str, Any]) -> TowerConfig:
    """TowerConfig from a `vision_config`."""
    return TowerConfig(
        width=vision["hidden_size"],
        mlp_width=vision["intermediate_size"],
        layers=vision["num_hidden_layers"],
        heads=vision["num_attention_heads"],
        patch_size=vision["patch_size"],
        table_side=vision["image_size"] // vision["patch_size"],
        norm_eps=vision["layer_norm_eps"],
    )
