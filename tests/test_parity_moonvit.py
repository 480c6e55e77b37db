"""MoonViT against every stored array of the PyTorch tower: images of different grids in one padded batch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_v4 import load, padded_views

from uhd_jax.config import CompressorConfig, TowerConfig
from uhd_jax.convert.tables import import_tensors
from uhd_jax.convert.towers import moonvit_table
from uhd_jax.models import layers
from uhd_jax.models.vit import ROPE_THETA, Tower
from uhd_jax.ops.attention import view_segments
from uhd_jax.ops.merge import merge_windows, patch_coordinates
from uhd_jax.ops.rope import apply_rope_pairs, rope_angles_2d
from uhd_jax.slicing.pixels import merge_order
from uhd_jax.slicing.plan import Grid

CONFIG = TowerConfig(
    kind="moonvit", width=48, mlp_width=80, layers=3, heads=4, table_side=8, table_cols=6, norm_eps=1e-5
)
ROOM, TOLERANCE = 112, 1e-5
INPUTS, GOLDEN = load("moonvit", "inputs"), load("moonvit", "outputs")
GRIDS = INPUTS["image_grid_hws"].astype(np.int32)
IMAGES = np.split(INPUTS["pixel_values"].reshape(-1, CONFIG.patch_dim), np.cumsum(GRIDS.prod(1))[:-1])
TOWER = Tower(CONFIG, CompressorConfig("none"))


@functools.cache
def _params() -> dict:
    shapes = jax.eval_shape(
        lambda: TOWER.init(jax.random.key(0), jnp.zeros((1, 4, 588)), jnp.ones((1, 2), int), levels=0, compress=False)
    )
    weights = load("moonvit", "weights")
    return import_tensors(moonvit_table(CONFIG, ""), weights, {"tower": shapes["params"]})["tower"]


@functools.cache
def _run(levels: int):
    patches = padded_views(IMAGES, GRIDS, levels, ROOM)
    return TOWER.apply({"params": _params()}, patches, GRIDS, levels=levels, compress=False, collect=True)


def _raster(x, levels: int = 0) -> np.ndarray:
    """[V, P, ...] -> the images' own tokens one behind the other in raster order, as the golden arrays are."""
    parts = []
    for view, grid in zip(np.asarray(x), GRIDS, strict=True):
        order = merge_order(Grid(*grid.tolist()), levels)
        parts.append(view[np.argsort(order)])
    return np.concatenate(parts)


def _check(ours, name: str):
    np.testing.assert_allclose(ours, GOLDEN[name], atol=TOLERANCE, rtol=0, err_msg=name)


@pytest.mark.parametrize("levels", [0, 1])
def test_tower(levels):
    features, taps = _run(levels)
    _check(_raster(taps["embeddings"], levels), "patch_embed")
    for number, block in enumerate(taps["layers_before"]):
        _check(_raster(block, levels), f"block_{number}")
    _check(_raster(features, levels), "final_layernorm")
    _check(_raster(features, levels), "final_layernorm_f64")


def test_patches_and_positions():
    embedding = _params()["patch_embedding"]
    _check(np.concatenate(IMAGES) @ embedding["kernel"] + embedding["bias"], "patch_proj")
    blank = jnp.zeros((len(GRIDS), ROOM, CONFIG.patch_dim))
    _, taps = TOWER.apply({"params": _params()}, blank, GRIDS, levels=0, compress=False, collect=True)
    positions = np.split(_raster(taps["embeddings"] - embedding["bias"]), np.cumsum(GRIDS.prod(1))[:-1])
    for number, image in enumerate(positions):
        _check(image, f"pos_emb_{number}")


def test_inside_the_first_block():
    params = jax.tree.map(lambda leaf: leaf[0], _params()["layers"])
    angles = rope_angles_2d(*patch_coordinates(GRIDS, ROOM, 0), CONFIG.width // CONFIG.heads, ROPE_THETA)
    for ours, name in zip(angles, ("cos", "sin"), strict=True):
        _check(_raster(ours), f"rope_{name}")
    x = _run(0)[1]["embeddings"]
    normed = layers.LayerNorm(1e-5, jnp.float32).apply({"params": params["norm1"]}, x)
    _check(_raster(normed), "block_0.norm0")

    attention = params["attention"]
    joined = [normed @ attention[n]["kernel"] + attention[n]["bias"] for n in ("query", "key", "value")]
    _check(_raster(jnp.concatenate(joined, -1)), "block_0.wqkv")
    for ours, name in zip(joined, "qk", strict=False):
        _check(_raster(apply_rope_pairs(ours.reshape(*x.shape[:2], 4, 12), angles)), f"block_0.{name}_rot")
    segments = view_segments(jnp.asarray(GRIDS.prod(1)), ROOM)
    attended = layers.Attention(4, jnp.float32).apply({"params": attention}, normed, segments, angles)
    _check(_raster(attended), "block_0.wo")

    normed = layers.LayerNorm(1e-5, jnp.float32).apply({"params": params["norm2"]}, x + attended)
    _check(_raster(normed @ params["mlp"]["fc1"]["kernel"] + params["mlp"]["fc1"]["bias"]), "block_0.fc0")
    _check(_raster(layers.Mlp(80, jnp.float32).apply({"params": params["mlp"]}, normed)), "block_0.mlp")


def test_windows_are_the_released_mergers():
    features, _ = _run(1)
    for number, (view, image) in enumerate(zip(features, IMAGES, strict=True)):
        _check(merge_windows(view[: len(image)]), f"merged_{number}")
