"""LLaVA-UHD v4 in full size: SigLIP 2 so400m tower, compressor after layer index 6, Qwen3-8B; the four-stage recipe.

  uhd-jax train --config=configs/uhd_v4.py:recipe=in_house --workdir=runs/uhd_v4 \
      --config.train.init_from=DIR --config.model.chat.tokenizer=DIR/tokenizer

`init_from` is a saved model with the pretrained tower and language model; without it everything starts at random. After
the colon stand options, joined by commas:

  recipe=in_house         Table A7 of the paper (default); onevision: Table A8; released_script: the authors' scripts
  tower=siglip2, moonvit  the tower (default siglip2); the paper's comparison of encodings also uses MoonViT
  encoding=slices, global a thumbnail and slices (default), or the whole image as one view
  compressor=KIND         inside the tower (default window_attention_reused_mlp; the others are the paper's ablation);
                          none: its post-ViT baseline, two merging rounds behind the tower
  stage1 ... stage4       only this stage; start it with train.init_from=WORKDIR of the stage before
  data=DIR                DIR/stage1.jsonl ... stage4.jsonl hold the records (default: data)
  rows=N                  packed rows of one step over all devices (default 64); one per device is the published layout
  step_scale=X            multiplies steps and warm-up: the scripts' way from 4M samples (1) to 64M (16)

For 64 accelerators (8.8 billion parameters, 105 GB of float32 parameters and moments over all devices when everything
is trained, 35 GB of gradients beside them in a step, and a row of up to 10,240 tokens with its views on each;
docs/pods.md says what fits where); other numbers with rows=N and --config.train.mesh.
The paper's models trained on 8M samples of its own, unreleased data average 70.7 over its eight benchmarks. This file
has not been run at full size.
"""

from ml_collections import ConfigDict

from uhd_jax.config import ConfigError
from uhd_jax.config.presets import MOONVIT_SO400M, QWEN3_8B, SIGLIP2_SO400M
from uhd_jax.training.stages import recipe

STAGES = ("stage1", "stage2", "stage3", "stage4")
TOWERS = {"siglip2": SIGLIP2_SO400M, "moonvit": MOONVIT_SO400M}


def get_config(arg: str = "") -> ConfigDict:
    """The run; `arg` as described above."""
    options = {"recipe": "in_house", "data": "data", "rows": "64", "step_scale": "1"}
    options |= {"tower": "siglip2", "encoding": "slices", "compressor": "window_attention_reused_mlp"}
    chosen = list(STAGES)
    for item in filter(None, arg.split(",")):
        key, equals, value = item.partition("=")
        if item in STAGES:
            chosen = [item]
        elif equals and key in options:
            options[key] = value
        else:
            raise ConfigError(f"option {item!r} is not one of {', '.join(STAGES)} or {'=, '.join(options)}=")
    if options["tower"] not in TOWERS:
        raise ConfigError(f"option tower={options['tower']} is not one of {', '.join(TOWERS)}")
    data = [{"source": "records", "options": {"path": f"{options['data']}/{name}.jsonl"}} for name in STAGES]
    stages = recipe(options["recipe"], data, int(options["rows"]), float(options["step_scale"]))
    return ConfigDict(
        {
            "name": "uhd_v4",
            "model": {
                "tower": TOWERS[options["tower"]],
                "compressor": {"kind": options["compressor"]},
                "connector": {"rounds": 2 if options["compressor"] == "none" else 1},
                "slicing": {"encoding": options["encoding"]},
                "decoder": QWEN3_8B,  # its spare vocabulary rows take the marks around images
            },
            "train": {
                "stages": [stage for stage in stages if stage["name"] in chosen],
                "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
            },
        }
    )
