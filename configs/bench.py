"""The v4 model made small enough to time on a few CPU cores: its proportions, fewer and narrower layers, float32.

  uhd-jax bench --config=configs/bench.py --parts=tower,connector,decoder --against=torch

A third of the tower's width and a quarter of its layers, with the compressor after the second; an eighth of Qwen3-8B's
width and a twelfth of its layers. Not a model to train.
"""

from ml_collections import ConfigDict

EVERYTHING = ("tower", "patch_embedding", "position_table", "compressor", "connector", "decoder")


def get_config() -> ConfigDict:
    """The run."""
    stage = {
        "name": "bench",
        "data": {"source": "digit_pages", "options": {"task": "page"}},
        "trainable": EVERYTHING,
        "steps": 1,
        "rows": 1,
        "packed_length": 512,
        "buckets": [{"slots": 4, "tokens": 512, "patches": 256}],
        "learning_rate": 1e-5,
        "learning_rate_min": 0.0,
    }
    return ConfigDict(
        {
            "name": "bench",
            "model": {
                "tower": {"width": 384, "mlp_width": 1434, "layers": 6, "heads": 6, "table_side": 16},
                "compressor": {"after_layer": 1},
                "decoder": {
                    "vocab_size": 4096,
                    "width": 512,
                    "mlp_width": 1536,
                    "layers": 3,
                    "heads": 8,
                    "kv_heads": 2,
                    "head_dim": 64,
                    "qk_norm": True,
                },
                "dtype": "float32",
                "tower_remat": "none",
                "decoder_remat": "none",
            },
            "train": {"stages": [stage]},
        }
    )
