"""MiniCPM-V 4.6 in full size (1.3 billion parameters): SigLIP 2 so400m with the compressor, Qwen3.5-0.8B; one stage.

  uhd-jax convert import MiniCPM-V-4.6 weights/minicpm_v_4_6
  uhd-jax train --config=configs/minicpm_v_4_6.py --workdir=runs/minicpm_v_4_6 \
      --config.train.init_from=weights/minicpm_v_4_6 --config.model.chat.tokenizer=weights/minicpm_v_4_6/tokenizer

Fine-tunes the released model on images and conversations of your own, in the numbers of v4's last stage, whose recipe
4.6's is not published beyond. After the colon stand options, joined by commas:

  data=FILE.jsonl     the records (default data/train.jsonl)
  rows=N              packed rows of one step over all devices (default 8); one per device is the published layout of v4
  steps=N             optimiser steps (default 1000)

One accelerator with 80 GB trains a row at a time; see docs/pods.md for slices. It has not been run at full size.
"""

from ml_collections import ConfigDict

from uhd_jax.config import ConfigError
from uhd_jax.config.presets import QWEN35_0_8B

EVERYTHING = ("tower", "patch_embedding", "position_table", "compressor", "connector", "decoder")


def get_config(arg: str = "") -> ConfigDict:
    """The run; `arg` as described above."""
    options = {"data": "data/train.jsonl", "rows": "8", "steps": "1000"}
    for item in filter(None, arg.split(",")):
        key, equals, value = item.partition("=")
        if not equals or key not in options:
            raise ConfigError(f"option {item!r} is not one of {'=, '.join(options)}=")
        options[key] = value
    stage = {
        "name": "finetune",
        "data": {"source": "records", "options": {"path": options["data"]}},
        "trainable": EVERYTHING,
        "steps": int(options["steps"]),
        "rows": int(options["rows"]),
        "packed_length": 4900,
        "max_slices": 9,
        "learning_rate": 1e-5,
        "learning_rate_min": 1e-6,
        "warmup_steps": max(1, int(options["steps"]) // 10),
        "schedule": "timm_cosine",
    }
    return ConfigDict(
        {
            "name": "minicpm_v_4_6",
            "model": {"decoder": QWEN35_0_8B},
            "train": {"stages": [stage], "mesh": {"data": 1, "fsdp": -1, "tensor": 1}},
        }
    )
