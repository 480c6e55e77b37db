"""The published towers and decoders of the family, as mappings for `configs/*.py` and for `TowerConfig(**PRESET)`.

Sources: spec v1-v2 sections 2.1 and 6.4, spec v4 sections 2.1 and 4.4, spec moonvit section 1.
"""

from __future__ import annotations

from typing import Any

CLIP_L_14_336: dict[str, Any] = {
    "kind": "clip",
    "width": 1024,
    "mlp_width": 4096,
    "layers": 24,
    "heads": 16,
    "patch_size": 14,
    "table_side": 24,
    "norm_eps": 1e-5,
    "skipped_layers": 1,
}

SIGLIP2_SO400M: dict[str, Any] = {
    "kind": "siglip2",
    "width": 1152,
    "mlp_width": 4304,
    "layers": 27,
    "heads": 16,
    "patch_size": 14,
    "table_side": 70,
    "norm_eps": 1e-6,
}

MOONVIT_SO400M: dict[str, Any] = SIGLIP2_SO400M | {"kind": "moonvit", "table_side": 64, "norm_eps": 1e-5}

VICUNA_7B: dict[str, Any] = {  # v1.5
    "vocab_size": 32_000,
    "width": 4096,
    "mlp_width": 11_008,
    "layers": 32,
    "heads": 32,
    "kv_heads": 32,
    "head_dim": 128,
    "rope_theta": 1e4,
    "norm_eps": 1e-5,
}

VICUNA_13B: dict[str, Any] = VICUNA_7B | {
    "width": 5120,
    "mlp_width": 13_824,
    "layers": 40,
    "heads": 40,
    "kv_heads": 40,
}

QWEN2_7B: dict[str, Any] = {
    "vocab_size": 152_064,
    "width": 3584,
    "mlp_width": 18_944,
    "layers": 28,
    "heads": 28,
    "kv_heads": 4,
    "head_dim": 128,
    "rope_theta": 1e6,
    "norm_eps": 1e-6,
    "qkv_bias": True,
}

QWEN3_8B: dict[str, Any] = {
    "vocab_size": 151_936,
    "width": 4096,
    "mlp_width": 12_288,
    "layers": 36,
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "rope_theta": 1e6,
    "norm_eps": 1e-6,
    "qk_norm": True,
}

QWEN35_0_8B: dict[str, Any] = {  # of MiniCPM-V 4.6
    "vocab_size": 248_094,
    "width": 1024,
    "mlp_width": 3584,
    "layers": 24,
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 256,
    "rope_theta": 1e7,
    "norm_eps": 1e-6,
    "qk_norm": True,
    "tied_head": True,
    "rotary_dim": 64,
    "mrope_sections": (11, 11, 10),
    "gated_attention": True,
    "zero_centred_norm": True,
    "full_attention_interval": 4,
    "delta_key_heads": 16,
    "delta_value_heads": 16,
    "delta_key_dim": 128,
    "delta_value_dim": 128,
}

# Prompts (spec v1-v2 sections 4.1 and 4.3). Separators are the Llama ids of "," and newline, which the released Qwen2
# model was trained with as well, although they mean other things there.
VICUNA_CHAT: dict[str, Any] = {
    "template": "vicuna_v1",
    "bos": "<s>",
    "turn_end": "</s>",
    "placeholder": "<unk>",
    "padding": "<unk>",
    "separator_ids": (29892, 13),
    "images_first": True,
    "system": "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
}

QWEN2_CHAT: dict[str, Any] = {
    "template": "chatml",
    "placeholder": "<|endoftext|>",
    "padding": "<|endoftext|>",
    "separator_ids": (29892, 13),
    "images_first": True,
    "train_turn_marks": True,
    "system": "You are a helpful assistant.",
}
