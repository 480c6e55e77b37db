"""Whole LLaVA-UHD v1 and v2 checkpoints in the layout of LLaVA (spec v1-v2 section 6).

config.json names the language model's sizes and how v2 is set. The tower's and the connector's sizes are in no field:
they are read off the tensors' shapes. Heads are in neither; the original code has one per 64 values in the tower (CLIP)
and one per 128 in the connector.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uhd_jax.config import (
    ChatConfig,
    CompressorConfig,
    ConnectorConfig,
    ModelConfig,
    PreResizeConfig,
    PyramidConfig,
    SlicingConfig,
    TowerConfig,
)
from uhd_jax.config.presets import QWEN2_CHAT, VICUNA_CHAT
from uhd_jax.convert import decoder_families
from uhd_jax.convert.decoder_families import text_dropped
from uhd_jax.convert.decoders import decoder_table, text_config
from uhd_jax.convert.family import Dropped, Family, Shapes, count_of, dtype_of, settings, shape_of
from uhd_jax.convert.files import token_ids, write_json, write_tokenizer
from uhd_jax.convert.hiwin import VISION_COPY, hiwin_dropped, hiwin_table
from uhd_jax.convert.resampler import attention_table, resampler_table
from uhd_jax.convert.tables import ConvertError, Entry
from uhd_jax.convert.towers import BUFFER, clip_shapes, clip_tower_table

if TYPE_CHECKING:
    from uhd_jax.convert.source import Source

__all__ = ["LLAVA_FAMILIES", "attention_table", "resampler_table"]

TOWER = "model.vision_tower.vision_tower.vision_model."
PROJECTOR = "model.mm_projector."
PARTS = ("tower", "connector", "decoder")
TEXT_KINDS = {"llava_llama": "llama", "llava": "llama", "llava_qwen": "qwen2"}
V1_PROJECTORS = ("adapt_spatial_resampler", "adapt_spatial_resampler_v1")
# The two states of v2's code, by the name they give its mode (spec v1-v2 section 4.3).
LAYOUTS = {"featup_muti_res": "B", "uhd_v2": "A"}
QUERY_SUFFIX = {8: "_64", 12: "", 16: "_256"}  # of the projector's type, by the side of the query grid


def _mode(config: Mapping[str, Any]) -> str | None:
    """v2's mode; v1 has none."""
    return config.get("feature_mode") or config.get("model_mode") or None


def _is_v1(source: Source) -> bool:
    config = settings(source)
    known = config.get("model_type") in TEXT_KINDS and config.get("mm_projector_type") in V1_PROJECTORS
    return known and _mode(config) in (None, "uhd_v1")


def _is_v2(source: Source) -> bool:
    config = settings(source)
    projector = str(config.get("mm_projector_type"))
    known = config.get("model_type") in TEXT_KINDS and projector.startswith("adapt_spatial_resampler")
    return known and _mode(config) in LAYOUTS


