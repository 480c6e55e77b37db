"""Towers alone: CLIP, SigLIP and SigLIP 2 in transformers' layouts, MoonViT as released and inside Kimi-VL."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uhd_jax.config import CompressorConfig, ConnectorConfig, ModelConfig, TowerConfig
from uhd_jax.convert import minicpmv
from uhd_jax.convert.family import NO_DECODER, Dropped, Family, dtype_of, field, settings
from uhd_jax.convert.files import write_json
from uhd_jax.convert.tables import PATCH_CONVOLUTION, ConvertError, Entry, Rule, dense, joined_dense, layer_norm

if TYPE_CHECKING:
    from uhd_jax.convert.source import Source

# What transformers takes for keys that a `vision_config` inside a larger config.json leaves out.
_COMMON = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": _COMMON | {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip": _COMMON | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    "siglip2": _COMMON
    | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "num_patches": 256},
}
BUFFER = Dropped(r"(.*\.)?embeddings\.position_ids", "a constant: the numbers from 0 up")


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


def clip_shapes(config: TowerConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of CLIP's vision model under `prefix`."""
    width, mlp = (config.width,), (config.mlp_width,)
    norms = [f"{prefix}{name}" for name in ("pre_layrnorm", "post_layernorm")]
    linears = {}
    for number in range(config.layers):
        layer = f"{prefix}encoder.layers.{number}."
        norms += [f"{layer}layer_norm1", f"{layer}layer_norm2"]
        linears |= {f"{layer}self_attn.{name}_proj": width + width for name in ("q", "k", "v", "out")}
        linears |= {f"{layer}mlp.fc1": mlp + width, f"{layer}mlp.fc2": width + mlp}
    shapes = {
        f"{prefix}embeddings.class_embedding": width,
        f"{prefix}embeddings.patch_embedding.weight": (*width, 3, config.patch_size, config.patch_size),
        f"{prefix}embeddings.position_embedding.weight": (1 + config.table_side**2, *width),
    }
    shapes |= {f"{name}.{part}": width for name in norms for part in ("weight", "bias")}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def naflex_tower_table(config: TowerConfig, prefix: str) -> list[Entry]:
    """SigLIP 2 of any aspect ratio (naflex) under `prefix`: a linear layer on patches laid out (y, x, channel)."""
    side = config.patch_size
    pixels = Rule(
        lambda a: a.reshape(-1, side, side, 3).transpose(3, 1, 2, 0).reshape(3 * side * side, -1),
        lambda a, _: a.reshape(3, side, side, -1).transpose(3, 1, 2, 0).reshape(-1, 3 * side * side),
        lambda shape: shape[::-1],
    )
    kernel = Entry("tower/patch_embedding/kernel", f"{prefix}embeddings.patch_embedding.weight", pixels)
    return [kernel if entry.ours == kernel.ours else entry for entry in minicpmv.tower_table(config, prefix)]


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


def tower_alone(tower: TowerConfig, dtype: str) -> ModelConfig:
    """A model of which only the tower is there."""
    return ModelConfig(
        decoder=NO_DECODER,
        tower=tower,
        compressor=CompressorConfig("none"),
        connector=ConnectorConfig("mlp"),
        mode="4x",
        dtype=dtype,
    )


def _vision_config(kind: str, source: Source) -> Mapping[str, Any]:
    config = settings(source)
    vision = _DEFAULTS[kind] | dict(config.get("vision_config", config))
    expected = _DEFAULTS[kind]["hidden_act"]
    if vision["hidden_act"] != expected:
        raise ConvertError(
            f"{source.folder / 'config.json'}: hidden_act {vision['hidden_act']!r}; only {kind} towers with "
            f"{expected!r} are known"
        )
    return vision


def _transformers_config(kind: str, source: Source) -> ModelConfig:
    """Config of a CLIP, SigLIP or SigLIP 2 checkpoint."""
    vision = _vision_config(kind, source)
    tower = minicpmv.tower_config(vision)
    if kind == "clip":
        tower = dataclasses.replace(tower, kind="clip", skipped_layers=1)
    elif kind == "siglip2":
        side = round(vision["num_patches"] ** 0.5)
        if side * side != vision["num_patches"]:
            raise ConvertError(
                f"{source.folder / 'config.json'}: num_patches {vision['num_patches']} is no square number"
            )
        tower = dataclasses.replace(tower, table_side=side)
    return tower_alone(tower, dtype_of(settings(source)))


