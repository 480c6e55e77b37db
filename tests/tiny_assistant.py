"""A tiny random model that answers, and images for it."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import tiny

from uhd_jax.config import CompressorConfig, DecoderConfig, ModelConfig, SlicingConfig, TowerConfig
from uhd_jax.data.tokenizer import byte_tokenizer
from uhd_jax.generation.assistant import Assistant
from uhd_jax.models import uhd

CONFIG = ModelConfig(
    decoder=DecoderConfig(272, 32, 48, 2, 4, 2, 8, qk_norm=True),
    tower=TowerConfig(width=32, mlp_width=44, layers=2, heads=4, table_side=7),
    compressor=CompressorConfig(after_layer=0),
    slicing=SlicingConfig(scale_resolution=112),
    dtype="float32",
)
HYBRID = dataclasses.replace(CONFIG, decoder=dataclasses.replace(tiny.HYBRID.decoder, vocab_size=272))
WIDE = np.tile(np.arange(240, dtype=np.uint8)[None, :, None], (100, 1, 3))
SMALL = np.full((40, 60, 3), 90, np.uint8)


def make_assistant(config: ModelConfig = CONFIG, max_length: int = 400) -> Assistant:
    """Far from uniform, so that answers differ from prompt to prompt."""
    params = jax.jit(uhd.init_params, static_argnums=0)(config, jax.random.key(3))
    params = jax.tree.map(lambda leaf: leaf * 1.0, params)
    params["decoder"]["head"] *= 40
    return Assistant(config, params, byte_tokenizer(), max_length=max_length)
