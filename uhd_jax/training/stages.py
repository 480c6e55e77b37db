"""The parts a stage may train, the four-stage recipe of LLaVA-UHD v4, and the longest input of what is trained.

Source: LLaVA-UHD v4 (arXiv 2605.08985) Tables A7 and A8, and the released training scripts (spec v4 section 1.10).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from uhd_jax.config import PARTS, ConfigError, RunConfig

PART_PATTERNS: dict[str, str] = {
    "patch_embedding": r"tower/patch_embedding/.+",
    "position_table": r"tower/position_table",
    "tower": r"tower/(class_token|(pre_norm|layers|final_norm)/.+)",
    "compressor": r"tower/compressor/.+",
    "connector": r"connector/(?!position_table|upsampler/).+",
    "connector_positions": r"connector/position_table",
    "upsampler": r"connector/upsampler/(?!fixup/).+",
    "upsampler_fixup": r"connector/upsampler/fixup/.+",
    "decoder": r"decoder/.+",
}

SCAFFOLD = "scaffold"  # what only training needs: beside the model's parameters, in no part to choose, always trained

# The parts the scripts' vision learning rate applies to. The compressor is not among them: the scripts keep it beside
# the connector, under the connector's flag.
TOWER_PARTS = ("tower", "patch_embedding", "position_table")


def part_of(path: str) -> str:
    """The part (one of `config.PARTS`, or `SCAFFOLD`) to which the parameter at `path` belongs.

    Raises:
      ValueError: no part, or more than one.
    """
    if path.startswith(f"{SCAFFOLD}/"):
        return SCAFFOLD
    found = [part for part, pattern in PART_PATTERNS.items() if re.fullmatch(pattern, path)]
    if len(found) != 1:
        raise ValueError(f"parameter {path!r} belongs to {len(found)} parts instead of one")
    return found[0]


def split_params(params: Mapping[str, Any], trainable: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a parameter tree (of any leaves) into the trees of trainable and of frozen parameters.

    The scaffold, where there is one, is trainable.

    Raises:
      ConfigError: the model has none of the trainable parts.
    """
    flat = flatten_dict(params, sep="/")
    parts = {path: part_of(path) for path in flat}
    if not set(parts.values()) & set(trainable):
        raise ConfigError(f"trainable: this model has no parameters in the parts {tuple(trainable)}")
    chosen = {path: leaf for path, leaf in flat.items() if parts[path] in (*trainable, SCAFFOLD)}
    frozen = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return unflatten_dict(chosen, sep="/"), unflatten_dict(frozen, sep="/")


