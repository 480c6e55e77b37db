"""LLaVA-UHD v2 in full size: CLIP-L/14-336 tower, inverse semantic pyramid, hierarchical window attention; two stages.

  uhd-jax train --config=configs/uhd_v2.py --workdir=runs/uhd_v2 \
      --config.train.init_from=DIR --config.model.chat.tokenizer=DIR/tokenizer

`init_from` is a saved model with the pretrained tower and language model and with VDIM as `configs/uhd_v2_vdim.py`
trains it. After the colon stand options, joined by commas:

  7b (default), 13b     Vicuna v1.5
  qwen2                 Qwen2-7B-Instruct, with the separator ids and the trained turn marks of the released model
  paper                 one query set, all of VDIM frozen; otherwise as released: four query sets, VDIM's last
                        convolution trained in stage 2
  mask=N                levels of the pyramid as a sum of 1, 2, 4 and 8 (default 7 for 7b, 5 for 13b and qwen2)
  pyramid=NAME          vdim (default), bilinear, deconvolution
  bins=NAME             selective (default), fixed, pyramid
  connector=NAME        hiwin (default); ablations: perceiver, bilinear_mlp
  layout=A, B           order of the visual tokens (default B, spatially consistent, for 7b; A for 13b and qwen2)
  stage1, stage2        only this stage; start it with train.init_from=WORKDIR of the stage before
  data=DIR              DIR/stage1.jsonl and stage2.jsonl hold the records (default: data)

Stage 1 sees thumbnails alone, one sample per row, 256 rows. In stage 2 short samples share a row of 4,096 tokens, so
fewer than the published 128 rows make 128 samples; 128 rows are kept here. For 8 accelerators with 80 GB; published: 8
A100, about 27 hours for 7b. This file has not been run at full size.
"""

from ml_collections import ConfigDict

from uhd_jax.config import ConfigError
from uhd_jax.config.presets import CLIP_L_14_336, QWEN2_7B, QWEN2_CHAT, VICUNA_7B, VICUNA_13B, VICUNA_CHAT
from uhd_jax.training.stages import llava_recipe

FLAGS = ("7b", "13b", "qwen2", "paper", "stage1", "stage2")
DECODERS = {"7b": VICUNA_7B, "13b": VICUNA_13B, "qwen2": QWEN2_7B}


def get_config(arg: str = "") -> ConfigDict:
    """The run; `arg` as described above."""
    flags = set()
    options = {"mask": "", "pyramid": "vdim", "bins": "selective", "connector": "hiwin", "layout": "", "data": "data"}
    for item in filter(None, arg.split(",")):
        key, equals, value = item.partition("=")
        if item in FLAGS:
            flags.add(item)
        elif equals and key in options:
            options[key] = value
        else:
            raise ConfigError(f"option {item!r} is not one of {', '.join(FLAGS)} or {'=, '.join(options)}=")
    sizes = flags & set(DECODERS) or {"7b"}
    if len(sizes) > 1:
        raise ConfigError(f"options {', '.join(sorted(sizes))} contradict each other")
    size = sizes.pop()
    mask = options["mask"] or ("7" if size == "7b" else "5")
    if not mask.isdecimal():
        raise ConfigError(f"option mask={mask}: not a number")
    connector = ["connector", "connector_positions"] if options["connector"] != "bilinear_mlp" else ["connector"]
    fixup = [] if "paper" in flags or options["pyramid"] != "vdim" or mask == "1" else ["upsampler_fixup"]
    tower = ["tower", "patch_embedding", "position_table"]
    # A deconvolution has no pre-training: it is trained with the connector.
    upsampler = ["upsampler"] if options["pyramid"] == "deconvolution" and mask != "1" else []
    stages = llava_recipe(
        [
            {"source": "records", "options": {"path": f"{options['data']}/{name}.jsonl"}}
            for name in ("stage1", "stage2")
        ],
        steps=(2181, 6704),  # one epoch of 558,128 and of 858K samples
        learning_rates=(1e-3 if size == "7b" else 2e-4, 2e-5),
        packed_lengths=(3072 if size == "7b" else 4096, 4096),
        max_slices=7,
        trainable=(connector + upsampler, [*tower, *connector, *upsampler, *fixup, "decoder"]),
        slots=8,
        template="" if size == "qwen2" else "plain",
    )
    chosen = [stage for stage in stages if not flags & {"stage1", "stage2"} or stage["name"] in flags]
    return ConfigDict(
        {
            "name": "uhd_v2",
            "model": {
                "tower": CLIP_L_14_336,
                "compressor": {"kind": "none"},
                "connector": {
                    "kind": options["connector"],
                    "query_side": 12,
                    "pyramid": {"feature_scale_mask": int(mask), "upsampling": options["pyramid"]},
                    "bins": options["bins"],
                    "query_sets": 1 if "paper" in flags else 4,
                },
                "decoder": DECODERS[size],
                "slicing": {"rule": "v1", "scale_resolution": 336, "max_slices": 7},
                "chat": {
                    **(QWEN2_CHAT if size == "qwen2" else VICUNA_CHAT),
                    "layout": options["layout"] or ("B" if size == "7b" else "A"),
                },
            },
            "train": {
                "stages": chosen,
                "optimizer": {"b2": 0.999, "weight_decay": 0.0},
                "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
            },
        }
    )
