"""Fine-tunes a model on conversations and images of your own: the last stage of v4's recipe, whatever the model.

  uhd-jax convert import MiniCPM-V-4.6 start
  uhd-jax train --config=configs/finetune.py:start,photos/train.json --workdir=runs/tuned

After the colon stand the model, a folder of `convert import` or `combine` or the workdir of a run, and the data, a file
or a folder in any format of docs/data.md that has files: of a folder with files of several, the first of ArrayRecord,
parquet, tar, *.jsonl and *.json that it holds itself, else below, is read. Then options, joined by commas:

  images=DIR        where the paths of images begin (default: the folder of the data)
  train=PARTS       what is trained: all (default), language (connector and decoder), connector, or parts joined by "+"
  steps=N           default 500
  rows=N            packed rows of one step over all devices (default 8), a multiple of their number
  length=N          tokens of a row (default 4900, as in the recipe); a longer sample loses slices or its oldest turns
  rate=X            learning rate (default 1e-5); it falls to a tenth

Sizes, slicing, prompt form and tokenizer are the model's own. For a model of 1.3 billion parameters and one host of
eight accelerators with 80 GB: 20 GB of float32 state are sharded over all of them. docs/finetune.md goes through all of
it with a tiny model, on a CPU.
"""

import contextlib
from pathlib import Path

from ml_collections import ConfigDict

from uhd_jax.checkpoint import load_model_config
from uhd_jax.config import PARTS, ConfigError, to_dict
from uhd_jax.data.sources import SourceError
from uhd_jax.data.sources.files import exists, find_files

WHAT = {"all": PARTS, "language": ("connector", "connector_positions", "decoder"), "connector": ("connector",)}
# Those of which a folder also holds other kinds come first: a pack its JSON, parquet files their infos.
SOURCES = {".arrayrecord": "array_record", ".parquet": "parquet", ".tar": "tar", ".jsonl": "json", ".json": "json"}
USAGE = "--config=configs/finetune.py:MODEL,DATA"


def get_config(arg: str = "") -> ConfigDict:
    """The run; `arg` as described above."""
    model, _, rest = arg.partition(",")
    data, *given = rest.split(",")
    if not model or not data:
        raise ConfigError(f"name a model and data after the colon: {USAGE}")
    options = {"images": "", "train": "all", "steps": "500", "rows": "8", "length": "4900", "rate": "1e-5"}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or key not in options:
            raise ConfigError(f"option {item!r} is not one of {'=, '.join(options)}=")
        options[key] = value
    numbers = {key: _number(key, options[key], int) for key in ("steps", "rows", "length")}
    rate = _number("rate", options["rate"], float)
    config = to_dict(load_model_config(model))
    if (Path(model) / "tokenizer").is_dir():
        config["chat"]["tokenizer"] = str(Path(model) / "tokenizer")
    stage = {
        "name": "finetune",
        "data": _data(data, options["images"]),
        "trainable": WHAT.get(options["train"], tuple(options["train"].split("+"))),
        "steps": numbers["steps"],
        "warmup_steps": numbers["steps"] // 10,
        "rows": numbers["rows"],
        "packed_length": numbers["length"],
        "max_slices": config["slicing"]["max_slices"],
        "learning_rate": rate,
        "learning_rate_min": rate / 10,
        "sample_weight_power": 0.5,
        "pre_resize": config["slicing"]["pre_resize"],
    }
    return ConfigDict(
        {
            "name": "finetune",
            "model": config,
            "train": {"stages": [stage], "init_from": model, "mesh": {"data": 1, "fsdp": -1, "tensor": 1}},
        }
    )


def _data(path: str, images: str) -> dict:
    """The source of a file by its suffix, of a folder by what is in it."""
    kind = SOURCES.get(Path(path).suffix) or _kind_in(path)
    if images and kind in ("tar", "array_record"):
        raise ConfigError(f"images={images}: data of the kind {kind!r} holds its images itself")
    return {"source": kind, "options": {"path": path} | ({"image_root": images} if images else {})}


def _kind_in(folder: str) -> str:
    """The source of what lies in a folder, or is matched by a pattern."""
    if any(exists(f"{folder}/{name}") for name in ("state.json", "dataset_dict.json")):
        return "arrow"  # `save_to_disk`
    for place in ("{}/*{}", "{}"):  # what lies in folders below may belong to a file in this one
        for suffix, kind in SOURCES.items():
            with contextlib.suppress(SourceError):
                if any(name.endswith(suffix) for name in find_files(place.format(folder, suffix), suffix)):
                    return kind
    raise ConfigError(f"{folder}: no file named *{', *'.join(SOURCES)}, nor a folder with one or of save_to_disk")


def _number(key: str, text: str, kind: type) -> float:
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{key}={text}: must be a number") from None
