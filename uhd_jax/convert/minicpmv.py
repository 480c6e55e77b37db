"""MiniCPM-V 4.6 layout of transformers, with a Qwen3 decoder (LLaVA-UHD v4): names and sizes (spec v4 section 4)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from uhd_jax.config import (
    ChatConfig,
    CompressorConfig,
    ConnectorConfig,
    DecoderConfig,
    ModelConfig,
    SlicingConfig,
    TowerConfig,
)
from uhd_jax.convert.tables import PATCH_CONVOLUTION, TRANSPOSE, ConvertError, Entry, dense, import_tensors, layer_norm

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


def decoder_table(config: DecoderConfig, prefix: str, head: str) -> list[Entry]:
    """Llama, Qwen2 or Qwen3 under `prefix`; `head` is the full name of the output matrix."""
    layer = f"{prefix}layers.{{L}}."
    entries = [
        Entry("decoder/embedding", f"{prefix}embed_tokens.weight"),
        Entry("decoder/final_norm/scale", f"{prefix}norm.weight"),
        Entry("decoder/layers/input_norm/scale", f"{layer}input_layernorm.weight"),
        Entry("decoder/layers/post_attention_norm/scale", f"{layer}post_attention_layernorm.weight"),
        *dense("decoder/layers/attention/out", f"{layer}self_attn.o_proj", bias=False),
    ]
    for ours, theirs in _ATTENTION.items():
        entries += dense(f"decoder/layers/attention/{ours}", f"{layer}self_attn.{theirs}", bias=config.qkv_bias)
    for name in ("gate", "up", "down"):
        entries += dense(f"decoder/layers/mlp/{name}", f"{layer}mlp.{name}_proj", bias=False)
    if config.qk_norm:
        entries.append(Entry("decoder/layers/attention/query_norm/scale", f"{layer}self_attn.q_norm.weight"))
        entries.append(Entry("decoder/layers/attention/key_norm/scale", f"{layer}self_attn.k_norm.weight"))
    return entries if config.tied_head else [*entries, Entry("decoder/head", head, TRANSPOSE)]


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


def decoder_config(text: Mapping[str, Any]) -> DecoderConfig:
    """DecoderConfig from a `text_config` of Llama, Qwen2 or Qwen3.

    Raises:
      ConvertError: another kind of text model.
    """
    kind = text["model_type"]
    if kind not in ("llama", "qwen2", "qwen3"):
        raise ConvertError(f"text_config.model_type: {kind!r} is none of llama, qwen2, qwen3")
    rope = text.get("rope_parameters") or {"rope_theta": text.get("rope_theta", 10_000.0)}
    return DecoderConfig(
        vocab_size=text["vocab_size"],
        width=text["hidden_size"],
        mlp_width=text["intermediate_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
        rope_theta=float(rope["rope_theta"]),
        norm_eps=text["rms_norm_eps"],
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        tied_head=text.get("tie_word_embeddings", False),
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
        slicing=SlicingConfig(
            scale_resolution=processor["scale_resolution"], max_slices=processor["max_slice_nums"]
        ),
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
    tied = config.decoder.tied_head
    params = import_tensors(table(config), tensors, abstract_of(config), lambda n: tied and n == "lm_head.weight")
    return config, params


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ConvertError(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise ConvertError(f"{path}: not JSON ({error})") from None
