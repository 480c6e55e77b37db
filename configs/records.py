"""A tiny LLaVA-UHD v4 on images and conversations of your own, from random weights, on two CPU cores.

    uhd-jax train --config=configs/records.py:data/train.jsonl --workdir=runs/records

After the colon stands a file of records, one JSON object per line; README.md describes them. With a handful of records
the model learns them by heart, which shows that data, training and answers fit together. For answers about images it
has never seen, start from a trained model instead: `configs/uhd_v4.py`.
"""

from ml_collections import ConfigDict

from uhd_jax.config import ConfigError

EVERYTHING = ("tower", "patch_embedding", "position_table", "compressor", "connector", "decoder")
MAX_SLICES = 4  # in training and in answering: a model from scratch makes nothing of finer grids than it was shown


def get_config(path: str = "") -> ConfigDict:
    """The run on the records of a JSONL file."""
    if not path:
        raise ConfigError("name the file with the records after a colon: --config=configs/records.py:data/train.jsonl")
    stage = {
        "name": "records",
        "data": {"source": "records", "options": {"path": path}},
        "trainable": EVERYTHING,
        "steps": 200,
        "rows": 4,
        "packed_length": 512,  # tokens, here bytes; a longer sample is left out and counted in the log
        "slots": 12,  # views per row
        "max_slices": MAX_SLICES,
        "learning_rate": 1e-3,
        "learning_rate_min": 1e-4,
        "warmup_steps": 20,
        "schedule": "cosine",
    }
    return ConfigDict(
        {
            "name": "records",
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
                "slicing": {"scale_resolution": 112, "max_slices": MAX_SLICES},
                "dtype": "float32",
                "tower_remat": "none",
                "decoder_remat": "none",
            },
            "train": {"stages": [stage], "optimizer": {"b2": 0.9}, "checkpoint_every": 100},
        }
    )
