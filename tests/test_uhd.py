"""Properties of the whole model: what a sample's logits may and may not depend on, and equal ways to compute them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from uhd_jax.batch import Bucket
from uhd_jax.config import (
    ChatConfig,
    CompressorConfig,
    ConnectorConfig,
    DecoderConfig,
    ModelConfig,
    SlicingConfig,
    TowerConfig,
)
from uhd_jax.data.chat import ImagePart, Message, encode_chat
from uhd_jax.data.packing import fill_batch
from uhd_jax.data.tokenizer import byte_tokenizer
from uhd_jax.models import uhd
from uhd_jax.models.decoder import Decoder
from uhd_jax.ops.losses import weighted_cross_entropy
from uhd_jax.slicing.pixels import cut_views
from uhd_jax.slicing.plan import Size, make_plan

pytestmark = pytest.mark.usefixtures("unoptimised")

DECODERS = {
    "qwen2": DecoderConfig(272, 32, 48, 2, 4, 2, 8, qkv_bias=True, tied_head=True),
    "qwen3": DecoderConfig(272, 32, 48, 2, 4, 2, 16, qk_norm=True),
    "qwen3.5": dataclasses.replace(tiny.HYBRID.decoder, vocab_size=272),
}
CONFIG = ModelConfig(
    decoder=DECODERS["qwen3"],
    tower=TowerConfig(width=32, mlp_width=44, layers=3, heads=4, table_side=7),
    compressor=CompressorConfig(after_layer=1),
    slicing=SlicingConfig(scale_resolution=112),
    dtype="float32",
    loss_chunk=64,
)
TOKENIZER = byte_tokenizer()
CHAT = ChatConfig()


@functools.cache
def _params(config: ModelConfig):
    params = jax.jit(uhd.init_params, static_argnums=0)(config, jax.random.key(0))
    random = np.random.default_rng(1)
    # Away from the special start values, so that every parameter matters.
    return jax.tree.map(lambda leaf: leaf + 0.05 * random.normal(size=leaf.shape).astype(leaf.dtype), params)


def _sample(seed: int, sizes: list[tuple[int, int]], text: str, answer: str, config: ModelConfig = CONFIG):
    random = np.random.default_rng(seed)
    levels = config.merge_levels()
    plans = [make_plan(Size(*size), config.slicing, config.tower.patch_size, levels) for size in sizes]
    views = [
        view
        for size, plan in zip(sizes, plans, strict=True)
        for view in cut_views(random.integers(0, 256, (*size, 3), np.uint8), plan, config.tower.patch_size)
    ]
    parts = (*(ImagePart(i) for i in range(len(sizes))), text)
    messages = [Message("user", parts), Message("assistant", (answer,))]
    return encode_chat(messages, plans, TOKENIZER, CHAT), views


SAMPLES = [
    _sample(0, [(100, 300)], "What?", "This."),
    _sample(1, [], "No image here", "Right"),
    _sample(2, [(60, 40), (240, 130)], "Two", "Yes, two."),
]

_logits = jax.jit(uhd.logits, static_argnames=("config", "mode"))
_encode_views = jax.jit(uhd.encode_views, static_argnums=(3, 4))


def _run(rows, bucket, config=CONFIG):
    """Logits of every sample of a batch, in the order given."""
    batch = fill_batch([[SAMPLES[i] for i in row] for row in rows], bucket, config.visual_tokens(bucket.patches))
    logits = np.asarray(_logits(_params(config), batch, config))
    out = {}
    for number, row in enumerate(rows):
        for segment, sample in enumerate(row, 1):
            out[sample] = logits[number][batch.segments[number] == segment]
    return out


BUCKET = Bucket(rows=1, slots=10, tokens=288, patches=96, patch_bytes=784)
SLOT_TOKENS = CONFIG.visual_tokens(BUCKET.patches)


@pytest.mark.parametrize(
    "rows, bucket",
    [
        ([[0], [1], [2]], dataclasses.replace(BUCKET, rows=3)),
        ([[0, 1, 2]], BUCKET),
        ([[2, 0, 1]], BUCKET),
        ([[1], [2, 0]], dataclasses.replace(BUCKET, rows=4, slots=16, tokens=320, patches=128)),
    ],
    ids=["alone", "packed", "another order", "another bucket, empty rows"],
)
def test_logits_depend_on_the_sample_alone(rows, bucket):
    check_independence(rows, bucket, CONFIG)


def test_logits_of_a_hybrid_depend_on_the_sample_alone():
    """Neither the state nor the convolution of gated delta layers passes from one sample to the next."""
    with jax.enable_x64(True):  # gated delta layers enlarge the last bits of float32, so the order of sums shows
        config = dataclasses.replace(CONFIG, decoder=DECODERS["qwen3.5"], dtype="float64")
        check_independence([[2, 0, 1]], BUCKET, config, atol=1e-8)


def check_independence(rows, bucket, config, atol=1e-5):
    expected = _run([[0], [1], [2]], dataclasses.replace(BUCKET, rows=3, tokens=256), config)
    found = _run(rows, bucket, config)
    for sample, logits in expected.items():
        assert logits.shape == (len(SAMPLES[sample][0].tokens), 272)
        np.testing.assert_allclose(found[sample], logits, atol=atol, rtol=0)


def test_neighbours_are_really_there():
    """The property above would hold of a model that ignores its images: pixels must matter, to their sample only."""
    batch = fill_batch([SAMPLES], BUCKET, SLOT_TOKENS)
    before = np.asarray(_logits(_params(CONFIG), batch, CONFIG))[0]
    patches = batch.patches.copy()
    patches[0, 0] = 255 - patches[0, 0]  # a view of the first sample
    after = np.asarray(_logits(_params(CONFIG), dataclasses.replace(batch, patches=patches), CONFIG))[0]
    changed = np.abs(after - before).max(-1)
    assert changed[batch.segments[0] == 1][-1] > 1e-3
    np.testing.assert_allclose(changed[batch.segments[0] > 1], 0, atol=1e-6)


@functools.cache
def _loss_and_grads(config: ModelConfig):
    batch = fill_batch([[SAMPLES[0], SAMPLES[1]], [SAMPLES[2]]], dataclasses.replace(BUCKET, rows=2), SLOT_TOKENS)

    def loss(params):
        total, weight = uhd.loss_sums(params, batch, config)
        return total / weight

    return jax.jit(jax.value_and_grad(loss))(_params(CONFIG))


@pytest.mark.parametrize(
    "changes",
    [
        {"scan_layers": False, "loss_chunk": 100_000},
        {"tower_remat": "none", "decoder_remat": "none", "loss_chunk": 1},
        {"tower_remat": "dots", "decoder_remat": "dots"},
    ],
    ids=str,
)
def test_ways_to_compute_the_same(changes):
    loss, grads = _loss_and_grads(CONFIG)
    other_loss, other_grads = _loss_and_grads(dataclasses.replace(CONFIG, **changes))
    np.testing.assert_allclose(other_loss, loss, atol=1e-5, rtol=0)
    for a, b in zip(jax.tree.leaves(other_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)


def test_ways_to_compute_a_hybrid_decoder():
    """Scan against loop, and rematerialised inside the scan over groups against kept."""
    config = DECODERS["qwen3.5"]
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(2, 20, config.width)), jnp.float32)
    segments = jnp.asarray([[1] * 20, [1] * 7 + [2] * 10 + [0] * 3])
    inputs = x, jnp.arange(20)[None], segments
    params = tiny.random_params(jax.eval_shape(lambda: Decoder(config).init(jax.random.key(0), *inputs)))

    def loss(module):
        return jax.jit(jax.value_and_grad(lambda params: jnp.sum(module.apply(params, *inputs)[0][:, :17] ** 2)))

    expected = loss(Decoder(config, scan=True, remat="full"))(params)
    for other in (Decoder(config, scan=False), Decoder(config, remat="dots")):
        for a, b in zip(jax.tree.leaves(loss(other)(params)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max(), rtol=0)


def test_loss_is_the_weighted_mean_over_whole_logits():
    batch = fill_batch([[SAMPLES[0], SAMPLES[1]], [SAMPLES[2]]], dataclasses.replace(BUCKET, rows=2), SLOT_TOKENS, 0.5)
    total, weight = jax.jit(uhd.loss_sums, static_argnums=2)(_params(CONFIG), batch, CONFIG)
    logits = _logits(_params(CONFIG), batch, CONFIG)[:, :-1]
    expected = weighted_cross_entropy(logits, batch.tokens[:, 1:], batch.loss_weights[:, 1:])
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(weight, batch.loss_weights.sum(), rtol=1e-6)
    trained = [sample.trained.sum() for sample, _ in SAMPLES]
    np.testing.assert_allclose(weight, np.sqrt(trained).sum(), rtol=1e-6)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "qwen3.5"])
def test_cached_decode_equals_the_full_forward(kind):
    """Prompts of different lengths and image counts, decoded together, token by token; in double, which leaves no room
    for rounding, that gated delta layers enlarge."""
    with jax.enable_x64(True):
        check_cached_decode(dataclasses.replace(CONFIG, decoder=DECODERS[kind], dtype="float64"))


def check_cached_decode(config):
    params = _params(config)
    batch = fill_batch([[sample] for sample in SAMPLES], dataclasses.replace(BUCKET, rows=3, tokens=224), SLOT_TOKENS)
    full = np.asarray(_logits(params, batch, config))
    lengths = np.array([len(sample.tokens) for sample, _ in SAMPLES])
    prompts = lengths - 6
    cut = np.arange(224)[None] < prompts[:, None]
    prompt = dataclasses.replace(
        batch, segments=np.where(cut, batch.segments, 0), tokens=np.where(cut, batch.tokens, 0)
    )
    logits, cache = uhd.prefill(params, prompt, config, 240)
    for step in range(6):
        at = prompts + step
        np.testing.assert_allclose(logits, full[range(3), at - 1], atol=1e-8, rtol=0, err_msg=f"step {step}")
        tokens = jnp.asarray(batch.tokens[range(3), at], jnp.int32)
        logits, cache = uhd.decode_step(params, tokens, jnp.asarray(at, jnp.int32), cache, config)


def test_bfloat16_computes_near_float32_with_float32_parameters():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    batch = fill_batch([[SAMPLES[0]]], BUCKET, 2)
    exact, rough = _logits(_params(CONFIG), batch, CONFIG), _logits(_params(CONFIG), batch, config)
    assert rough.dtype == jnp.float32
    error = np.abs(np.asarray(exact - rough)).max()
    assert 1e-4 < error < 0.2
    grads = jax.jit(jax.grad(lambda p: uhd.loss_sums(p, batch, config)[0]))(_params(CONFIG))
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_views_of_any_grid_share_a_program():
    traced = []

    @jax.jit
    def encode(patches, grids):
        traced.append(grids.shape)
        return uhd.encode_views(_params(CONFIG), patches, grids, CONFIG)

    outputs = [
        encode(np.ones((2, 64, 784), np.uint8), np.array([grid, (0, 0)], np.int32))
        for grid in ((8, 8), (4, 16), (12, 4))
    ]
    assert len(traced) == 1
    assert float(jnp.abs(outputs[0] - outputs[1]).max()) > 1e-3  # the grid is read


def test_both_modes_run_on_the_same_weights():
    patches, grids = np.zeros((1, 64, 784), np.uint8), np.array([[8, 8]], np.int32)
    shapes = {mode: _encode_views(_params(CONFIG), patches, grids, CONFIG, mode).shape for mode in ("16x", "4x")}
    assert shapes == {"16x": (1, 4, 32), "4x": (1, 16, 32)}


def test_global_encoding_is_a_switch():
    """The whole image as one view, in the same weights and the same kind of batch."""
    whole = dataclasses.replace(CONFIG, slicing=dataclasses.replace(CONFIG.slicing, encoding="global"))
    sliced, alone = (_sample(0, [(200, 300)], "What?", "This.", config) for config in (CONFIG, whole))
    assert len(sliced[1]) > 1 == len(alone[1])
    assert alone[0].plans[0].thumbnail.patch_grid.area > 2 * sliced[0].plans[0].thumbnail.patch_grid.area
    bucket = Bucket(rows=1, slots=1, tokens=128, patches=320, patch_bytes=784)
    logits = _logits(_params(CONFIG), fill_batch([[alone]], bucket, 2), whole)
    assert np.isfinite(logits).all()


def test_two_rounds_without_compressor():
    config = dataclasses.replace(CONFIG, compressor=CompressorConfig("none"), connector=ConnectorConfig(rounds=2))
    params = jax.jit(uhd.init_params, static_argnums=0)(config, jax.random.key(0))
    assert "compressor" not in params["tower"] and set(params["connector"]) == {"round_0", "round_1"}
    out = _encode_views(params, np.zeros((1, 64, 784), np.uint8), np.array([[8, 8]], np.int32), config)
    assert out.shape == (1, 4, 32)


def test_room_that_is_no_multiple_is_refused():
    with pytest.raises(ValueError, match="70 patches per view is not a multiple of 16"):
        uhd.encode_views(_params(CONFIG), np.zeros((1, 70, 784), np.uint8), np.array([[8, 8]], np.int32), CONFIG)


def test_full_size_parameters():
    """The published sizes: SigLIP 2 with the compressor has 522,299,312 parameters, Qwen3-8B and connector the rest."""
    config = ModelConfig(decoder=DecoderConfig(151_936, 4096, 12_288, 36, 32, 8, 128, qk_norm=True))
    shapes = jax.eval_shape(lambda: uhd.init_params(config, jax.random.key(0)))
    count = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in shapes.items()}
    assert count["tower"] == 522_299_312
    assert count["connector"] == 40_125_952
    assert sum(count.values()) == 8_753_160_624
