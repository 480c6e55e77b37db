"""Published figures, counts against the real model, and FLOPs against what a compiler counts."""

import dataclasses

import jax
import pytest
import tiny
from flax.traverse_util import flatten_dict

from uhd_jax import cost
from uhd_jax.batch import abstract_batch
from uhd_jax.config import (
    COMPRESSORS,
    CompressorConfig,
    ConnectorConfig,
    DecoderConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SlicingConfig,
    TowerConfig,
)
from uhd_jax.models import uhd
from uhd_jax.sharding.mesh import make_mesh
from uhd_jax.slicing.plan import Size, make_plan
from uhd_jax.training.optimizer import make_optimizer
from uhd_jax.training.stages import part_of
from uhd_jax.training.state import abstract_state
from uhd_jax.training.step import make_train_step

pytestmark = pytest.mark.usefixtures("unoptimised")

FULL = ModelConfig(DecoderConfig(151_936, 4096, 12_288, 36, 32, 8, 128, qk_norm=True))
POST_VIT = dataclasses.replace(FULL, compressor=CompressorConfig("none"), connector=ConnectorConfig(rounds=2))


@pytest.mark.parametrize(
    ("kind", "after_layer", "gflops"),
    [
        ("none", 6, 3555.1),
        ("average_pool", 6, 1368.7),
        ("unshuffle_mlp", 6, 1401.2),
        ("reused_mlp", 6, 1490.2),
        ("cross_attention_top_left", 6, 1402.0),
        ("cross_attention_mean", 6, 1402.0),
        ("window_attention_mlp", 6, 1484.1),
        ("window_attention_reused_mlp", 6, 1573.1),
        ("window_attention_reused_mlp", 3, 1245.1),
        ("window_attention_reused_mlp", 9, 1901.1),
        ("window_attention_reused_mlp", 15, 2557.0),
    ],
)
def test_every_figure_of_the_paper(kind, after_layer, gflops):
    """Tables 4, 5 and A3: one view of 70 x 70 patches."""
    assert round(cost.paper_gflops(TowerConfig(), CompressorConfig(kind, after_layer), 4900), 1) == gflops


def test_our_own_convention_on_the_same_views():
    """Spec v4 section 1.9: GMACs of the tower with true 2x2 windows."""

    def tower_gmacs(config, patches):
        flops = cost.forward_flops(config, cost.work([patches], []))
        return round(sum(flops[part] for part in ("tower", "patch_embedding", "compressor")) / 2e9, 1)

    assert (tower_gmacs(POST_VIT, 4900), tower_gmacs(FULL, 4900)) == (3511.2, 1502.5)
    assert (tower_gmacs(POST_VIT, 1024), tower_gmacs(FULL, 1024)) == (486.9, 238.5)
    deeper = dataclasses.replace(FULL, compressor=CompressorConfig(after_layer=15))
    assert (tower_gmacs(deeper, 4900), tower_gmacs(deeper, 1024)) == (2472.8, 364.2)


def test_published_parameter_counts():
    counts = cost.parameter_counts(FULL)
    assert sum(counts.values()) == 8_753_160_624
    assert counts["compressor"] == 104_507_072
    assert sum(counts[part] for part in ("tower", "patch_embedding", "position_table", "compressor")) == 522_299_312
    assert counts["connector"] == 40_125_952


def variants():
    for kind in COMPRESSORS[1:]:
        yield dataclasses.replace(tiny.MODEL, compressor=CompressorConfig(kind, 0))
    yield dataclasses.replace(tiny.MODEL, compressor=CompressorConfig("none"), connector=ConnectorConfig(rounds=2))
    yield dataclasses.replace(
        tiny.MODEL, decoder=dataclasses.replace(tiny.MODEL.decoder, qk_norm=False, qkv_bias=True, tied_head=True)
    )


@pytest.mark.parametrize("config", list(variants()), ids=lambda config: config.compressor.kind)
def test_parameter_counts_are_those_of_the_model(config):
    params = jax.eval_shape(lambda key: uhd.init_params(config, key), jax.random.key(0))
    counted = dict.fromkeys(cost.parameter_counts(config), 0)
    for path, leaf in flatten_dict(params, sep="/").items():
        counted[part_of(path)] += leaf.size
    assert cost.parameter_counts(config) == counted


def test_state_bytes():
    counts = cost.parameter_counts(tiny.MODEL)
    assert cost.state_bytes(tiny.MODEL, ("connector",)) == {
        "parameters": 4 * sum(counts.values()),
        "gradients": 4 * counts["connector"],
        "moments": 8 * counts["connector"],
    }


