"""FLOPs against the products in the traced program, what a compiler counts, and figures made by hand."""

import dataclasses
import math

import jax
import pytest
import tiny

from uhd_jax import cost
from uhd_jax.batch import Bucket, abstract_batch
from uhd_jax.config import (
    COMPRESSORS,
    PARTS,
    CompressorConfig,
    ConnectorConfig,
    DecoderConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PyramidConfig,
    TowerConfig,
)
from uhd_jax.config.presets import CLIP_L_14_336, VICUNA_7B
from uhd_jax.models import hiwin, uhd
from uhd_jax.sharding.mesh import make_mesh
from uhd_jax.slicing.plan import Grid
from uhd_jax.training.optimizer import make_optimizer
from uhd_jax.training.stages import merge_params, split_params
from uhd_jax.training.state import abstract_state
from uhd_jax.training.step import make_train_step

pytestmark = pytest.mark.usefixtures("unoptimised")

FULL = ModelConfig(DecoderConfig(151_936, 4096, 12_288, 36, 32, 8, 128, qk_norm=True))
POST_VIT = dataclasses.replace(FULL, compressor=CompressorConfig("none"), connector=ConnectorConfig(rounds=2))
V2 = ModelConfig(
    DecoderConfig(**VICUNA_7B),
    TowerConfig(**CLIP_L_14_336),
    CompressorConfig("none"),
    ConnectorConfig("hiwin", pyramid=PyramidConfig(5)),
)


def tower_gmacs(config, side):
    flops = cost.forward_flops(config, cost.work([Grid(side, side)], []))
    return round(cost.groups(flops)["tower"] / 2e9, 1)


def test_our_own_convention_on_v4s_views():
    """Spec v4 section 1.9: GMACs of the tower with true 2x2 windows."""
    assert (tower_gmacs(POST_VIT, 70), tower_gmacs(FULL, 70)) == (3511.2, 1502.5)
    assert (tower_gmacs(POST_VIT, 32), tower_gmacs(FULL, 32)) == (486.9, 238.5)
    deeper = dataclasses.replace(FULL, compressor=CompressorConfig(after_layer=15))
    assert (tower_gmacs(deeper, 70), tower_gmacs(deeper, 32)) == (2472.8, 364.2)


def test_our_own_convention_on_v2s_parts():
    """Spec v1-v2 section 7.3, in TFLOPs of 7 views and 1014 tokens."""
    flops = cost.forward_flops(V2, cost.work([Grid(24, 24)] * 7, [1014]))
    head = 2 * 1014 * 4096 * 32_000
    assert flops["decoder"] - head == pytest.approx(13.40e12, rel=1e-3)
    assert flops["upsampler"] + flops["upsampler_fixup"] == pytest.approx(0.147e12, rel=0.03)
    # The section counts all layers, and its projector has what is never executed: the wide map, and queries per view.
    published = cost.forward_flops(
        V2, cost.work([Grid(24, 24)] * 7, [1014]), convention=cost.Convention(published=True)
    )
    assert cost.groups(published)["tower"] == pytest.approx(2.67e12, rel=2e-3)
    assert published["connector"] == pytest.approx(2.18e12, rel=0.03)


def test_conventions():
    work = cost.work([Grid(4, 4)], [10])
    whole = cost.forward_flops(tiny.MODEL, work)
    macs = cost.forward_flops(tiny.MODEL, work, convention=cost.Convention(flops_per_mac=1))
    assert {part: 2 * flops for part, flops in macs.items()} == whole
    full = cost.forward_flops(tiny.MODEL, work, convention=cost.Convention(causal=False))
    decoder = tiny.MODEL.decoder
    pairs = decoder.layers * 2 * decoder.heads * decoder.head_dim * 2
    assert full["decoder"] - whole["decoder"] == pairs * (100 - 55)
    assert {**full, "decoder": 0} == {**whole, "decoder": 0}
    trained = cost.train_flops(tiny.MODEL, work, ("decoder",), convention=cost.Convention(1, causal=False))
    assert trained == sum(macs.values()) - macs["decoder"] + 3 * full["decoder"] / 2
    texts = [str(cost.Convention(flops, causal)) for flops in (1, 2) for causal in (True, False)]
    assert len(set(texts)) == 4 and "1 FLOP per" in texts[0] and "(half)" in texts[0] and "(full)" in texts[1]


def test_the_paper_counts_layers_that_never_run_and_queries_of_every_view():
    work = cost.work([Grid(4, 4)] * 3, [])
    config = tiny.KINDS["spatial_resampler"]
    ran = cost.forward_flops(config, work)
    published = cost.forward_flops(config, work, convention=cost.Convention(published=True))
    tower, layers = config.tower, config.tower.layers
    assert published["tower"] == pytest.approx(ran["tower"] * layers / (layers - tower.skipped_layers))
    queries = 2 * config.connector.queries * config.decoder.width**2
    assert published["connector"] - ran["connector"] == 2 * queries


def test_modes():
    work = cost.work([Grid(32, 32)], [64])
    assert cost.forward_flops(FULL, work, "4x")["compressor"] == 0
    assert cost.forward_flops(FULL, work, "4x")["tower"] > 1.9 * cost.forward_flops(FULL, work)["tower"]


