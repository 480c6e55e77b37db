"""VDIM against the values of the released modules (golden c): views of two sizes, and an empty slot, in one batch."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uhd_jax.config import PyramidConfig
from uhd_jax.convert.tables import export_tensors, import_tensors
from uhd_jax.convert.vdim import upsampler_table
from uhd_jax.models.pyramid import Pyramid, Vdim, pool_patches, spatial_kernel

GRIDS = [(4, 4), (3, 5)]
ROOM = 18  # patches per view, more than any view has
TOLERANCE = 2e-5
CONFIG = PyramidConfig(feature_scale_mask=6)


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "golden" / "c_v2_jbu4x.npz") as file:
        return dict(file)


def to_patches(image: np.ndarray) -> np.ndarray:
    """[1, 3, H, W] -> [P, 3 * 14 * 14]."""
    _, channels, height, width = image.shape
    split = image.reshape(channels, height // 14, 14, width // 14, 14)
    return split.transpose(1, 3, 0, 2, 4).reshape(-1, channels * 14 * 14)


def to_tokens(maps: np.ndarray) -> np.ndarray:
    """[1, C, H, W] -> [H * W, C]."""
    return maps[0].reshape(maps.shape[1], -1).T


@pytest.fixture(scope="module")
def inputs(golden):
    """Features, grids and patches of both views and an empty slot; what lies behind a view is noise."""
    random = np.random.default_rng(0)
    features = random.normal(size=(3, ROOM, 6)).astype(np.float32)
    patches = random.normal(size=(3, ROOM, 588)).astype(np.float32)
    for view, (rows, cols) in enumerate(GRIDS):
        features[view, : rows * cols] = to_tokens(golden[f"lowres_{rows}x{cols}"])
        patches[view, : rows * cols] = to_patches(golden[f"img_{rows}x{cols}"])
    return jnp.asarray(features), jnp.asarray([*GRIDS, (0, 0)], jnp.int32), jnp.asarray(patches)


@pytest.fixture(scope="module")
def params(golden, inputs):
    weights = {name.removeprefix("sd/"): array for name, array in golden.items() if name.startswith("sd/")}
    abstract = jax.eval_shape(lambda: Pyramid(CONFIG, jnp.float32).init(jax.random.key(0), *inputs)["params"])
    tree = import_tensors(upsampler_table(""), weights, {"connector": {"upsampler": abstract}})
    back = export_tensors(upsampler_table(""), tree)
    assert back.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(back[name], array)
    return tree["connector"]["upsampler"]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def run(request, inputs, params):
    """The dtype's name, and the levels."""
    pyramid = Pyramid(CONFIG, jnp.dtype(request.param))
    return request.param, jax.jit(pyramid.apply)({"params": params}, *inputs)


@pytest.mark.parametrize("view", range(len(GRIDS)))
@pytest.mark.parametrize("level", [1, 2])
def test_levels(run, golden, view, level):
    dtype, levels = run
    (rows, cols), name = GRIDS[view], "feat{}x_{}x{}".format(2**level, *GRIDS[view])
    features, grids = levels[level - 1]
    assert features.dtype == dtype
    np.testing.assert_array_equal(grids[view], [2**level * rows, 2**level * cols])
    ours = np.asarray(features[view, : 4**level * rows * cols], np.float32)
    error = np.abs(ours - to_tokens(golden[name]))
    if dtype == "float32":
        assert error.max() < TOLERANCE
    else:  # not farther from the exact values than the released modules are in bfloat16
        noise = np.abs(to_tokens(golden[f"bf16_{name}"]) - to_tokens(golden[name]))
        assert error.max() <= noise.max()
        assert error.mean() < noise.mean()


@pytest.mark.parametrize("view", range(len(GRIDS)))
def test_guidance_and_kernels(inputs, params, golden, view):
    _, grids, patches = inputs
    (rows, cols), name = GRIDS[view], "{}x{}".format(*GRIDS[view])

    def raster(cells):
        cells = cells[view, : 4 * rows * cols].reshape(rows, cols, 2, 2, -1)
        return cells.transpose(0, 2, 1, 3, 4).reshape(4 * rows * cols, -1)

    guidance = pool_patches(patches, 1)
    np.testing.assert_allclose(raster(guidance), to_tokens(golden[f"guid2x_{name}"]), atol=TOLERANCE, rtol=0)
    kernel = Vdim(1, jnp.float32).apply({"params": params["up1"]}, guidance, grids, ROOM, method="range_kernel")
    np.testing.assert_allclose(raster(kernel), to_tokens(golden[f"rangek2x_{name}"]), atol=TOLERANCE, rtol=0)
    spatial = spatial_kernel(params["up1"]["spatial_sigma"])
    np.testing.assert_allclose(spatial, golden[f"spatialk2x_{name}"].reshape(-1), atol=TOLERANCE, rtol=0)
