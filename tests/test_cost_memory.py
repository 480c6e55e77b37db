"""The estimate of activations against what a compiler sets aside, and how it follows the configuration."""

import dataclasses

import jax
import pytest
import tiny

from uhd_jax.analysis.activations import activations
from uhd_jax.batch import Bucket, abstract_batch
from uhd_jax.config import PARTS, CompressorConfig, ConfigError, ConnectorConfig, DecoderConfig, TowerConfig
from uhd_jax.models import uhd
from uhd_jax.training.stages import merge_params, split_params

V4 = dataclasses.replace(
    tiny.MODEL,
    tower=TowerConfig(width=64, mlp_width=256, layers=4, heads=4, patch_size=4, table_side=16),
    compressor=CompressorConfig(after_layer=1),
    decoder=DecoderConfig(vocab_size=1024, width=128, mlp_width=352, layers=4, heads=4, kv_heads=2, head_dim=32),
    loss_chunk=256,
)
V1 = dataclasses.replace(
    V4,
    tower=dataclasses.replace(V4.tower, kind="clip", skipped_layers=1),
    compressor=CompressorConfig("none"),
    connector=ConnectorConfig("spatial_resampler", query_side=4, heads=4),
)
BUCKET = Bucket(rows=2, slots=3, tokens=384, patches=256, patch_bytes=V4.tower.patch_bytes)


def with_remat(config, remat):
    return dataclasses.replace(config, tower_remat=remat, decoder_remat=remat)


@pytest.mark.parametrize(("config", "remat"), [(V4, "full"), (V1, "none")], ids=["v4, full", "v1, none"])
def test_estimate_is_near_what_the_compiler_sets_aside(config, remat):
    """In float32, where this machine computes as it is told; the gradients are an output and not in it."""
    config = with_remat(config, remat)
    trained, frozen = split_params(jax.eval_shape(lambda key: uhd.init_params(config, key), jax.random.key(0)), PARTS)

    def gradient(trained, frozen, batch):
        return jax.grad(lambda part: uhd.loss_sums(merge_params(part, frozen), batch, config)[0])(trained)

    memory = jax.jit(gradient).lower(trained, frozen, abstract_batch(BUCKET)).compile().memory_analysis()
    assert activations(config, BUCKET, PARTS).total == pytest.approx(memory.temp_size_in_bytes, rel=0.2)


def test_policies_differ_as_they_should():
    none, dots, full = (activations(with_remat(V4, remat), BUCKET, PARTS) for remat in ("none", "dots", "full"))
    assert none.kept > 2 * dots.kept > 3 * full.kept  # compressor and connector keep the same under all three
    assert none.worked_on == 2 * 4 * 256 * 1024  # a chunk's logits and their gradient
    layer = BUCKET.rows * 4 * BUCKET.tokens**2 * 4  # the weights of the decoder's attention
    assert layer < dots.worked_on < full.worked_on < 8 * layer


def test_what_is_frozen_keeps_less_and_parameters_are_not_counted():
    everything = activations(V4, BUCKET, PARTS).kept
    connector = activations(V4, BUCKET, ("connector",)).kept
    decoder = activations(V4, BUCKET, ("decoder",)).kept
    assert connector < everything and decoder < everything
    wide = dataclasses.replace(V4, decoder=dataclasses.replace(V4.decoder, vocab_size=8192))
    assert activations(wide, BUCKET, PARTS).kept == everything


def test_a_pyramid_works_on_its_windows():
    config = tiny.KINDS["hiwin"]
    bucket = dataclasses.replace(BUCKET, patch_bytes=config.tower.patch_bytes)
    windows = 2 * 6 * 256 * (4 + 6) ** 2 * 16 * 4  # views, patches, cells of a window, width, float32; and gradients
    assert activations(config, bucket, ("decoder",)).worked_on == windows


def test_a_part_that_the_model_has_not_got():
    with pytest.raises(ConfigError, match="upsampler"):
        activations(V4, BUCKET, ("upsampler",))