# Wide enough for products to dominate; no loops, whose bodies a compiler counts once; one chunk of the loss.
WIDE = dataclasses.replace(
    tiny.MODEL,
    tower=TowerConfig(width=64, mlp_width=96, layers=3, heads=2, patch_size=4, table_side=8),
    decoder=DecoderConfig(vocab_size=64, width=192, mlp_width=512, layers=2, heads=4, kv_heads=2, head_dim=32),
    scan_layers=False,
    tower_remat="none",
    decoder_remat="none",
    loss_chunk=10_000,
)
WIDE_BUCKET = dataclasses.replace(tiny.BUCKET, patches=64, tokens=32, patch_dim=WIDE.tower.patch_dim)


def full_work(bucket):
    """What the program computes: in the decoder all pairs, masked or not."""
    work = cost.bucket_work(bucket)
    return dataclasses.replace(work, token_pairs=bucket.rows * bucket.tokens**2)


def compiled_train_flops(trainable):
    stage = tiny.stage(trainable=trainable)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    params = jax.eval_shape(lambda key: uhd.init_params(WIDE, key), jax.random.key(0))
    target = abstract_state(params, make_optimizer(OptimizerConfig(), stage), trainable, mesh)
    step = make_train_step(lambda p, b, _: uhd.loss_sums(p, b, WIDE), stage, OptimizerConfig(), target, mesh)
    return step.lower(target, abstract_batch(WIDE_BUCKET)).compile().cost_analysis()["flops"]


def test_frozen_parts_cost_no_backward_pass_and_the_formula_knows():
    compiled, analytic = {}, {}
    for trainable in (tiny.EVERYTHING, tiny.ADAPTER, ("decoder",)):
        compiled[trainable] = compiled_train_flops(trainable)
        analytic[trainable] = cost.train_flops(WIDE, full_work(WIDE_BUCKET), trainable)
        # The compiler also counts norms, softmax and optimiser, and the logits' recomputation.
        ratio = compiled[trainable] / analytic[trainable]
        assert 1.0 < ratio < 1.12, (trainable, ratio)
    assert compiled[tiny.ADAPTER] < 0.75 * compiled[tiny.EVERYTHING]


def test_what_training_a_part_costs():
    """Products with weights and in attention, in units of their forward pass, from the pixels to the logits."""
    work = full_work(tiny.BUCKET)
    stretches = cost.forward_stretches(tiny.MODEL, work)
    parts = ("patch_embedding", "tower", "compressor", "tower", "connector", "decoder")
    assert tuple(stretch.part for stretch in stretches) == parts
    for trainable, weights, attention in [
        (tiny.EVERYTHING, (2, 3, 3, 3, 3, 3), (0, 3, 3, 3, 0, 3)),
        (tiny.ADAPTER, (1, 2, 3, 2, 3, 2), (0, 3, 3, 3, 0, 3)),
        (("compressor",), (1, 1, 3, 2, 2, 2), (0, 1, 3, 3, 0, 3)),
        (("patch_embedding",), (2, 2, 2, 2, 2, 2), (0, 3, 3, 3, 0, 3)),
        (("decoder",), (1, 1, 1, 1, 1, 3), (0, 1, 1, 1, 0, 3)),
    ]:
        expected = sum(
            2 * (times * stretch.weight_macs + attended * stretch.attention_macs)
            for stretch, times, attended in zip(stretches, weights, attention, strict=True)
        )
        assert cost.train_flops(tiny.MODEL, work, trainable) == pytest.approx(expected), trainable


def test_work_of_a_batch_leaves_padding_out():
    batch = tiny.batch(0)
    batch.segments[0, 5:14] = 2  # two samples, of 5 and 9 tokens
    batch.patch_grids[0, 1] = (2, 4)
    work = cost.batch_work(batch)
    assert work.views == 9
    assert work.patches == 8 * 16 + 8
    assert work.patch_pairs == 8 * 16**2 + 8**2
    assert work.tokens == 8 * 14
    assert work.token_pairs == 15 + 45 + 7 * 14 * 15 // 2
    assert work + cost.Work() == work


def test_work_of_a_plan_and_modes():
    plan = make_plan(Size(1344, 896), SlicingConfig(), 14, FULL.merge_levels())
    work = cost.plan_work(plan, text_tokens=100)
    assert (work.views, work.patches, work.tokens) == (len(plan.views), plan.patches, plan.visual_tokens + 100)
    assert cost.forward_flops(FULL, work, "4x")["compressor"] == 0
    assert cost.forward_flops(FULL, work, "4x")["tower"] > 1.9 * cost.forward_flops(FULL, work)["tower"]


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