def test_bins_of_hiwins_ablations():
    assert tuple(height * width for height, width in hiwin.PYRAMID_BINS) == cost.connectors.PYRAMID_BINS
    work = cost.work([Grid(24, 24), Grid(19, 29)], [])  # 9 and 6 bins
    config = dataclasses.replace(V2, connector=dataclasses.replace(V2.connector, pyramid=PyramidConfig(1)))

    def keys(bins):
        """Of all windows, from the products that change with them: projection and attention of keys and values."""
        connector = dataclasses.replace(config.connector, bins=bins)
        flops = cost.forward_flops(dataclasses.replace(config, connector=connector), work)["connector"]
        width = config.decoder.width
        return flops / 2 / (width * (config.tower.width + 2) + 2 * width**2 + 2 * width * connector.query_sets) / 144

    assert keys("fixed") - keys("pyramid") == pytest.approx(2 * 9 - 2 * 4)
    assert keys("fixed") - keys("selective") == pytest.approx(2 * 9 - (9 + 6))


def products(jaxpr):
    """Multiply-accumulates of all matrix products and triangular systems in a traced program."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += math.prod(out) * math.prod(left[axis] for axis in contracted)
        if equation.primitive.name == "triangular_solve":  # by substitution, the diagonal being 1
            right = equation.invars[1].aval.shape
            total += math.prod(right) * (right[-2] - 1) // 2
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns"))
        for value in inner:
            value = getattr(value, "jaxpr", value)
            total += times * products(value) if hasattr(value, "eqns") else 0
    return total


def unrolled(config):
    return dataclasses.replace(
        config, scan_layers=False, tower_remat="none", decoder_remat="none", loss_chunk=10_000, dtype="float32"
    )


def kinds():
    for kind in COMPRESSORS[1:]:
        yield kind, dataclasses.replace(tiny.MODEL, compressor=CompressorConfig(kind, 0))
    yield "two rounds", dataclasses.replace(POST_VIT, tower=tiny.MODEL.tower, decoder=tiny.MODEL.decoder)
    yield from tiny.KINDS.items()
    base = tiny.KINDS["hiwin"]
    for name, connector in {
        "hiwin on level 0": ConnectorConfig("hiwin"),
        "perceiver on level 0": ConnectorConfig("perceiver"),
        "hiwin on levels 0 and 2": ConnectorConfig("hiwin", pyramid=PyramidConfig(5)),
        "bilinear pyramid": ConnectorConfig("hiwin", pyramid=PyramidConfig(15, "bilinear")),
        "deconvolution": ConnectorConfig("perceiver", pyramid=PyramidConfig(6, "deconvolution")),
        "bilinear_mlp on level 0": ConnectorConfig("bilinear_mlp"),
    }.items():
        yield name, dataclasses.replace(base, connector=dataclasses.replace(connector, query_side=2, heads=4))
    resampler = tiny.KINDS["spatial_resampler"].connector
    yield "compressor before a resampler", dataclasses.replace(tiny.MODEL, connector=resampler)


KINDS = {name: unrolled(config) for name, config in kinds()}


def full_work(bucket):
    """What the program computes: in the decoder all pairs, masked or not; padded bins are in the overhead."""
    work = cost.bucket_work(bucket)
    return dataclasses.replace(work, token_pairs=bucket.rows * bucket.tokens**2)


def zeros(config, bucket, trainable=()):
    """FLOPs with the zeros that the patch embedding's kernel has for bytes without meaning, its gradient included."""
    patches = bucket.rows * bucket.slots * bucket.patches
    unread = config.tower.patch_bytes - config.tower.patch_dim
    return 2 * patches * unread * config.tower.width * (1 + ("patch_embedding" in trainable))


def abstract_params(config):
    return jax.eval_shape(lambda key: uhd.init_params(config, key), jax.random.key(0))


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_every_product_of_the_forward_pass_is_counted_and_no_other(config):
    """Exactly: the overhead (resizing and pooling as dense products, padded bins) is what is not counted."""
    bucket = tiny.BUCKET

    def logits(params, batch):
        return uhd.logits(params, batch, config)

    traced = jax.make_jaxpr(logits)(abstract_params(config), abstract_batch(bucket))
    counted = sum(cost.forward_flops(config, full_work(bucket)).values())
    overhead = cost.overhead_flops(config, full_work(bucket)) + zeros(config, bucket)
    assert 2 * products(traced.jaxpr) == counted + overhead


