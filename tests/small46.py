"""A small checkpoint of MiniCPM-V 4.6's layout on disk, and its import."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
from safetensors.numpy import load_file, save_file

from uhd_jax.convert.source import open_source
from uhd_jax.convert.transfer import import_model, recognise
from uhd_jax.models import uhd

GOLDEN = Path(__file__).parent / "golden" / "v4_full_qwen3_16x"
FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")


def abstract_of(config):
    return jax.eval_shape(lambda: uhd.init_params(config, jax.random.key(0)))


def make_checkpoint(folder, **changes):
    folder.mkdir()
    for name in FILES:
        shutil.copyfile(GOLDEN / name, folder / name)
    tensors = {name: tensor.astype(jnp.bfloat16) for name, tensor in load_file(GOLDEN / "model.safetensors").items()}
    save_file(tensors | changes, folder / "model.safetensors")
    return folder


def imported(source, destination, dtype="float32", **options):
    with open_source(source) as opened:
        import_model(opened, destination, recognise(opened, abstract_of), dtype, **options)
    return destination


def digest(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
