"""The published sizes. Those of the converted towers are in test_convert_towers.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from uhd_jax.config import CompressorConfig, DecoderConfig, TowerConfig, presets
from uhd_jax.models.decoder import Decoder
from uhd_jax.models.vit import Tower


def _count(module, *arguments, **options) -> int:
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *arguments, **options))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("VICUNA_7B", 6_738_415_616),
        ("VICUNA_13B", 13_015_864_320),
        ("QWEN2_7B", 7_615_616_512),
        ("QWEN3_8B", 8_190_735_360),
    ],
)
def test_decoders(name, parameters):
    config = DecoderConfig(**getattr(presets, name))
    x, positions = jnp.zeros((1, 1, config.width)), jnp.zeros((1, 1), int)
    assert _count(Decoder(config), x, positions) == parameters


def test_siglip():
    config = TowerConfig(**presets.SIGLIP2_SO400M)
    assert config == TowerConfig()
    module = Tower(config, CompressorConfig())
    count = _count(module, jnp.zeros((1, 16, 588)), jnp.full((1, 2), 4), levels=2, compress=True)
    assert count == 522_299_312
