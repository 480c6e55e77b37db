"""Counts of parameters against the real model and published ones, sums of work, and peaks of devices."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict

from uhd_jax import cost
from uhd_jax.config import (
    COMPRESSORS,
    CompressorConfig,
    ConfigError,
    ConnectorConfig,
    DecoderConfig,
    ModelConfig,
    PyramidConfig,
    SlicingConfig,
    TowerConfig,
)
from uhd_jax.config.presets import CLIP_L_14_336, QWEN2_7B, VICUNA_7B, VICUNA_13B
from uhd_jax.models import uhd
from uhd_jax.ops.roi_align import choose_bins
from uhd_jax.slicing.plan import Grid, Size, make_plan
from uhd_jax.training.stages import part_of

pytestmark = pytest.mark.usefixtures("unoptimised")

FULL = ModelConfig(DecoderConfig(151_936, 4096, 12_288, 36, 32, 8, 128, qk_norm=True))
CLIP, NO_COMPRESSOR = TowerConfig(**CLIP_L_14_336), CompressorConfig("none")


def test_published_parameter_counts_of_v4():
    counts = cost.parameter_counts(FULL)
    assert sum(counts.values()) == 8_753_160_624
    assert counts["compressor"] == 104_507_072
    assert sum(counts[part] for part in ("tower", "patch_embedding", "position_table", "compressor")) == 522_299_312
    assert counts["connector"] == 40_125_952


def test_parameter_counts_of_minicpm_v_4_6():
    """Spec v4 section 4.3: the shapes of its tensors, 1.3 billion together."""
    decoder = DecoderConfig(248_094, 1024, 3584, 24, 8, 2, 256, qk_norm=True, tied_head=True, gated_attention=True)
    delta = {"delta_key_heads": 16, "delta_value_heads": 16, "delta_key_dim": 128, "delta_value_dim": 128}
    counts = cost.parameter_counts(ModelConfig(dataclasses.replace(decoder, full_attention_interval=4, **delta)))
    attention = (4096 + 512 + 512) * 1024 + 1024 * 2048 + 2 * 256
    mixing = (6144 + 2048 + 16 + 16) * 1024 + 6144 * 4 + 16 + 16 + 128 + 1024 * 2048
    shared = 24 * (3 * 3584 * 1024 + 2 * 1024) + 248_094 * 1024 + 1024
    assert counts["decoder"] == 6 * attention + 18 * mixing + shared
    assert round(sum(counts.values()) / 1e9, 2) == 1.30


def test_published_parameter_counts_of_v1():
    """Spec v1-v2 section 6."""
    connector = ConnectorConfig("spatial_resampler")
    counts = cost.groups(
        cost.parameter_counts(ModelConfig(DecoderConfig(**VICUNA_13B), CLIP, NO_COMPRESSOR, connector))
    )
    assert counts["tower"] == 303_507_456
    assert round(counts["connector"] / 1e6, 2) == 137.84
    assert sum(counts.values()) == pytest.approx(26.91e9 / 2, rel=1e-3)  # the released bfloat16 files


@pytest.mark.parametrize(("decoder", "millions"), [(VICUNA_7B, 175.59), (VICUNA_13B, 266.68), (QWEN2_7B, 137.13)])
def test_published_parameter_counts_of_v2(decoder, millions):
    """Spec v1-v2 section 6.3: with all four levels, and a query set and a projection that are never used."""
    connector = ConnectorConfig("hiwin", pyramid=PyramidConfig(15))
    counts = cost.parameter_counts(ModelConfig(DecoderConfig(**decoder), CLIP, NO_COMPRESSOR, connector))
    unused = (144 + 1024) * decoder["width"]
    assert round((counts["connector"] + counts["connector_positions"] + unused) / 1e6, 2) == millions


def test_published_parameter_counts_of_vdim():
    connector = ConnectorConfig("hiwin", pyramid=PyramidConfig(7))
    counts = cost.parameter_counts(ModelConfig(DecoderConfig(**VICUNA_7B), CLIP, NO_COMPRESSOR, connector))
    assert counts["upsampler"] + counts["upsampler_fixup"] == 1_062_066


def variants():
    for kind in COMPRESSORS[1:]:
        yield kind, dataclasses.replace(tiny.MODEL, compressor=CompressorConfig(kind, 0))
    yield "two rounds", dataclasses.replace(tiny.MODEL, compressor=NO_COMPRESSOR, connector=ConnectorConfig(rounds=2))
    decoder = dataclasses.replace(tiny.MODEL.decoder, qk_norm=False, qkv_bias=True, tied_head=True)
    yield "decoder", dataclasses.replace(tiny.MODEL, decoder=decoder)
    yield "hybrid decoder", tiny.HYBRID
    yield (
        "gate with biases",
        dataclasses.replace(tiny.MODEL, decoder=dataclasses.replace(decoder, gated_attention=True)),
    )
    yield from tiny.KINDS.items()
    hiwin = tiny.KINDS["hiwin"]
    yield "table", dataclasses.replace(hiwin, tower=dataclasses.replace(hiwin.tower, table_cols=5))
    for pyramid in (
        PyramidConfig(5),
        PyramidConfig(1),
        PyramidConfig(10, "bilinear"),
        PyramidConfig(6, "deconvolution"),
    ):
        yield str(pyramid), dataclasses.replace(hiwin, connector=dataclasses.replace(hiwin.connector, pyramid=pyramid))


VARIANTS = dict(variants())


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_parameter_counts_are_those_of_the_model(config):
    params = jax.eval_shape(lambda key: uhd.init_params(config, key), jax.random.key(0))
    counted = dict.fromkeys(cost.parameter_counts(config), 0)
    for path, leaf in flatten_dict(params, sep="/").items():
        counted[part_of(path)] += leaf.size
    assert cost.parameter_counts(config) == counted


def test_an_unknown_kind_is_refused_not_counted_as_nothing():
    tower = dataclasses.replace(FULL, tower=dataclasses.replace(FULL.tower, kind="other"))
    connector = dataclasses.replace(FULL, connector=dataclasses.replace(FULL.connector, kind="other"))
    for config, name in ((tower, "tower"), (connector, "connector")):
        for count in (cost.parameter_counts, lambda config: cost.forward_flops(config, cost.Work())):
            with pytest.raises(
                ConfigError, match=f"{name}.kind.*'other' is not known|{name}.kind.*'other' are not known"
            ):
                count(config)


def test_bytes_of_weights_and_state():
    counts = cost.parameter_counts(tiny.MODEL)
    total = sum(counts.values())
    assert cost.weight_bytes(tiny.MODEL) == {"float32": 4 * total, "bfloat16": 2 * total}
    assert cost.state_bytes(tiny.MODEL, ("connector",)) == {
        "parameters": 4 * total,
        "gradients": 4 * counts["connector"],
        "moments": 8 * counts["connector"],
    }


def test_work_of_a_batch_leaves_padding_out():
    batch = tiny.batch(0)
    batch.segments[0, 5:14] = 2  # two samples, of 5 and 9 tokens
    batch.patch_grids[0, 1] = (2, 4)
    work = cost.batch_work(batch)
    assert work.views == 9
    assert work.patches == 8 * 16 + 8
    assert work.patch_pairs == 8 * 16**2 + 8**2
    assert work.bins == 8 * 9 + 8
    assert work.tokens == 8 * 14
    assert work.token_pairs == 15 + 45 + 7 * 14 * 15 // 2
    assert work + cost.Work() == work


def test_work_of_a_full_bucket():
    bucket = tiny.BUCKET
    assert cost.bucket_work(bucket) == cost.Work(16, 16 * 16, 16 * 16**2, 16 * 12, 8 * 16, 8 * 16 * 17 // 2)


def test_work_of_a_plan():
    plan = make_plan(Size(1344, 896), SlicingConfig(), 14, FULL.merge_levels())
    work = cost.plan_work(plan, text_tokens=100)
    assert (work.views, work.patches, work.tokens) == (len(plan.views), plan.patches, plan.visual_tokens + 100)


def test_bins_are_those_of_the_device():
    grids = np.array([Grid(rows, cols) for rows in range(1, 65) for cols in range(1, 65)])
    np.testing.assert_array_equal(cost.window_bins(grids), np.asarray(choose_bins(grids)).prod(axis=-1))


@dataclasses.dataclass(frozen=True)
class Device:
    device_kind: str
    platform: str = "tpu"
    process_index: int = 0


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
    ],
)
def test_peaks_of_known_devices(kind, peak):
    assert cost.peak_flops([Device(kind)] * 4) == 4 * peak


def test_peak_of_an_unknown_device_is_measured_and_may_be_given():
    measured = cost.peak_flops(jax.devices())
    assert measured == cost.peak_flops(jax.devices()[:1])  # they share the cores
    assert 1e8 < measured < 1e14
    assert cost.peak_flops(jax.devices(), override=2.0) == 16.0
