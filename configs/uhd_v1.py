"""LLaVA-UHD v1 in full size: CLIP-L/14-336 tower, resampler, Vicuna v1.5; two stages.

  uhd-jax train --config=configs/uhd_v1.py --workdir=runs/uhd_v1 \
      --config.train.init_from=DIR --config.model.chat.tokenizer=DIR/tokenizer

`init_from` is a saved model with the pretrained tower and language model; without it everything starts at random. After
the colon stand options, joined by commas:

  13b (default), 7b     the Vicuna
  eccv                  spatially constrained resampler, 144 visual tokens per view (default; the released weights)
  arxiv                 perceiver resampler, 64 visual tokens per view
  mlp                   ablation: LLaVA-1.5's projector, no compression
  fixed_2x2             ablation: every image cut into 2x2
  no_overview           ablation: no thumbnail beside the slices
  no_schema             ablation: no separators between the slices
  tune_tower            the tower is trained in stage 2 (the two versions of the paper draw opposite conclusions)
  stage1, stage2        only this stage; start it with train.init_from=WORKDIR of the stage before
  data=DIR              DIR/stage1.jsonl and stage2.jsonl hold the records (default: data)

Stage 1 sees thumbnails alone, one sample per row, 256 rows (LLaVA-Pretrain, 558K pairs, one epoch). In stage 2 short
samples share a row of 2,048 tokens, so fewer than the published 128 rows make 128 samples; 128 rows are kept here. For
8 accelerators with 80 GB; published: 8 A100, about 4 and 22 hours. This file has not been run at full size.
"""

from ml_collections import ConfigDict

from uhd_jax.config import ConfigError
from uhd_jax.config.presets import CLIP_L_14_336, VICUNA_7B, VICUNA_13B, VICUNA_CHAT
from uhd_jax.training.stages import llava_recipe

FLAGS = ("13b", "7b", "eccv", "arxiv", "mlp", "fixed_2x2", "no_overview", "no_schema", "tune_tower", "stage1", "stage2")
CONNECTORS = {
    "eccv": {"kind": "spatial_resampler", "query_side": 12},
    "arxiv": {"kind": "perceiver", "query_side": 8, "heads": 8},
    "mlp": {"kind": "mlp"},
}


def get_config(arg: str = "") -> ConfigDict:
    """The run; `arg` as described above."""
    flags, data = set(), "data"
    for item in filter(None, arg.split(",")):
        if item.startswith("data="):
            data = item.removeprefix("data=")
        elif item in FLAGS:
            flags.add(item)
        else:
            raise ConfigError(f"option {item!r} is not one of {', '.join(FLAGS)} or data=")
    connectors = flags & set(CONNECTORS) or {"eccv"}
    if len(connectors) > 1 or {"7b", "13b"} <= flags:
        raise ConfigError(f"options {', '.join(sorted(flags))} contradict each other")
    connector = connectors.pop()
    trained = ["connector", "connector_positions"] if connector != "mlp" else ["connector"]
    tower = ["tower", "patch_embedding", "position_table"] if "tune_tower" in flags else []
    stages = llava_recipe(
        [{"source": "records", "options": {"path": f"{data}/{name}.jsonl"}} for name in ("stage1", "stage2")],
        steps=(2181, 5196),  # one epoch of 558,128 and of 665,298 samples
        learning_rates=(1e-3, 2e-5),
        packed_lengths=(2048, 2048 if connector != "mlp" else 4608),  # mlp: seven views of 576 tokens, and text
        max_slices=7 if connector != "mlp" else 6,
        trainable=(trained, ["connector", "decoder", *tower]),  # the position table of the connector stays as it is
        slots=8 if "no_overview" not in flags else 7,
    )
    chosen = [stage for stage in stages if not flags & {"stage1", "stage2"} or stage["name"] in flags]
    return ConfigDict(
        {
            "name": "uhd_v1",
            "model": {
                "tower": CLIP_L_14_336,
                "compressor": {"kind": "none"},
                "connector": CONNECTORS[connector],
                "decoder": VICUNA_7B if "7b" in flags else VICUNA_13B,
                "slicing": {
                    "rule": "fixed_2x2" if "fixed_2x2" in flags else "v1",
                    "scale_resolution": 336,
                    "max_slices": 7,
                    "overview": "no_overview" not in flags,
                },
                "chat": {**VICUNA_CHAT, "layout": "A", "schema": "no_schema" not in flags},
            },
            "train": {
                "stages": chosen,
                "optimizer": {"b2": 0.999, "weight_decay": 0.0},
                "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
            },
        }
    )
