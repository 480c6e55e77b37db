"""The pyramid: against the obvious computation and torch, thin views, neighbours, rooms, empty slots, gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uhd_jax.analysis.neighbourhood import WAYS
from uhd_jax.config import PyramidConfig
from uhd_jax.models.pyramid import Pyramid, pool_patches
from uhd_jax.ops import neighbourhood as nb

pytestmark = pytest.mark.usefixtures("unoptimised")

WIDTH, SIDE = 5, 4  # of features; of a patch, in pixels
GRIDS = [(3, 4), (1, 12), (12, 1), (1, 1), (0, 0)]
ROOM = 12
KINDS = ("vdim", "bilinear", "deconvolution")


def view_inputs(grid, room, seed=0):
    """Features [room, WIDTH] and patches [room, 3 * SIDE**2] of a view; what lies behind it differs with the room."""
    rows, cols = grid
    own, behind = np.random.default_rng((seed, *grid)), np.random.default_rng(room)
    made = []
    for width in (WIDTH, 3 * SIDE**2):
        array = behind.normal(size=(room, width)).astype(np.float32)
        array[: rows * cols] = own.normal(size=(rows * cols, width))
        made.append(array)
    return made


def batch(grids, room):
    features, patches = zip(*(view_inputs(grid, room) for grid in grids), strict=True)
    return jnp.stack(features), jnp.asarray(grids, jnp.int32), jnp.stack(patches)


@functools.cache
def module(kind, mask=15):
    return Pyramid(PyramidConfig(feature_scale_mask=mask, upsampling=kind), jnp.float32)


@functools.cache
def params(kind):
    drawn = jax.jit(module(kind).init)(jax.random.key(0), *batch(GRIDS, ROOM)).get("params", {})
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + 0.3 * random.normal(size=leaf.shape).astype(np.float32), drawn)


@functools.cache
def program(kind):
    return jax.jit(module(kind).apply)


def levels_of(kind, grids, room):
    return program(kind)({"params": params(kind)}, *batch(grids, room))


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_depends_neither_on_room_nor_on_neighbours_nor_on_its_place(kind):
    together = levels_of(kind, GRIDS, ROOM)
    for place, grid in enumerate(GRIDS[:-1]):
        alone = levels_of(kind, [grid], ROOM + 3)
        for level, ((features, grids), (own, _)) in enumerate(zip(together, alone, strict=True)):
            cells = 4**level * grid[0] * grid[1]
            assert features.shape == (len(GRIDS), 4**level * ROOM, WIDTH)
            assert grids[place].tolist() == [2**level * grid[0], 2**level * grid[1]]
            np.testing.assert_allclose(features[place, :cells], own[0, :cells], atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_finite_everywhere(kind):
    features, grids, patches = batch(GRIDS, ROOM)

    def total(params, features, patches):
        return sum(jnp.sum(jnp.square(x)) for x, _ in module(kind).apply({"params": params}, features, grids, patches))

    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(params(kind), features, patches)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_chooses_levels_and_their_parameters(kind):
    inputs = batch(GRIDS, ROOM)
    chosen = module(kind, mask=5)
    weights = jax.eval_shape(chosen.init, jax.random.key(0), *inputs).get("params", {})
    names = {
        "vdim": {"up1", "up2", "fixup"},
        "bilinear": set(),
        "deconvolution": {"deconvolution_1", "deconvolution_2"},
    }
    assert set(weights) == names[kind]
    made = jax.jit(chosen.apply)({"params": params(kind)}, *inputs)
    assert [x.shape[1] for x, _ in made] == [ROOM, 16 * ROOM]
    np.testing.assert_array_equal(made[0][0], inputs[0])
    if kind != "vdim":  # there the last level alone has the fixup
        np.testing.assert_allclose(made[1][0], levels_of(kind, GRIDS, ROOM)[2][0], atol=1e-6)
    alone = module(kind, mask=1)
    assert "params" not in alone.init(jax.random.key(0), *inputs)
    assert len(alone.apply({}, *inputs)) == 1


@functools.partial(jax.jit, static_argnames=("level", "way"))
def enlarged(source, kernel, grids, level, way):
    """In raster order, from arguments in patch order."""
    compute, patch_order = WAYS[way]
    if patch_order:
        return nb.to_raster(compute(source, kernel, grids, level), grids, level)
    return compute(nb.to_raster(source, grids, level - 1), nb.to_raster(kernel, grids, level), grids, level)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_the_folded_kernel_is_the_sum_over_neighbours_of_the_enlarged_map(level):
    random = np.random.default_rng(level)
    grids = jnp.asarray(GRIDS, jnp.int32)
    source = jnp.asarray(random.normal(size=(len(GRIDS), 4 ** (level - 1) * ROOM, WIDTH)), jnp.float32)
    kernel = jnp.asarray(random.normal(size=(len(GRIDS), 4**level * ROOM, 49)), jnp.float32)
    folded, plain = (enlarged(source, kernel, grids, level, way) for way in ("folded", "taps"))
    for view, (rows, cols) in enumerate(GRIDS):
        own = slice(4**level * rows * cols)
        np.testing.assert_allclose(folded[view, own], plain[view, own], atol=2e-5, rtol=0)


@pytest.mark.parametrize("way", ["rows", "windows"])
def test_the_other_measured_ways_agree(way):
    random = np.random.default_rng(0)
    grids, level = jnp.full((2, 2), 4, jnp.int32), 2
    source = jnp.asarray(random.normal(size=(2, 64, WIDTH)), jnp.float32)
    kernel = jnp.asarray(random.normal(size=(2, 256, 49)), jnp.float32)
    made, expected = (enlarged(source, kernel, grids, level, name) for name in (way, "folded"))
    np.testing.assert_allclose(made, expected, atol=2e-5, rtol=0)


def test_reflection_is_that_of_numpy_also_of_short_axes():
    for size in (1, 2, 3, 4, 7):
        expected = np.pad(np.arange(size), 3, mode="reflect" if size > 1 else "edge")
        coords = jnp.arange(-3, size + 3)[None]
        assert nb.reflected(coords, jnp.asarray([size]))[0].tolist() == expected.tolist()


def test_windows_in_several_pieces_equal_those_in_one(monkeypatch):
    random = np.random.default_rng(0)
    cells = jnp.asarray(random.normal(size=(2, 20, 4)), jnp.float32)
    windows = jnp.asarray(random.integers(0, 20, (2, 7, 9)), jnp.int32)
    weights = jnp.asarray(random.normal(size=(2, 7, 3, 9)), jnp.float32)

    def total(cells, weights):
        return jnp.sum(jnp.sin(nb.combine_windows(cells, windows, weights)))

    whole = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(cells, weights)
    monkeypatch.setattr(nb, "GATHERED_BYTES", 3 * 9 * 4 * 4)  # three patches at a time, the last three not full
    pieces = jax.jit(jax.value_and_grad(lambda *inputs: total(*inputs), argnums=(0, 1)))(cells, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), pieces, whole)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_pooling_is_torchs_adaptive_pooling(level):
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(0).normal(size=(1, 3, 28, 42)).astype(np.float32)
    expected = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(image), (2 * 2**level, 3 * 2**level)).numpy()
    patches = image.reshape(3, 2, 14, 3, 14).transpose(1, 3, 0, 2, 4).reshape(1, 6, -1)
    grids = jnp.asarray([(2, 3)], jnp.int32)
    ours = nb.to_raster(pool_patches(jnp.asarray(patches), level), grids, level)[0]
    np.testing.assert_allclose(ours, expected[0].reshape(3, -1).T, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS[:-1])
def test_bilinear_is_torchs(grid):
    torch = pytest.importorskip("torch")
    features = view_inputs(grid, ROOM)[0][: grid[0] * grid[1]]
    image = torch.from_numpy(features.T.reshape(1, WIDTH, *grid))
    for level in (1, 2, 3):
        expected = torch.nn.functional.interpolate(image, scale_factor=2**level, mode="bilinear")[0].numpy()
        ours = levels_of("bilinear", [grid], ROOM)[level][0][0, : 4**level * grid[0] * grid[1]]
        np.testing.assert_allclose(ours, expected.reshape(WIDTH, -1).T, atol=1e-5)


def test_deconvolution_is_torchs():
    torch = pytest.importorskip("torch")
    rows, cols = GRIDS[0]
    image = torch.from_numpy(view_inputs(GRIDS[0], ROOM)[0][: rows * cols].T.reshape(1, WIDTH, rows, cols))
    for level in (1, 2, 3):
        weights = params("deconvolution")[f"deconvolution_{level}"]
        kernel = np.asarray(weights["kernel"]).reshape(WIDTH, 2, 2, WIDTH).transpose(0, 3, 1, 2)
        kernel, bias = torch.from_numpy(kernel.copy()), torch.from_numpy(np.array(weights["bias"]))
        image = torch.nn.functional.conv_transpose2d(image, kernel, bias, stride=2)
        ours = levels_of("deconvolution", GRIDS, ROOM)[level][0][0, : 4**level * rows * cols]
        np.testing.assert_allclose(ours, image[0].numpy().reshape(WIDTH, -1).T, atol=2e-5)


def test_dropout_is_of_whole_channels_and_only_when_asked_for():
    inputs = batch([(3, 4), (3, 4)], ROOM)
    apply = jax.jit(functools.partial(module("vdim", 2).apply, method="cells"), static_argnames="dropout")

    def level(fixup, key, dropout=True):
        weights = {**params("vdim"), "fixup": {"kernel": fixup, "bias": jnp.zeros(WIDTH)}}
        return np.asarray(apply({"params": weights}, *inputs, dropout=dropout, rngs={"dropout": key})[1])

    key, none = jax.random.key(0), jnp.zeros((WIDTH, WIDTH))
    made = level(none, key)
    assert not np.allclose(made, level(none, key, dropout=False), atol=1e-3)  # inside the level
    assert not np.allclose(made, level(none, jax.random.key(1)), atol=1e-3)
    factor = (level(jnp.eye(WIDTH), key) - made) / made  # of the fixup: one for all cells of a channel of a view
    kept = np.abs(factor[:, 0] - 0.1 / 0.8) < 1e-4
    assert 0 < kept.sum() < kept.size
    np.testing.assert_allclose(factor, np.where(kept, 0.1 / 0.8, 0.0)[:, None] * np.ones_like(factor), atol=1e-4)


def test_detached_levels_pass_no_gradient_down():
    features, grids, patches = batch(GRIDS[:1], ROOM)

    def total(weights, detach):
        inputs = {"params": weights}, features, grids, patches
        return jnp.sum(jnp.square(module("vdim", 4).apply(*inputs, method="cells", detach=detach)[2]))

    gradients = jax.jit(lambda weights: [jax.grad(total)(weights, detach) for detach in (False, True)])(params("vdim"))
    for detach, gradient in zip((False, True), gradients, strict=True):
        assert (np.abs(gradient["up1"]["range_1"]["kernel"]).max() == 0) == detach
        assert np.abs(gradient["up2"]["range_1"]["kernel"]).max() > 0
