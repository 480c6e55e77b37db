"""LLaVA-UHD v1 and v2 whole: a sample's logits depend on the sample alone, and the precision changes little."""

from __future__ import annotations

import dataclasses
import functools

import jax
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
    PyramidConfig,
    SlicingConfig,
    TowerConfig,
)
from uhd_jax.data.chat import ImagePart, Message, encode_chat
from uhd_jax.data.packing import fill_batch
from uhd_jax.data.tokenizer import byte_tokenizer
from uhd_jax.models import uhd
from uhd_jax.slicing.pixels import cut_views
from uhd_jax.slicing.plan import Grid, Size, plan_image

pytestmark = pytest.mark.usefixtures("unoptimised")

SIDE = 4  # pixels of a patch
V1 = ModelConfig(
    decoder=DecoderConfig(272, 32, 48, 2, 4, 4, 8, rope_theta=1e4),
    tower=TowerConfig(
        "clip", width=16, mlp_width=24, layers=3, heads=2, patch_size=SIDE, table_side=4, skipped_layers=1
    ),
    compressor=CompressorConfig("none"),
    connector=ConnectorConfig("spatial_resampler", query_side=3, heads=4),
    slicing=SlicingConfig("v1", scale_resolution=16, max_slices=6),
    chat=ChatConfig("vicuna_v1", "A"),
    dtype="float32",
    loss_chunk=64,
)
V2 = dataclasses.replace(
    V1,
    connector=dataclasses.replace(V1.connector, kind="hiwin", pyramid=PyramidConfig(7)),
    chat=ChatConfig("vicuna_v1", "B"),
)
MODELS = {"v1": V1, "v2": V2}
SIZES = [[(16, 45)], [], [(4, 64), (40, 23)], [(70, 4)]]  # pixels of each sample's images
BUCKET = Bucket(rows=4, slots=8, tokens=192, patches=32, patch_bytes=V1.tower.patch_bytes)


@functools.cache
def params(name: str):
    return tiny.random_params(jax.eval_shape(lambda: uhd.init_params(MODELS[name], jax.random.key(0))))


@functools.cache
def samples(name: str):
    model, made = MODELS[name], []
    for seed, sizes in enumerate(SIZES):
        random = np.random.default_rng(seed)
        plans = [plan_image(Size(*size), model) for size in sizes]
        images = [random.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
        views = [view for image, plan in zip(images, plans, strict=True) for view in cut_views(image, plan, SIDE)]
        parts = (*(ImagePart(i) for i in range(len(sizes))), "What?")
        messages = [Message("user", parts), Message("assistant", (f"That, {seed}.",))]
        made.append((encode_chat(messages, plans, byte_tokenizer(), model.chat), views))
    return made


_logits = jax.jit(uhd.logits, static_argnames="config")


def run(name: str, rows, bucket: Bucket, **changes) -> dict[int, np.ndarray]:
    """Logits of every sample, by its number."""
    model = dataclasses.replace(MODELS[name], **changes)
    batch = fill_batch([[samples(name)[i] for i in row] for row in rows], bucket, model.visual_tokens(bucket.patches))
    logits = np.asarray(_logits(params(name), batch, model))
    return {
        sample: logits[number][batch.segments[number] == segment]
        for number, row in enumerate(rows)
        for segment, sample in enumerate(row, 1)
    }


@functools.cache
def alone(name: str):
    return run(name, [[0], [1], [2], [3]], BUCKET)


def test_the_samples_have_views_of_one_patch_across():
    grids = {view.patch_grid for size in SIZES for image in size for view in plan_image(Size(*image), V1).views}
    assert {Grid(1, 16), Grid(16, 1)} <= grids


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "rows, bucket",
    [
        ([[2, 0], [3, 1]], dataclasses.replace(BUCKET, rows=2, slots=12)),
        ([[3], [0, 1], [2]], dataclasses.replace(BUCKET, slots=12, tokens=224, patches=48)),
    ],
    ids=["packed", "another bucket, an empty row"],
)
def test_logits_depend_on_the_sample_alone(name, rows, bucket):
    found = run(name, rows, bucket)
    for sample, expected in alone(name).items():
        assert expected.std() > 0.1
        np.testing.assert_allclose(found[sample], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_computes_near_float32(name):
    for sample, found in run(name, [[0], [1], [2], [3]], BUCKET, dtype="bfloat16").items():
        error = np.abs(found - alone(name)[sample])
        assert 0 < error.mean() < 0.05 * alone(name)[sample].std()
