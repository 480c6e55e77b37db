"""LLaVA-UHD v4 as its authors train it (spec v4 section 4.2): the paper's model, and the post-ViT baseline.

Which of the two a checkpoint is, its tensors say. The same parameters as in MiniCPM-V 4.6 under other names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uhd_jax.config import ChatConfig, CompressorConfig, ConnectorConfig, ModelConfig, SlicingConfig, TowerConfig
from uhd_jax.convert import decoder_families, minicpmv
from uhd_jax.convert.decoder_families import text_dropped
from uhd_jax.convert.decoders import KINDS, decoder_table, text_config
from uhd_jax.convert.family import Dropped, Family, Shapes, count_of, dtype_of, field, shape_of
from uhd_jax.convert.files import read_json, token_ids, write_json, write_tokenizer
from uhd_jax.convert.tables import ConvertError, Entry, dense, layer_norm

if TYPE_CHECKING:
    from uhd_jax.convert.source import Source

TOWER, COMPRESSOR, CONNECTOR = "vpm.", "vit_merger.", "resampler.mlp."
DECODER, HEAD = "llm.model.", "llm.lm_head.weight"
KIND = "window_attention_reused_mlp"
AFTER_LAYER = 6  # where the paper's model has its compressor, if config.json does not say
CONNECTOR_TYPES = {KIND: "uhd_mlp_insert_window_attention_ViTmlp_4_4", "none": "uhd_mlp_4_4"}


def _recognise(source: Source) -> bool:
    names = {f"{TOWER}embeddings.patch_embedding.weight", f"{CONNECTOR}0.mlp.0.weight", f"{DECODER}embed_tokens.weight"}
    return names <= set(source.tensors)


def _text(config: Mapping[str, Any], source: Source) -> Mapping[str, Any]:
    """Fields of the language model: their own object, or among all others, then of model_type "minicpmv"."""
    text = config.get("text_config") or config.get("llm_config") or config
    if text.get("model_type") in KINDS:
        return text
    layer = f"{DECODER}layers.0.self_attn."
    normed, biased = f"{layer}q_norm.weight" in source.tensors, f"{layer}q_proj.bias" in source.tensors
    return dict(text) | {"model_type": "qwen3" if normed else "qwen2" if biased else "llama"}


def _config(source: Source) -> ModelConfig:
    config = source.json("config.json")
    vision = field(config, "vision_config", source)
    rows = shape_of(source, f"{TOWER}embeddings.position_embedding.weight")[0]
    slices = {"scale_resolution": 448, "max_slice_nums": 9} | (config.get("slice_config") or {})
    inserted = any(name.startswith(COMPRESSOR) for name in source.tensors)
    after = config.get("insert_layer_id", -1)
    chat = source.json("tokenizer_config.json") if source.has("tokenizer_config.json") else {}
    placeholder = chat.get("unk_token") or "<unk>"
    return ModelConfig(
        decoder=decoder_families.config_of(source, _text(config, source)),
        tower=TowerConfig(
            width=field(vision, "hidden_size", source),
            mlp_width=field(vision, "intermediate_size", source),
            layers=field(vision, "num_hidden_layers", source),
            heads=field(vision, "num_attention_heads", source),
            patch_size=field(vision, "patch_size", source),
            table_side=math.isqrt(rows),
            norm_eps=vision.get("layer_norm_eps", 1e-6),
        ),
        compressor=CompressorConfig(KIND, after if after >= 0 else AFTER_LAYER)
        if inserted
        else CompressorConfig("none"),
        connector=ConnectorConfig(rounds=count_of(source, CONNECTOR)),
        slicing=SlicingConfig(scale_resolution=slices["scale_resolution"], max_slices=slices["max_slice_nums"]),
        chat=ChatConfig(
            tokenizer=str(source.folder),
            placeholder=placeholder if isinstance(placeholder, str) else placeholder["content"],
            use_image_id=config.get("use_image_id", True),
        ),
        dtype=dtype_of(config),
    )


def _table(config: ModelConfig) -> list[Entry]:
    entries = minicpmv.tower_table(config.tower, TOWER)
    if config.compressor.kind != "none":
        entries += minicpmv.compressor_table(COMPRESSOR)
    for number in range(config.connector.rounds):
        ours, theirs = f"connector/round_{number}", f"{CONNECTOR}{number}"
        entries += layer_norm(f"{ours}/norm", f"{theirs}.pre_norm")
        entries += dense(f"{ours}/linear_1", f"{theirs}.mlp.0") + dense(f"{ours}/linear_2", f"{theirs}.mlp.2")
    return entries + decoder_table(config.decoder, DECODER, HEAD)


def _dropped(config: ModelConfig) -> tuple[Dropped, ...]:
    copies = r"vit_merger\.(layer_norm2|mlp\.fc[12])\.(weight|bias)"
    return (
        *text_dropped(config.decoder, HEAD),
        Dropped(r"vpm\.embeddings\.position_ids", "a constant: the numbers from 0 up"),
        Dropped(copies, "copies from the layer before, of which the compressor was made; never run"),
    )


def _filled(config: ModelConfig) -> Shapes:
    if config.compressor.kind == "none":
        return {}
    width, mlp = config.tower.width, config.tower.mlp_width
    shapes = {"layer_norm2": (width,), "mlp.fc1": (mlp, width), "mlp.fc2": (width, mlp)}
    weights = {f"{COMPRESSOR}{name}.weight": shape for name, shape in shapes.items()}
    return weights | {f"{COMPRESSOR}{name}.bias": shape[:1] for name, shape in shapes.items()}


def _write(config: ModelConfig, tokenizer: Path | None, folder: Path) -> None:
    """config.json and the tokenizer. The modules that load it are the original checkpoint's own Python files."""
    kinds = {"tower.kind": (config.tower.kind, "siglip2"), "connector.kind": (config.connector.kind, "merging_mlp")}
    for key, (found, wanted) in kinds.items():
        if found != wanted:
            raise ConvertError(f"{key}: the layout needs {wanted!r}, the model has {found!r}")
    if config.compressor.kind not in CONNECTOR_TYPES:
        raise ConvertError(f"compressor.kind: the layout has {KIND!r} or 'none', the model {config.compressor.kind!r}")
    tower, inserted = config.tower, config.compressor.kind != "none"
    text = text_config(config.decoder)
    if text["model_type"] == "qwen3_5_text":
        raise ConvertError(
            "decoder: the layout has Llama, Qwen2 or Qwen3, the model Qwen3.5; minicpm_v_4_6 has room for it"
        )
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "patch_size": tower.patch_size,
        "image_size": tower.table_side * tower.patch_size,
        "layer_norm_eps": tower.norm_eps,
        "hidden_act": "gelu_pytorch_tanh",
    }
    slicing = config.slicing
    fields = text | {
        "architectures": ["MiniCPMV"],
        "model_type": "minicpmv",
        "rope_theta": config.decoder.rope_theta,
        "vision_config": vision,
        "slice_config": {
            "max_slice_nums": slicing.max_slices,
            "patch_size": tower.patch_size,
            "scale_resolution": slicing.scale_resolution,
        },
        "slice_mode": True,
        "use_image_id": config.chat.use_image_id,
        "insert_layer_id": config.compressor.after_layer if inserted else -1,
        "resampler_type": CONNECTOR_TYPES[config.compressor.kind],
        "torch_dtype": config.dtype,
    }
    write_json(folder / "config.json", fields | token_ids(tokenizer, config))
    write_tokenizer(tokenizer, config, folder)
    target = folder / "tokenizer_config.json"
    if target.exists():
        write_json(target, read_json(target) | {"unk_token": config.chat.placeholder})


RESEARCH = Family(
    name="llava_uhd_v4_research",
    parts=("tower", "connector", "decoder"),
    recognise=_recognise,
    config=_config,
    table=_table,
    dropped=_dropped,
    write_files=_write,
    filled=_filled,
)