def _moonvit_config(source: Source) -> ModelConfig:
    config = settings(source)
    vision = config.get("vision_config", config)
    return tower_alone(
        TowerConfig(
            kind="moonvit",
            width=field(vision, "hidden_size", source),
            mlp_width=field(vision, "intermediate_size", source),
            layers=field(vision, "num_hidden_layers", source),
            heads=field(vision, "num_attention_heads", source),
            patch_size=field(vision, "patch_size", source),
            table_side=field(vision, "init_pos_emb_height", source),
            table_cols=field(vision, "init_pos_emb_width", source),
            norm_eps=1e-5,
        ),
        dtype_of(config),
    )


def _is(source: Source, types: tuple[str, ...], prefix: str, first: str) -> bool:
    return settings(source).get("model_type") in types and prefix + first in source.tensors


def _write(kind: str, config: ModelConfig, tokenizer: Path | None, folder: Path) -> None:
    """config.json of a tower alone; it has no tokenizer."""
    tower = config.tower
    fields: dict[str, Any] = {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "patch_size": tower.patch_size,
    }
    if kind == "moonvit":
        rows, cols = tower.table_shape
        fields |= {"architectures": ["MoonVitPretrainedModel"], "model_type": "moonvit"}
        fields |= {"init_pos_emb_height": rows, "init_pos_emb_width": cols, "merge_kernel_size": [2, 2]}
    else:
        name = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}[kind]
        fields |= {"architectures": [f"{name}VisionModel"], "model_type": f"{kind}_vision_model"}
        fields |= {"num_channels": 3, "layer_norm_eps": tower.norm_eps, "hidden_act": _DEFAULTS[kind]["hidden_act"]}
        if kind == "siglip2":
            fields["num_patches"] = tower.table_side**2
        else:
            fields["image_size"] = tower.table_side * tower.patch_size
        if kind != "clip":
            fields["vision_use_head"] = False  # the pooling head, which features do not go through
    write_json(folder / "config.json", fields | {"torch_dtype": config.dtype})


def _family(kind: str, table: Any, prefix: str, name: str, export: bool) -> Family:
    """CLIP, SigLIP or SigLIP 2, of whose layouts transformers has two: 4 writes the prefix, 5 no longer does."""

    dropped = (
        BUFFER,
        Dropped(r"text_model\..*", "the text tower"),
        Dropped(r"(visual|text)_projection\.weight|logit_(scale|bias)", "of the contrast of images with texts"),
        Dropped(re.escape(prefix) + r"head\..*", "the pooling head: features are taken before it"),
    )
    return Family(
        name=name,
        parts=("tower",),
        recognise=lambda source: _is(
            source, (kind, f"{kind}_vision_model"), prefix, "embeddings.patch_embedding.weight"
        ),
        config=functools.partial(_transformers_config, kind),
        table=lambda config: table(config.tower, prefix),
        dropped=lambda config: dropped,
        write_files=functools.partial(_write, kind) if export else None,
    )


def _moonvit_family(prefix: str, name: str, export: bool) -> Family:
    inside = (
        Dropped(r"language_model\..*", "the language model of Kimi-VL"),
        Dropped(r"multi_modal_projector\..*", "the projector of Kimi-VL"),
    )
    return Family(
        name=name,
        parts=("tower",),
        recognise=lambda source: _is(source, ("moonvit", "kimi_vl"), prefix, "patch_embed.proj.weight"),
        config=_moonvit_config,
        table=lambda config: moonvit_table(config.tower, prefix),
        dropped=lambda config: inside if prefix else (),
        write_files=functools.partial(_write, "moonvit") if export else None,
    )


_TABLES = {"clip": clip_tower_table, "siglip": minicpmv.tower_table, "siglip2": naflex_tower_table}
TOWER_FAMILIES: tuple[Family, ...] = (
    *(_family(kind, table, "vision_model.", kind, True) for kind, table in _TABLES.items()),
    *(_family(kind, table, "", f"{kind}_bare", False) for kind, table in _TABLES.items()),
    _moonvit_family("", "moonvit", True),
    _moonvit_family("vision_tower.", "moonvit_in_kimi_vl", False),
)