def _tower(config: Mapping[str, Any], source: Source) -> TowerConfig:
    if "siglip" in str(config.get("mm_vision_tower", "")).lower():
        raise ConvertError(
            f"{source.folder / 'config.json'}: mm_vision_tower {config['mm_vision_tower']!r}; only CLIP is known in "
            "LLaVA-UHD v1 and v2"
        )
    width = shape_of(source, f"{TOWER}embeddings.class_embedding")[0]
    layers, select = count_of(source, f"{TOWER}encoder.layers."), config.get("mm_vision_select_layer", -2)
    if not -layers <= select <= -1:
        raise ConvertError(
            f"{source.folder / 'config.json'}: mm_vision_select_layer: {select} is not from {-layers} to -1, the "
            f"outputs of the tower's {layers} layers counted from the last"
        )
    return TowerConfig(
        kind="clip",
        width=width,
        mlp_width=shape_of(source, f"{TOWER}encoder.layers.0.mlp.fc1.weight")[0],
        layers=layers,
        heads=max(1, width // 64),
        patch_size=shape_of(source, f"{TOWER}embeddings.patch_embedding.weight")[-1],
        table_side=math.isqrt(shape_of(source, f"{TOWER}embeddings.position_embedding.weight")[0] - 1),
        norm_eps=1e-5,
        skipped_layers=-1 - select,
    )


def _config(source: Source, version: int) -> ModelConfig:
    config = settings(source)
    if config.get("mm_use_im_start_end"):
        raise ConvertError(f"{source.folder / 'config.json'}: mm_use_im_start_end is true, which is not supported")
    kind = TEXT_KINDS[config["model_type"]]
    decoder = decoder_families.config_of(source, dict(config) | {"model_type": kind})
    tower = _tower(config, source)
    dtype = dtype_of(config)
    heads = 0 if decoder.width % 128 == 0 else 1
    old = "feature_mode" in config
    if version == 1:
        side = math.isqrt(shape_of(source, f"{PROJECTOR}query")[0])
        connector = ConnectorConfig("spatial_resampler", query_side=side, heads=heads)
        layout = "A"
    else:
        connector = ConnectorConfig(
            "hiwin",
            query_side=math.isqrt(shape_of(source, f"{PROJECTOR}query_1")[0]),
            heads=heads,
            pyramid=PyramidConfig(config.get("feature_scale_mask", 7)),
            box_dtype=dtype,
        )
        layout = LAYOUTS[_mode(config)]
    chat = QWEN2_CHAT if kind == "qwen2" else VICUNA_CHAT
    return ModelConfig(
        decoder=decoder,
        tower=tower,
        compressor=CompressorConfig("none"),
        connector=connector,
        # As the original evaluates (spec v1-v2 section 1.4).
        slicing=SlicingConfig(
            rule="v1",
            scale_resolution=tower.table_side * tower.patch_size,
            max_slices=7 if version == 1 else 9,
            pre_resize=PreResizeConfig(long_side=1024, only_enlarge=version == 2 and old),
        ),
        chat=ChatConfig(**chat, layout=layout, tokenizer=str(source.folder)),
        dtype=dtype,
    )


def _table(config: ModelConfig) -> list[Entry]:
    hiwin = config.connector.kind == "hiwin"
    connector = hiwin_table(config.connector, PROJECTOR) if hiwin else resampler_table(PROJECTOR)
    decoder = decoder_table(config.decoder, "model.", "lm_head.weight")
    return clip_tower_table(config.tower, TOWER) + connector + decoder


def _unused(config: ModelConfig) -> Shapes:
    """What v2's projector holds and never reads: single tensors, and the second CLIP."""
    tower = config.tower
    copy = clip_shapes(tower, f"{PROJECTOR}{VISION_COPY}vision_tower.vision_model.")
    return hiwin_dropped(config.connector, config.decoder.width, tower.width, PROJECTOR) | copy


def _dropped(config: ModelConfig) -> tuple[Dropped, ...]:
    dropped = (*text_dropped(config.decoder, "lm_head.weight"), BUFFER)
    if config.connector.kind != "hiwin":
        return dropped
    single = hiwin_dropped(config.connector, config.decoder.width, config.tower.width, PROJECTOR)
    reason = "in v2's projector, but never read: of another mode, or of a level that the mask leaves out"
    copy = "a second CLIP inside the projector, overwritten in part by its initialisation and never run"
    return (
        *dropped,
        *(Dropped(re.escape(name), reason) for name in single),
        Dropped(re.escape(PROJECTOR + VISION_COPY) + ".*", copy),
    )


def _require_v1_v2(config: ModelConfig, kind: str) -> None:
    """Refuses a model that the original code cannot run."""
    connector, text = config.connector, text_config(config.decoder)["model_type"]
    wanted: dict[str, tuple[Any, Any]] = {
        "tower.kind": (config.tower.kind, "clip"),
        "tower.heads": (config.tower.heads, max(1, config.tower.width // 64)),
        "compressor.kind": (config.compressor.kind, "none"),
        "connector.kind": (connector.kind, kind),
        "connector.heads": (config.connector_heads, max(1, config.decoder.width // 128)),
    }
    if kind == "spatial_resampler":
        wanted["chat.layout"] = (config.chat.layout, "A")
    if config.chat.layout == "B" or kind == "spatial_resampler":
        wanted["connector.query_side"] = (connector.query_side, 12)
    if kind == "hiwin":
        wanted |= {
            "connector.query_sets": (connector.query_sets, 4),
            "connector.bins": (connector.bins, "selective"),
            "connector.pyramid.upsampling": (connector.pyramid.upsampling, "vdim"),
        }
    for key, (found, value) in wanted.items():
        if found != value:
            raise ConvertError(f"{key}: the layout needs {value!r}, the model has {found!r}")
    if text not in ("llama", "qwen2"):
        raise ConvertError(f"decoder: LLaVA-UHD v1 and v2 have a Llama or Qwen2, the model a {text}")
    if connector.query_side not in QUERY_SUFFIX:
        raise ConvertError(
            f"connector.query_side: the layout has {sorted(QUERY_SUFFIX)}, the model {connector.query_side}"
        )


def _write(config: ModelConfig, tokenizer: Path | None, folder: Path, version: int) -> None:
    """config.json, generation_config.json and the tokenizer of v1 or v2."""
    _require_v1_v2(config, "spatial_resampler" if version == 1 else "hiwin")
    text = text_config(config.decoder)
    kind = text.pop("model_type")
    rope = text.pop("rope_parameters")
    name = {"llama": "Llama", "qwen2": "Qwen"}[kind]
    fields = {"max_position_embeddings": {"llama": 4096, "qwen2": 32_768}[kind]} | text
    fields |= {
        "architectures": [f"Llava{name}ForCausalLM"],
        "model_type": f"llava_{name.lower()}",
        "rope_theta": rope["rope_theta"],
        "tokenizer_model_max_length": 2048 * version,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_hidden_size": config.tower.width,
        "mm_vision_select_layer": -1 - config.tower.skipped_layers,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "adapt_spatial_resampler",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
        "torch_dtype": config.dtype,
        **token_ids(tokenizer, config),
    }
    if version == 2:
        mask = {"feature_scale_mask": config.connector.pyramid.feature_scale_mask}
        if config.chat.layout == "B":
            fields |= mask | {"feature_mode": "featup_muti_res"}
        else:
            suffix = QUERY_SUFFIX[config.connector.query_side]
            fields |= mask | {"model_mode": "uhd_v2", "mm_projector_type": f"adapt_spatial_resampler_v2{suffix}"}
            fields["mm_tunable_parts"] = "mm_vision_tower,mm_mlp_adapter,mm_language_model"
    write_json(folder / "config.json", fields)
    write_json(folder / "generation_config.json", {"do_sample": False, **token_ids(tokenizer, config)})
    write_tokenizer(tokenizer, config, folder)


LLAVA_FAMILIES: tuple[Family, ...] = (
    Family(
        name="llava_uhd_v1",
        parts=PARTS,
        recognise=_is_v1,
        config=lambda source: _config(source, 1),
        table=_table,
        dropped=_dropped,
        write_files=lambda config, tokenizer, folder: _write(config, tokenizer, folder, 1),
    ),
    Family(
        name="llava_uhd_v2",
        parts=PARTS,
        recognise=_is_v2,
        config=lambda source: _config(source, 2),
        table=_table,
        dropped=_dropped,
        write_files=lambda config, tokenizer, folder: _write(config, tokenizer, folder, 2),
        filled=_unused,
    ),
)
