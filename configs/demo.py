"""A tiny LLaVA-UHD that learns to read pages of handwritten digits, from random weights, on two CPU cores.

    uhd-jax train --config=configs/demo.py --workdir=runs/demo
    uhd-jax train --config=configs/demo.py:thumbnail --workdir=runs/demo_thumbnail   # control: never sees a slice

After the colon stand options, joined by commas:

  v4              the default: SigLIP 2 style tower, compressor inside it, merging MLP
  v1              CLIP style tower, spatially constrained resampler
  v2              CLIP style tower, pyramid of two levels by VDIM, hierarchical window attention
  thumbnail       trained on thumbnails alone
  layout=A, B     v1 and v2: order of the visual tokens; B is v2's spatially consistent one
  pyramid=none, bilinear, vdim   v2: how its second level is made

v4 should reach 0.97 of the digits on held-out pages, where the control stays at chance; v1 0.92 and v2 0.81 to 0.91,
whatever its options.

The four stages follow the recipe's order (small images, then views, then sliced pages, then instructions), but every
stage trains everything: the recipe's stage 1 can freeze tower and decoder because they come pre-trained, these do not.
v1 has one more, pages of one shape. v2 begins with VDIM, which stays frozen afterwards, has views of one digit before
and among the others, sliced pages of few shapes before all, and no questions.
"""

from ml_collections import ConfigDict

EVERYTHING = ("tower", "patch_embedding", "position_table", "compressor", "connector", "connector_positions", "decoder")
WORDS = ("user\n", "assistant\n", "Transcribe.", "What is in row ", "What is in column ", ", column ")
WORDS += ("How many ", "s?")
OPTIONS = {"layout": ("A", "B"), "pyramid": ("none", "bilinear", "vdim")}


def get_config(arg: str = "") -> ConfigDict:
    """The demo; `arg` as described above."""
    system, thumbnail, options = "v4", False, {}
    for item in filter(None, arg.split(",")):
        key, equals, value = item.partition("=")
        if item in ("v1", "v2", "v4"):
            system = item
        elif item == "thumbnail":
            thumbnail = True
        elif equals and value in OPTIONS.get(key, ()):
            options[key] = value
        else:
            known = [f"{key}={value}" for key, values in OPTIONS.items() for value in values]
            raise ValueError(f"unknown option {item!r}; known: v1, v2, v4, thumbnail, {', '.join(known)}")
    if options and system == "v4" or "pyramid" in options and system == "v1":
        raise ValueError(f"{system} has no option {', '.join(options)}")
    layout = options.get("layout", "B" if system == "v2" else "A") if system != "v4" else "v4"
    model = {
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
        "chat": {"use_image_id": False, "words": WORDS, "layout": layout},
        "dtype": "float32",
        "scan_layers": False,  # so few and so small layers run faster unrolled
        "tower_remat": "none",
        "decoder_remat": "none",
    }
    if system == "v4":
        model["tower"] = {"width": 96, "mlp_width": 256, "layers": 4, "heads": 4, "table_side": 8}
        model["compressor"] = {"after_layer": 1}
    else:
        model["tower"] = {"kind": "clip", "width": 96, "mlp_width": 256, "layers": 4, "skipped_layers": 1}
        model["tower"] |= {"heads": 4, "patch_size": 28, "table_side": 4, "norm_eps": 1e-5}
        model["compressor"] = {"kind": "none"}
        model["slicing"]["rule"] = "v1"
        model["connector"] = {"kind": "spatial_resampler", "query_side": 2, "heads": 4}
    if system == "v2":
        pyramid = options.get("pyramid", "vdim")
        levels = {"feature_scale_mask": 1} if pyramid == "none" else {"feature_scale_mask": 3, "upsampling": pyramid}
        model["connector"] |= {"kind": "hiwin", "pyramid": levels}
        # A patch is a cell here, so a view has 2 x 2 of them: a quarter of v1's, and digits are learned sooner.
        model["tower"] |= {"mlp_width": 512, "patch_size": 56, "table_side": 2}
        model["decoder"] |= {"width": 64, "mlp_width": 192}
    return ConfigDict(
        {
            "name": f"demo_{system}",
            "model": model,
            "train": {
                "stages": _stages_of_v2(layout, thumbnail, options.get("pyramid", "vdim") == "vdim")
                if system == "v2"
                else _stages(layout, thumbnail),
                "optimizer": {"b2": 0.9},  # from scratch: forgets the first steps' large gradients ten times sooner
                "checkpoint_every": 100 if system != "v2" else 250,
                "log_every": 10,
            },
        }
    )


