"""Properties of the CLIP and MoonViT towers: what a view's features may and may not depend on."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uhd_jax.config import (
    CompressorConfig,
    ConfigError,
    ConnectorConfig,
    DecoderConfig,
    ModelConfig,
    SlicingConfig,
    TowerConfig,
)
from uhd_jax.models import uhd
from uhd_jax.models.clip import ClipTower
from uhd_jax.models.vit import ROPE_THETA, Tower, TowerLayer
from uhd_jax.ops.merge import merge_windows
from uhd_jax.ops.rope import apply_rope_pairs, rope_angles_2d
from uhd_jax.slicing.pixels import cut_views, merge_order
from uhd_jax.slicing.plan import Grid, Size, make_plan

SIZES = dict(width=24, mlp_width=40, layers=2, heads=2, patch_size=2, norm_eps=1e-5)
CLIP = TowerConfig(kind="clip", table_side=4, skipped_layers=1, **SIZES)
MOONVIT = TowerConfig(kind="moonvit", table_side=5, table_cols=3, **SIZES)
NONE, POOL, MODULE_D = CompressorConfig("none"), CompressorConfig("average_pool", 0), CompressorConfig(after_layer=0)

# module, levels of the merge order, patch grids that it takes
TOWERS = {
    "clip": (ClipTower(CLIP), 0, [(4, 4), (1, 16), (16, 1), (3, 5)]),
    "moonvit": (Tower(MOONVIT, NONE), 0, [(5, 3), (1, 16), (16, 1), (2, 7)]),
    "moonvit, compressed": (Tower(MOONVIT, MODULE_D), 2, [(4, 4), (4, 8), (8, 4), (12, 4)]),
}
pytestmark = pytest.mark.usefixtures("unoptimised")
every_tower = pytest.mark.parametrize("name", TOWERS)


@functools.cache
def _params(module):
    levels, compress = (2, True) if getattr(module, "compressor", NONE).kind != "none" else (0, False)

    @jax.jit
    def make(keys):
        shapes = jnp.zeros((1, 16, 12)), jnp.full((1, 2), 4)
        params = module.init(keys[0], *shapes, levels=levels, compress=compress)["params"]
        leaves, tree = jax.tree.flatten(params)
        noise = jax.random.split(keys[1], len(leaves))
        return tree.unflatten(
            leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, noise, strict=True)
        )

    return make(jax.random.split(jax.random.key(0)))


def _pixels(grid) -> np.ndarray:
    return np.random.default_rng(grid).uniform(-1, 1, (grid[0] * grid[1], 12)).astype(np.float32)


@functools.cache
def _program(name, changes=()):
    module, levels, _ = TOWERS[name]
    module = dataclasses.replace(module, **dict(changes))
    return jax.jit(functools.partial(module.apply, levels=levels, compress=name.endswith("compressed")))


def _encode(name, grids, room=48, **changes):
    """Features of each view, cut to its own tokens. (0, 0) is an empty slot; behind each view stands noise."""
    patches = np.random.default_rng(room).normal(size=(len(grids), room, 12)).astype(np.float32)
    for view, grid in zip(patches, grids, strict=True):
        view[: grid[0] * grid[1]] = _pixels(grid)
    params = _params(TOWERS[name][0])
    features, _ = _program(name, tuple(changes.items()))({"params": params}, patches, jnp.array(grids, jnp.int32))
    assert np.isfinite(np.asarray(features, np.float32)).all()
    merged = room // features.shape[1]
    return {grid: np.asarray(view[: grid[0] * grid[1] // merged]) for grid, view in zip(grids, features, strict=True)}


@every_tower
def test_features_depend_on_the_view_alone(name):
    """Neither on room, nor on neighbours, nor on order."""
    grids = TOWERS[name][2]
    together = _encode(name, grids)
    others = _encode(name, [(0, 0), *grids[::-1]], 80)
    for grid in grids:
        (alone,) = _encode(name, [grid], 64).values()
        assert np.abs(alone).max() > 0.1
        np.testing.assert_allclose(together[grid], alone, atol=2e-5, rtol=0)
        np.testing.assert_allclose(others[grid], alone, atol=2e-5, rtol=0)


@every_tower
def test_grids_share_a_program_and_are_read(name):
    module, levels, grids = TOWERS[name]
    params, compress, traced = _params(module), name.endswith("compressed"), []

    @jax.jit
    def encode(patches, grids):
        traced.append(grids.shape)
        return module.apply({"params": params}, patches, grids, levels=levels, compress=compress)[0]

    outputs = [encode(jnp.ones((1, 48, 12)), jnp.array([grid])) for grid in grids]
    assert len(traced) == 1
    for a, b in zip(outputs, outputs[1:], strict=False):
        assert float(jnp.abs(a - b)[:, 0].max()) > 1e-3


@every_tower
def test_gradients_are_finite_and_reach_what_runs(name):
    module, levels, grids = TOWERS[name]
    grids = jnp.array([*grids, (0, 0)])
    patches = jax.random.normal(jax.random.key(2), (len(grids), 48, 12))
    compress = name.endswith("compressed")

    def loss(params, patches):
        features, _ = module.apply({"params": params}, patches, grids, levels=levels, compress=compress)
        return jnp.sum(jnp.sin(features))

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(_params(module), patches)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads[0]):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        never = name == "clip" and path.startswith("final_norm")
        still = np.asarray(leaf[-1] if name == "clip" and path.startswith("layers") else 0)
        assert not still.any(), path  # the skipped layer
        assert bool(leaf.any()) != never, path


@every_tower
def test_ways_to_compute_the_same(name):
    grids = TOWERS[name][2]
    expected = _encode(name, grids)
    for changes in ({"scan": False}, {"remat": "full"}, {"remat": "dots"}):
        for grid, view in _encode(name, grids, **changes).items():
            np.testing.assert_allclose(view, expected[grid], atol=1e-5, rtol=0)


@every_tower
def test_bfloat16_computes_near_float32(name):
    grids = TOWERS[name][2]
    expected = _encode(name, grids)
    for grid, view in _encode(name, grids, dtype=jnp.bfloat16).items():
        assert view.dtype == jnp.bfloat16
        error = np.abs(view.astype(np.float32) - expected[grid])
        assert 1e-4 < error.max() and error.mean() < 0.05


@pytest.mark.parametrize("tower", [CLIP, MOONVIT], ids=["clip", "moonvit"])
def test_merge_order_changes_the_order_only(tower):
    """For connectors that merge: positions follow the patches."""
    module = ClipTower(tower) if tower.kind == "clip" else Tower(tower, NONE)
    raster, grids = _pixels((4, 8))[None], jnp.array([(4, 8)])
    expected, _ = module.apply({"params": _params(module)}, raster, grids, levels=0, compress=False)
    for levels in (1, 2):
        order = merge_order(Grid(4, 8), levels)
        found, _ = module.apply({"params": _params(module)}, raster[:, order], grids, levels=levels, compress=False)
        np.testing.assert_allclose(found, expected[:, order], atol=1e-5, rtol=0)


@pytest.mark.parametrize("levels", [1, 2])
def test_merged_tokens_are_numbered_on_the_halved_grid(levels):
    """MoonViT with a compressor, against its layers run one by one with rows and columns written out."""
    module = Tower(MOONVIT, POOL)
    params, (rows, cols) = _params(Tower(MOONVIT, NONE)), (4, 8)
    order = merge_order(Grid(rows, cols), levels)
    patches = jnp.asarray(_pixels((rows, cols))[None, order])
    found, taps = module.apply(
        {"params": params}, patches, jnp.array([(rows, cols)]), levels=levels, compress=True, collect=True
    )

    def angles(rows, cols, order):
        row, col = (index.reshape(1, -1)[:, order] for index in np.indices((rows, cols)))
        return rope_angles_2d(row, col, 12, ROPE_THETA)

    x = taps["embeddings"]
    for number in range(MOONVIT.layers):
        layer = jax.tree.map(lambda leaf, i=number: leaf[i], params["layers"])
        turned = angles(rows, cols, order) if number == 0 else angles(2, 4, merge_order(Grid(2, 4), levels - 1))
        x = TowerLayer(MOONVIT, jnp.float32).apply({"params": layer}, x, None, turned)
        if number == 0:
            x = jnp.mean(merge_windows(x), axis=-2)
    np.testing.assert_allclose(taps["layers_after"][-1], x, atol=1e-5, rtol=0)
    assert found.shape == (1, 8, 24)


def test_rotation_on_two_axes():
    """Scores depend on the distance in rows and columns alone; columns turn even pairs, rows odd ones."""
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 2, 12))

    def at(x, row, col):
        return apply_rope_pairs(x, rope_angles_2d(jnp.full((1, 1), row), jnp.full((1, 1), col), 12, 100.0))

    near = jnp.sum(at(query, 3, 5) * at(key, 1, 4), axis=-1)
    far = jnp.sum(at(query, 33, 25) * at(key, 31, 24), axis=-1)
    np.testing.assert_allclose(near, far, atol=1e-4)
    np.testing.assert_array_equal(at(query, 0, 0), query)
    columns = [0, 1, 4, 5, 8, 9]
    moved = np.asarray(at(query, 0, 1) != query)[0, 0]
    assert moved[:, columns].all() and moved.sum() == 2 * len(columns)
    first = np.asarray(at(query, 0, 1))[0, 0, 0, 4:6]  # the second frequency, 100 ** (-4 / 12)
    angle = 100.0 ** (-1 / 3)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    np.testing.assert_allclose(first, turn @ np.asarray(query)[0, 0, 0, 4:6], atol=1e-6)


@pytest.mark.parametrize("encoding, compressor", [("slices", MODULE_D), ("global", NONE)], ids=["slices", "global"])
def test_moonvit_takes_views_of_either_encoding(encoding, compressor):
    """v4's slicing before, v4's connector behind; every view as if alone."""
    config = ModelConfig(
        decoder=DecoderConfig(32, 16, 16, 1, 1, 1, 4),
        tower=dataclasses.replace(MOONVIT, patch_size=14),
        compressor=compressor,
        connector=ConnectorConfig(rounds=2 if compressor.kind == "none" else 1),
        slicing=SlicingConfig(scale_resolution=112, encoding=encoding),
        dtype="float32",
    )
    params = jax.jit(uhd.init_params, static_argnums=0)(config, jax.random.key(0))
    size = Size(130, 260)
    plan = make_plan(size, config.slicing, 14, config.merge_levels())
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    views = cut_views(image, plan, 14)
    assert (len(views) == 1) == (encoding == "global")
    grids = np.array([view.patch_grid for view in plan.views] + [(0, 0)], np.int32)
    patches = np.zeros((len(grids), 256, 784), np.uint8)
    for room, view in zip(patches, views, strict=False):
        room[: len(view)] = view
    encode = jax.jit(functools.partial(uhd.encode_views, config=config))
    together = encode(params, patches, grids)
    assert np.isfinite(together).all()
    for number, view in enumerate(views):
        alone = encode(params, view[None], grids[number : number + 1])[0]
        np.testing.assert_allclose(together[number, : len(alone)], alone, atol=1e-5, rtol=0)


def test_siglip_keeps_its_square_table():
    with pytest.raises(ConfigError, match="table_cols: 3 with table_side 5: kind 'siglip2' has a square table"):
        dataclasses.replace(MOONVIT, kind="siglip2")
