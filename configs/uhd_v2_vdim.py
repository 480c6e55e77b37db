"""VDIM, the up-sampler of LLaVA-UHD v2's pyramid, pre-trained on images alone; tower and language model stay frozen.

  uhd-jax train --config=configs/uhd_v2_vdim.py:images=DIR --workdir=runs/uhd_v2_vdim \
      --config.train.init_from=DIR --config.model.chat.tokenizer=DIR/tokenizer

`init_from` is a saved model with the pretrained tower. The model is the one of `configs/uhd_v2.py`, which goes on from
this run with train.init_from=runs/uhd_v2_vdim; the language model is only kept for it and never runs. After the colon
stand options, joined by commas:

  images=DIR            a folder of images, looked through with all folders in it (default: images); published: MS-COCO
  released              the loss and the optimiser of the released code instead of the paper's
  13b, mask=5, ...      every option of `configs/uhd_v2.py` that changes the model

2,000 steps of 16 squares of 336 pixels, cut from the middle of the images. For 8 accelerators with 80 GB, or one if the
language model is left small. This file has not been run at full size.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

SIDE = 336


def get_config(arg: str = "") -> ConfigDict:
    """The run; `arg` as described above."""
    images, form, others = "images", "paper", []
    for item in arg.split(","):
        if item.startswith("images="):
            images = item.removeprefix("images=")
        elif item == "released":
            form = "released"
        else:
            others.append(item)
    config = runpy.run_path(str(Path(__file__).with_name("uhd_v2.py")))["get_config"](",".join(others))
    config.name = "uhd_v2_vdim"
    config.train.stages = [
        {
            "name": "vdim",
            "data": {"source": "images", "options": {"path": images, "crop": SIDE}},
            "objective": "reconstruction",
            "reconstruction": {"form": form},
            "trainable": ("upsampler", "upsampler_fixup"),
            "steps": 2000,
            "rows": 16,
            "packed_length": 1024,  # more than the visual tokens and the marks of one image; no text is read
            "buckets": [{"slots": 1, "tokens": 1024, "patches": (SIDE // 14) ** 2}],
            "max_slices": 1,
            "learning_rate": 1e-3,
            "learning_rate_min": 1e-3,
            "schedule": "constant",
        }
    ]
    return config