def _stages(layout: str, thumbnail: bool) -> list[dict]:
    """Of v4 and v1."""
    v4 = layout == "v4"
    patches, rate = (64, 1.2e-3) if v4 else (16, 8e-4)
    max_slices, slots = (1, 4) if thumbnail else (9, 14)
    rates = {"learning_rate": rate, "warmup_steps": 20}
    views = rates | {"rows": 16, "max_slices": 1} | _row(84, 4, patches)
    pages = rates | {"rows": 8, "max_slices": max_slices} | _row(192, slots, patches)
    first = {"learning_rate": 8e-4, "warmup_steps": 60, "max_slices": 1}
    if v4:  # a token is a cell in views of any size
        first |= {"scale_resolution": 56, "steps": 750, "rows": 32, "tower_learning_rate_factor": 3.0} | _row(52, 4, 16)
    else:  # a token is a quarter of any view, so a cell alone would teach what no page needs
        first |= {"steps": 350, "rows": 16} | _row(52, 4, patches)
    view = {"task": "view", "layout": layout}
    page = {"task": "page", "layout": layout}
    questions = {"task": "mixed", "questions_per_page": 4, "questions_fraction": 0.5, "layout": layout}
    # Where the digits of pages of five shapes stand is not learned from them all at once, with some seeds not within
    # five hundred steps; after two hundred of one shape, where it is 2 x 2 slices, it is within a hundred.
    squares = _stage("squares", page | {"shapes": ((2, 2),)}, **pages | {"steps": 250, "schedule": "constant"})
    return [
        _stage("cells", {"task": "cell" if v4 else "same"}, **first),
        _stage("views", view, **views, steps=300 if v4 else 1000),
        *([] if v4 else [squares]),
        _stage("pages", page, **pages, steps=560 if v4 else 900),
        _stage("questions", questions, **pages | _row(256, slots, patches), steps=200, sample_weight_power=0.5),
    ]


def _stages_of_v2(layout: str, thumbnail: bool, vdim: bool) -> list[dict]:
    """VDIM where there is one, then thumbnails alone, then slices, as in the recipe.

    Easier pages come first: digits nearer to the middles of their cells; and few shapes of pages before all five. Where
    the digits of one shape stand in the text is learned in a hundred steps and a second shape in a hundred more, but
    all five at once were not in four hundred.
    """
    rates = {"learning_rate": 8e-4, "warmup_steps": 20}
    views = {"rows": 24, "max_slices": 1, "schedule": "constant"} | _row(76, 3, 4) | rates
    pages = _pages(192, 4, thumbnail) | rates
    few = pages | {"schedule": "constant"}
    reconstruction = {"objective": "reconstruction", "steps": 60, "rows": 16, "max_slices": 1} | _row(84, 1, 4)
    reconstruction |= {"learning_rate": 1e-3, "trainable": ("upsampler", "upsampler_fixup")}
    view = {"task": "view", "layout": layout}
    easy = {"layout": layout, "spread": (0.0, 1.0)}
    page = easy | {"task": "page"}
    # From four digits at once it may learn nothing in hundreds of steps, and forget what it could read: so views of one
    # digit come first, and stay among the others.
    same = {"task": "same", "spread": (0.0, 1.0)}
    mixed = _stage("views", {}, steps=900, **views) | {"data": _mixture(same, view | easy | {"seed": 1})}
    return [
        *([_stage("vdim", view, **reconstruction)] if vdim else []),
        _stage("same", same, steps=200, **views),
        mixed,
        _stage("squares", page | {"shapes": ((2, 2),)}, steps=500, **few),
        _stage("wider", page | {"shapes": ((2, 2), (2, 3))}, steps=200, **few),
        _stage("taller", page | {"shapes": ((2, 2), (2, 3), (3, 2))}, steps=150, **few),
        _stage("pages", page, steps=1050, **pages),
    ]


def _mixture(*options: dict) -> dict:
    parts = [{"name": each["task"], "source": "digit_pages", "options": each, "weight": 0.5} for each in options]
    return {"source": "mixture", "options": {"parts": parts}}


def _row(tokens: int, slots: int, patches: int) -> dict:
    return {"packed_length": tokens, "buckets": [{"slots": slots, "tokens": tokens, "patches": patches}]}


def _pages(tokens: int, patches: int, thumbnail: bool) -> dict:
    max_slices, slots = (1, 4) if thumbnail else (9, 14)
    return {"rows": 8, "max_slices": max_slices} | _row(tokens, slots, patches)


def _stage(name: str, options: dict, **values) -> dict:
    stage = {"name": name, "data": {"source": "digit_pages", "options": options}, "trainable": EVERYTHING}
    rate = values["learning_rate"]
    return stage | {"schedule": "cosine", "learning_rate_min": rate / 20} | values