def test_every_product_of_gated_delta_layers_is_counted_and_no_other():
    config, decoder = unrolled(tiny.HYBRID), tiny.HYBRID.decoder
    bucket = dataclasses.replace(tiny.BUCKET, tokens=128)  # two chunks
    traced = jax.make_jaxpr(lambda params, batch: uhd.logits(params, batch, config))(
        abstract_params(config), abstract_batch(bucket)
    )
    channels = 2 * decoder.delta_key_heads * decoder.delta_key_dim + decoder.delta_value_heads * decoder.delta_value_dim
    convolution = 4 * bucket.rows * bucket.tokens * decoder.delta_conv * channels  # of 4 layers, no matrix product
    work, full = cost.bucket_work(bucket), cost.Convention(causal=False)
    counted = sum(cost.forward_flops(config, work, convention=full).values())
    assert 2 * (products(traced.jaxpr) + convolution) == counted + zeros(config, bucket)
    heads, inside = decoder.delta_value_heads, 3 * decoder.delta_key_dim + 2 * decoder.delta_value_dim
    masked = 4 * heads * (64 - 65 / 2) * inside * work.tokens
    masked += 2 * 2 * decoder.heads * decoder.head_dim * (bucket.rows * bucket.tokens**2 - work.token_pairs)
    assert sum(cost.forward_flops(config, work).values()) == counted - 2 * masked


def traced_training(config, bucket, trainable):
    """FLOPs of the products of loss and gradient, less the recomputation of the loss in chunks."""
    trained, frozen = split_params(abstract_params(config), trainable)

    def gradient(trained, frozen, batch):
        return jax.value_and_grad(lambda part: uhd.loss_sums(merge_params(part, frozen), batch, config)[0])(trained)

    traced = jax.make_jaxpr(gradient)(trained, frozen, abstract_batch(bucket))
    head = config.decoder.vocab_size * config.decoder.width * bucket.rows
    times = 3 if "decoder" in trainable else 2
    again = head * ((bucket.tokens - 1) * (times + 1) - bucket.tokens * times)  # and the last token predicts nothing
    return 2 * (products(traced.jaxpr) - again) - zeros(config, bucket, trainable)


V4_STAGES = (
    PARTS,
    tiny.ADAPTER,
    ("connector",),
    ("compressor",),
    ("decoder",),
    ("patch_embedding",),
    ("position_table",),
)


@pytest.mark.parametrize("trainable", V4_STAGES, ids=lambda trainable: "+".join(trainable)[:30])
def test_every_product_of_training_v4_is_counted_and_no_other(trainable):
    config = unrolled(tiny.MODEL)
    counted = cost.train_flops(config, full_work(tiny.BUCKET), trainable)
    assert traced_training(config, tiny.BUCKET, trainable) == counted


# Wide enough for the overhead to be small, whose own backward pass is not counted either.
WIDE_V2 = unrolled(
    dataclasses.replace(
        tiny.KINDS["hiwin"],
        tower=TowerConfig(
            "clip", width=64, mlp_width=128, layers=3, heads=2, patch_size=2, table_side=4, skipped_layers=1
        ),
        decoder=DecoderConfig(vocab_size=64, width=256, mlp_width=64, layers=1, heads=4, kv_heads=2, head_dim=8),
        connector=ConnectorConfig("hiwin", query_side=4, heads=4, pyramid=PyramidConfig(3)),
    )
)
CONNECTORS = {
    "hiwin": WIDE_V2,
    "perceiver": dataclasses.replace(WIDE_V2, connector=dataclasses.replace(WIDE_V2.connector, kind="perceiver")),
    "spatial_resampler": dataclasses.replace(
        WIDE_V2, connector=ConnectorConfig("spatial_resampler", query_side=4, heads=4)
    ),
}
TOWER = ("tower", "patch_embedding", "position_table")
STAGES = {
    "nothing before the decoder": ("decoder",),
    "v2 stage 1": ("connector", "connector_positions"),
    "v2 stage 2": (*TOWER, "connector", "connector_positions", "upsampler_fixup", "decoder"),
    "v1 stage 2": ("connector", "decoder"),
    "positions": ("connector_positions",),
    "VDIM": ("upsampler", "upsampler_fixup"),
    "its last convolution": ("upsampler_fixup",),
    "tower": TOWER,
}


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        (kind, stage)
        for kind in CONNECTORS
        for stage in STAGES
        if kind != "spatial_resampler" or not {*STAGES[stage]} <= {"upsampler", "upsampler_fixup"}
    ],
)
def test_training_a_connector_counts_the_gradients_that_are_needed(kind, stage):
    config, trainable = CONNECTORS[kind], STAGES[stage]
    bucket = Bucket(2, 2, 80, 16, config.tower.patch_bytes)
    work = full_work(bucket)
    counted, overhead = cost.train_flops(config, work, trainable), cost.overhead_flops(config, work)
    executed = traced_training(config, bucket, trainable)
    if stage == "nothing before the decoder":
        assert executed == counted + overhead
    # The overhead has a backward pass too, and what pools before it projects is computed again in it.
    assert counted + overhead <= executed <= counted + 3 * overhead
    assert overhead < 0.04 * counted


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
WIDE_BUCKET = dataclasses.replace(tiny.BUCKET, patches=64, tokens=32, patch_bytes=WIDE.tower.patch_bytes)


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
            2 * (times * stretch.weight_macs + attended * stretch.pair_macs)
            for stretch, times, attended in zip(stretches, weights, attention, strict=True)
        )
        assert cost.train_flops(tiny.MODEL, work, trainable) == pytest.approx(expected), trainable
