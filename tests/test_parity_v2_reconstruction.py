"""The released reconstruction loss against the published code (golden d): every term, and every gradient."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_parity_v2_pyramid import to_patches, to_tokens

from uhd_jax.config import PyramidConfig, ReconstructionConfig
from uhd_jax.convert.tables import TRANSPOSE, Entry, flatten, import_tensors, unflatten
from uhd_jax.convert.vdim import cell_convolution, upsampler_table
from uhd_jax.models.pyramid import Pyramid
from uhd_jax.ops import neighbourhood as nb
from uhd_jax.training.vdim import JitterDraws, LevelDraws, released_loss, released_terms

TOLERANCE = 2e-5
CONFIG = ReconstructionConfig("released", jitters=1, pad=5, zoom=2.0, projections=3, crf_weight=1e-3)
PYRAMID = Pyramid(PyramidConfig(feature_scale_mask=4), jnp.float32)


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "golden" / "d_v2_mlr_loss.npz") as file:
        return dict(file)


def table() -> list[Entry]:
    """Our names of the parameters that train, the scaffold's included."""
    entries = upsampler_table("upsampler.")
    for level, suffix in ((1, "_2x"), (2, "")):
        ours, theirs = f"scaffold/level_{level}", f"downsampler{suffix}"
        entries += [
            Entry(f"{ours}/attention/kernel", f"{theirs}.attention_net.1.weight", TRANSPOSE),
            Entry(f"{ours}/attention/bias", f"{theirs}.attention_net.1.bias"),
            Entry(f"{ours}/weight", f"{theirs}.w"),
            Entry(f"{ours}/bias", f"{theirs}.b"),
            *cell_convolution(f"{ours}/scale", f"scale_net{suffix}.net"),
        ]
    return entries


def tree_of(golden, prefix):
    """The arrays under a prefix as our parameter tree."""
    entries = [entry for entry in table() if "up3" not in entry.ours]
    tensors = {entry.theirs: golden[prefix + entry.theirs] for entry in entries}
    shapes = {entry.ours: np.empty(entry.shape(tensors[entry.theirs].shape)) for entry in entries}
    return import_tensors(entries, tensors, unflatten(shapes))


@pytest.fixture(scope="module")
def inputs(golden):
    """Features, grids, patches, tower and what was drawn."""
    patches = jnp.stack([to_patches(image[None]) for image in golden["img"]])
    features = jnp.stack([to_tokens(maps[None]) for maps in golden["lr_feats"]])
    kernel = golden["sd/model.c.weight"].reshape(6, -1).T

    def encode(patches):
        return jnp.matmul(patches, kernel, precision="highest") + golden["sd/model.c.bias"]

    np.testing.assert_allclose(encode(patches), features, atol=TOLERANCE)
    row, col, zoom, flip = golden["transform_x_y_zoom_flip"]
    levels = tuple(
        LevelDraws(
            kept=golden[f"rand_{number}"][..., 0] > 0.2,
            channels=np.ones((2, 6), np.float32),
            pixel_rows=golden[f"randint_{2 + 2 * number}"][0],
            pixel_cols=golden[f"randint_{3 + 2 * number}"][0],
        )
        for number in (1, 0)
    )
    draws = JitterDraws(int(row), int(col), np.float32(zoom), np.bool_(flip), golden["proj_raw"], levels)
    return features, jnp.full((2, 2), 4, jnp.int32), patches, encode, draws


def cells_of(params, features, grids, patches):
    return PYRAMID.apply(
        {"params": params["connector"]["upsampler"]}, features, grids, patches, method="cells", detach=True
    )


@pytest.fixture(scope="module")
def step(golden, inputs):
    """The levels, the terms, the loss, and its gradient."""
    features, grids, patches, encode, draws = inputs

    def loss(params):
        cells = cells_of(params, features, grids, patches)
        terms = released_terms(params["scaffold"], cells, patches, encode, [draws], CONFIG.pad)
        total, weight = released_loss(terms, grids, CONFIG.crf_weight)
        return total / weight, (cells, terms)

    (value, (cells, terms)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(tree_of(golden, "sd/"))
    return value, cells, jax.tree.map(jnp.mean, terms), gradient


def test_levels(step, golden, inputs):
    for level in (1, 2):
        ours = nb.to_raster(step[1][level], inputs[1], level)
        for view in range(2):
            expected = to_tokens(golden[f"hr_feats_{2**level}x_native"][view : view + 1])
            np.testing.assert_allclose(ours[view], expected, atol=TOLERANCE, rtol=0)


def test_terms_and_loss(step, golden):
    value, _, terms, _ = step
    for name, expected in {
        "reconstruction_1": golden["log/loss/rec_2x"],
        "reconstruction_2": golden["log/loss/rec_4x"],
        "crf_1": golden["log/loss/crf_2x"],
        "crf_2": golden["log/loss/crf_4x"] - golden["log/loss/crf_2x"],  # logged as the sum of both
    }.items():
        np.testing.assert_allclose(terms[name], expected, atol=TOLERANCE, rtol=0, err_msg=name)
    np.testing.assert_allclose(value, golden["loss_total"], atol=TOLERANCE, rtol=0)


def test_every_gradient(step, golden):
    expected = flatten(tree_of(golden, "grad/"))
    ours = flatten(step[3])
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        np.testing.assert_allclose(gradient, expected[name], atol=TOLERANCE, rtol=0, err_msg=name)
    assert len(ours) == sum(name.startswith("grad/") for name in golden)