def merge_params(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `split_params`."""
    return unflatten_dict(flatten_dict(frozen, sep="/") | flatten_dict(trainable, sep="/"), sep="/")


# What the paper's tables do not say (steps, warm-up, lengths, slice limits, tower factor) is the scripts'.
_SHARED: tuple[dict[str, Any], ...] = (
    {
        "name": "stage1",
        "steps": 2000,
        "warmup_steps": 1000,
        "packed_length": 1700,
        "max_slices": 1,
        "learning_rate": 1e-4,
        "learning_rate_min": 5e-5,
    },
    {
        "name": "stage2",
        "steps": 10_000,
        "warmup_steps": 1000,
        "packed_length": 8192,
        "max_slices": 9,
        "learning_rate": 1e-5,
        "learning_rate_min": 5e-6,
        "tower_learning_rate_factor": 0.2,
    },
    {
        "name": "stage3",
        "steps": 5000,
        "warmup_steps": 500,
        "packed_length": 10_240,
        "max_slices": 9,
        "learning_rate": 5e-5,
        "learning_rate_min": 1e-5,
        "tower_learning_rate_factor": 0.2,
        "augment": {"ocr_probability": 0.7},
    },
    {
        "name": "stage4",
        "steps": 10_000,
        "warmup_steps": 1000,
        "packed_length": 4900,
        "max_slices": 9,
        "learning_rate": 1e-5,
        "learning_rate_min": 1e-6,
        "sample_weight_power": 0.5,
        "augment": {"resize_probability": 0.5, "jpeg_probability": 0.2, "ocr_probability": 0.7},
    },
)

# In all stages. The scripts drop samples with images of more extreme sides; the number of programs is ours.
_IMAGES: dict[str, Any] = {"max_aspect_ratio": 10.0, "bucket_budget": 4}

# The scripts' "75 to 95" goes to a library in which it is the strength of the compression, not the quality.
_SCRIPT_JPEG = (6, 26)

_VIT = ("tower", "patch_embedding", "position_table", "compressor")
_SCRIPT_ALL = ("tower", "position_table", "compressor", "connector", "decoder")

# Table A7 says stage 1 trains "ViT / Connector", the paper's text "projector and D"; the table is followed here, and
# the scripts (connector, compressor and the position table, which they train in every stage) are the third variant.
# They leave the patch embedding frozen unless a flag of its own is given.
RECIPES: dict[str, tuple[tuple[str, ...], ...]] = {
    "in_house": ((*_VIT, "connector"), _VIT, PARTS, PARTS),
    "onevision": ((*_VIT, "connector"), PARTS, PARTS, PARTS),
    "released_script": (("connector", "compressor", "position_table"), _SCRIPT_ALL, _SCRIPT_ALL, _SCRIPT_ALL),
}


def recipe(name: str, data: Sequence[Mapping[str, Any]], rows: int, step_scale: float = 1.0) -> list[dict[str, Any]]:
    """The four stages as mappings that `StageConfig` is built from.

    Args:
      name: "in_house" (Table A7), "onevision" (Table A8) or "released_script".
      data: the four stages' data, as mappings that `DataConfig` is built from.
      rows: packed rows of one step over all devices. The published batch sizes count samples packed on one GPU, and the
        number of GPUs is not published, so this is the user's to choose; one row per device is the published layout.
      step_scale: multiplies steps and warm-up, as the scripts do to go from 4M to 64M samples.

    Raises:
      ConfigError: an unknown name, or not four data mappings.
    """
    if name not in RECIPES:
        raise ConfigError(f"recipe: {name!r} is not one of {tuple(RECIPES)}")
    if len(data) != len(_SHARED):
        raise ConfigError(f"recipe: data for {len(data)} stages given, the recipe has {len(_SHARED)}")
    return [
        {
            **stage,
            **_IMAGES,
            "augment": stage.get("augment", {}) | ({"jpeg_quality": _SCRIPT_JPEG} if name == "released_script" else {}),
            "steps": max(1, round(stage["steps"] * step_scale)),
            "warmup_steps": round(stage["warmup_steps"] * step_scale),
            "trainable": trainable,
            "schedule": "timm_cosine",
            "data": dict(source),
            "rows": rows,
        }
        for stage, trainable, source in zip(_SHARED, RECIPES[name], data, strict=True)
    ]


def llava_recipe(
    data: Sequence[Mapping[str, Any]],
    steps: Sequence[int],
    learning_rates: Sequence[float],
    packed_lengths: Sequence[int],
    max_slices: int,
    trainable: Sequence[Sequence[str]],
    slots: int,
    template: str = "plain",
) -> list[dict[str, Any]]:
    """The two stages of LLaVA-UHD v1 and v2 as mappings that `StageConfig` is built from (spec v1-v2 section 5).

    Stage 1 reads captions of thumbnails, 256 rows of one sample each; stage 2 instructions about sliced images, 128
    rows. Both warm up for 3 % of their steps and follow a cosine to zero.

    Args:
      data: the two stages' data, as mappings that `DataConfig` is built from.
      steps: of the two stages, as the next ones.
      learning_rates: peaks.
      packed_lengths: tokens per row.
      max_slices: of stage 2.
      trainable: parts.
      slots: view slots per row of stage 2.
      template: prompt form of stage 1; empty for the model's own.
    """
    rows, of_stage = (256, 128), ({"max_slices": 1, "slots": 1, "template": template}, {"slots": slots})
    return [
        {
            "name": f"stage{number + 1}",
            "data": dict(data[number]),
            "steps": steps[number],
            "warmup_steps": -(-3 * steps[number] // 100),
            "rows": rows[number],
            "packed_length": packed_lengths[number],
            "learning_rate": learning_rates[number],
            "learning_rate_min": 0.0,
            "schedule": "cosine",
            "trainable": tuple(trainable[number]),
            "max_slices": max_slices,
            **of_stage[number],
        }
        for number in range(2)
    ]


def with_longest(config: RunConfig, known: int) -> RunConfig:
    """The config with its model's longest input, for exports: its own, else that of where the model comes from, else
    the longest row it is trained on."""
    model = config.model
    longest = model.decoder.max_positions or known or max(stage.packed_length for stage in config.train.stages)
    decoder = dataclasses.replace(model.decoder, max_positions=longest)
    return dataclasses.replace(config, model=dataclasses.replace(model, decoder=decoder))
