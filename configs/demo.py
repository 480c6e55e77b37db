"""A tiny LLaVA-UHD v4 that learns to read pages of handwritten digits, from random weights, on two CPU cores.

    uhd-jax train --config=configs/demo.py --workdir=runs/demo
    uhd-jax train --config=configs/demo.py:thumbnail --workdir=runs/demo_thumbnail   # control: never sees a slice

Should reach 0.97 of the digits on held-out pages, where the control stays at chance.

The four stages follow the recipe's order (small images, then views, then sliced pages, then instructions), but every
stage trains everything: the recipe's stage 1 can freeze tower and decoder because they come pre-trained, these do not.
"""

from ml_collections import ConfigDict

EVERYTHING = ("tower", "patch_embedding", "position_table", "compressor", "connector", "decoder")
WORDS = ("user\n", "assistant\n", "Transcribe.", "What is in row ", "What is in column ", ", column ")
WORDS += ("How many ", "s?")


def get_config(arg: str = "") -> ConfigDict:
    """The demo; with "thumbnail", the same training on thumbnails alone."""
    if arg not in ("", "thumbnail"):
        raise ValueError(f"unknown argument {arg!r}; known: thumbnail")
    max_slices, slots = (1, 4) if arg == "thumbnail" else (9, 14)
    pages = {
        "packed_length": 192,
        "rows": 8,
        "max_slices": max_slices,
        "buckets": [{"slots": slots, "tokens": 192, "patches": 64}],
    }
    stages = [
        _stage(
            "cells",
            {"task": "cell"},
            scale_resolution=56,
            steps=850,
            rows=32,
            packed_length=52,
            buckets=[{"slots": 4, "tokens": 52, "patches": 16}],
            learning_rate=8e-4,
            tower_learning_rate_factor=3.0,
            warmup_steps=60,
            max_slices=1,
        ),
        _stage(
            "views",
            {"task": "view"},
            steps=300,
            rows=16,
            packed_length=84,
            buckets=[{"slots": 4, "tokens": 84, "patches": 64}],
            learning_rate=1.2e-3,
            warmup_steps=20,
            max_slices=1,
        ),
        _stage("pages", {"task": "page"}, steps=560, learning_rate=1.2e-3, warmup_steps=20, **pages),
        _stage(
            "questions",
            {"task": "mixed", "questions_per_page": 4, "questions_fraction": 0.5},
            steps=260,
            learning_rate=1.2e-3,
            warmup_steps=20,
            sample_weight_power=0.5,
            **pages | {"packed_length": 256, "buckets": [{"slots": slots, "tokens": 256, "patches": 64}]},
        ),
    ]
    return ConfigDict(
        {
            "name": "demo",
            "model": {
                "tower": {"width": 96, "mlp_width": 256, "layers": 4, "heads": 4, "table_side": 8},
                "compressor": {"after_layer": 1},
                "decoder": {
                    "vocab_size": 288,
                    "width": 96,
                    "mlp_width": 256,
                    "layers": 3,
                    "heads": 4,
                    "kv_heads": 4,
                    "head_dim": 24,
                    "rope_theta": 1000.0,
                    "qk_norm": True,
                },
                "slicing": {"scale_resolution": 112, "max_slices": 9},
                "chat": {"use_image_id": False, "words": WORDS},
                "dtype": "float32",
                "scan_layers": False,  # so few and so small layers run faster unrolled
                "tower_remat": "none",
                "decoder_remat": "none",
            },
            "train": {
                "stages": stages,
                "optimizer": {"b2": 0.9},  # from scratch: forgets the first steps' large gradients ten times sooner
                "checkpoint_every": 100,
                "log_every": 10,
            },
        }
    )


def _stage(name: str, options: dict, **values) -> dict:
    stage = {"name": name, "data": {"source": "digit_pages", "options": options}, "trainable": EVERYTHING}
    rate = values["learning_rate"]
    return stage | {"schedule": "cosine", "learning_rate_min": rate / 20} | values
