"""MiniCPM-V 4.6 layout of transformers, and LLaVA-UHD v4 in it: names and sizes (spec v4 section 4)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from uhd_jax.config import (
    ChatConfig,
    CompressorConfig,
    ConnectorConfig,
    ModelConfig,
    SlicingConfig,
    TowerConfig,
)
from uhd_jax.convert.decoders import decoder_config, decoder_dropped, decoder_table
from uhd_jax.convert.tables import PATCH_CONVOLUTION, ConvertError, Entry, dense, import_tensors, layer_norm

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


def model_config(folder: Path) -> ModelConfig:
    """ModelConfig of a checkpoint folder, from its config.json and preprocessor_config.json.

    Raises:
      ConvertError: the folder has no config.json, or one of another family.
    """
    config = _read_json(folder / "config.json")
    if config.get("model_type") != "minicpmv4_6":
        raise ConvertError(f"{folder / 'config.json'}: model_type {config.get('model_type')!r} is not 'minicpmv4_6'")
    processor = _read_json(folder / "preprocessor_config.json")
    kind = "window_attention_reused_mlp" if config["insert_layer_id"] >= 0 else "none"
    return ModelConfig(
        decoder=decoder_config(config["text_config"] | {"tie_word_embeddings": config["tie_word_embeddings"]}),
        tower=tower_config(config["vision_config"]),
        compressor=CompressorConfig(kind, max(config["insert_layer_id"], 0)),
        connector=ConnectorConfig(rounds=config["merger_times"]),
        slicing=SlicingConfig(scale_resolution=processor["scale_resolution"], max_slices=processor["max_slice_nums"]),
        chat=ChatConfig(tokenizer=str(folder), use_image_id=processor["use_image_id"]),
        mode=config["downsample_mode"],
        dtype={"float32": "float32"}.get(config.get("dtype"), "bfloat16"),
    )


def load_checkpoint(folder: str | Path, abstract_of: Any) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads a checkpoint folder in the MiniCPM-V 4.6 layout.

    Args:
      folder: holds config.json, preprocessor_config.json, tokenizer.json and safetensors.
      abstract_of: ModelConfig -> our tree of shapes.

    Returns:
      The model's configuration and its parameters, float32 NumPy arrays.

    Raises:
      ConvertError: files are missing or do not fit each other.
    """
    folder = Path(folder)
    config = model_config(folder)
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ConvertError(f"{folder}: no model*.safetensors file")
    tensors = {}
    for file in files:
        with safe_open(file, framework="np") as reader:
            tensors |= {name: reader.get_tensor(name) for name in reader.keys()}
    patterns = [pattern for pattern, _ in decoder_dropped(config.decoder, "lm_head.weight")]
    params = import_tensors(
        table(config),
        tensors,
        abstract_of(config),
        lambda name: any(re.fullmatch(pattern, name) for pattern in patterns),
    )
    return config, params


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ConvertError(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise ConvertError(f"{path}: not JSON ({error})") from None
