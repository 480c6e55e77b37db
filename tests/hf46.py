"""Tiny MiniCPM-V 4.6 checkpoints made with transformers' own classes, and their logits there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from golden_v4 import GOLDEN

from uhd_jax.analysis.verify import packed_pixels
from uhd_jax.config import ModelConfig
from uhd_jax.generation.assistant import Prepared

TOKENIZER = GOLDEN / "v4_full_qwen3_16x"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
VOCAB = 288
TEXT: dict[str, dict[str, Any]] = {
    "qwen3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3_5_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.25,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
}


def copy_tokenizer(folder: Path) -> Path:
    """The golden checkpoints' tokenizer alone, in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(TOKENIZER / name, folder / name)
    return folder


def make_checkpoint(
    folder: Path,
    text_type: str = "qwen3",
    *,
    tied: bool = False,
    insert: int = 1,
    mode: str = "16x",
    vision: dict[str, int] | None = None,
    processor: dict[str, Any] | None = None,
    **text: Any,
) -> Any:
    """Writes a checkpoint with random weights, every one of them away from its initial value; returns the model."""
    import torch
    from transformers import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration

    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 32 if text_type == "qwen3_5_text" else 16, "vocab_size": VOCAB}
    sizes |= {"eos_token_id": 256, "tie_word_embeddings": tied, "max_position_embeddings": 4096}
    tower = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 4}
    tower |= {"image_size": 98, "patch_size": 14} | (vision or {})
    config = MiniCPMV4_6Config(
        text_config={"model_type": text_type, **sizes, **TEXT[text_type], **text},
        vision_config=tower,
        insert_layer_id=insert,
        image_token_id=258,
        video_token_id=259,
        tie_word_embeddings=tied,
        downsample_mode=mode,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = MiniCPMV4_6ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    copy_tokenizer(folder)
    settings = json.loads((TOKENIZER / "preprocessor_config.json").read_text()) | {"downsample_mode": mode}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | (processor or {})))
    return model


def torch_inputs(prepared: Prepared, config: ModelConfig, mode: str | None = None) -> dict[str, Any]:
    """Our ids and patches as the arguments of transformers' model."""
    import torch

    views = [view for plan in prepared.plans for view in plan.views]
    inputs: dict[str, Any] = {"input_ids": torch.tensor(prepared.token_ids[None].astype(np.int64))}
    if views:
        grids = [view.patch_grid for view in views]
        inputs["pixel_values"] = torch.tensor(packed_pixels(prepared.views, grids, config.merge_levels(mode), config))
        inputs["target_sizes"] = torch.tensor(np.array(grids, np.int32))
    return inputs | {"downsample_mode": mode or config.mode}
