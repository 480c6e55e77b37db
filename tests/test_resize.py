"""Resizing: against formulas written out in float64, against torch, against golden positions; and rooms."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uhd_jax.ops.resize import bicubic_taps, resize_bilinear, resize_table, upsample_2x

GOLDEN = np.load(Path(__file__).parent / "golden" / "a_v1_resampler.npz")
GRIDS = [(8, 8), (5, 9), (11, 4), (3, 14), (1, 16), (16, 1), (1, 1), (12, 12), (0, 0)]
ROOM = 144

_resize_table = jax.jit(resize_table, static_argnums=1)


def _kernel(x: float) -> float:
    """Keys' cubic with a = -0.75."""
    x = abs(x)
    if x <= 1:
        return 1.25 * x**3 - 2.25 * x**2 + 1
    return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def _matrix(size: int, source: int, kernel=_kernel, reach: int = 2) -> np.ndarray:
    """float64[size, source]: every source cell spread by the kernel, cells beyond the border moved onto it."""
    out = np.zeros((size, source))
    for i in range(size):
        centre = (i + 0.5) * source / size - 0.5
        for cell in range(int(np.floor(centre)) - reach, int(np.floor(centre)) + reach + 2):
            out[i, np.clip(cell, 0, source - 1)] += kernel(centre - cell)
    return out


def _resized(image: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    return np.einsum("yh,xw,hwd->yxd", rows, cols, image.astype(np.float64)).reshape(-1, image.shape[-1])


def _coordinates(grids: list, room: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    grids = jnp.asarray(grids, jnp.int32)
    cols = jnp.maximum(grids[:, 1:], 1)
    return grids, jnp.arange(room)[None] // cols, jnp.arange(room)[None] % cols


def _maps(grids: list, room: int, depth: int = 3) -> np.ndarray:
    """Random features, the same for a grid whatever the room and its neighbours; noise behind each view."""
    out = np.random.default_rng(9).normal(size=(len(grids), room, depth)).astype(np.float32)
    for view, grid in zip(out, grids, strict=True):
        count = grid[0] * grid[1]
        view[:count] = np.random.default_rng(grid).normal(size=(count, depth))
    return out


@pytest.mark.parametrize(("size", "source"), [(7, 12), (24, 12), (12, 12), (5, 24), (1, 12), (40, 1), (3, 2)])
def test_taps(size, source):
    index, weight = bicubic_taps(jnp.asarray([size]), jnp.arange(size)[None], source)
    ours = np.zeros((size, source))
    np.add.at(ours, (np.arange(size)[:, None], np.asarray(index[0])), np.asarray(weight[0]))
    np.testing.assert_allclose(ours, _matrix(size, source), atol=1e-6)


def test_taps_from_sources_of_several_sizes():
    together = bicubic_taps(jnp.asarray([6, 10]), jnp.tile(jnp.arange(6), (2, 1)), jnp.asarray([3, 4]))
    for view, (size, source) in enumerate([(6, 3), (10, 4)]):
        alone = bicubic_taps(jnp.asarray([size]), jnp.arange(6)[None], source)
        for ours, expected in zip(together, alone, strict=True):
            np.testing.assert_array_equal(ours[view], expected[0])


def test_table_is_what_the_formula_gives():
    table = np.random.default_rng(0).normal(size=(12 * 7, 5)).astype(np.float32)
    out = np.asarray(_resize_table(table, (12, 7), *_coordinates(GRIDS, ROOM)))
    assert out.dtype == np.float32
    for view, (rows, cols) in zip(out, GRIDS, strict=True):
        expected = _resized(table.reshape(12, 7, 5), _matrix(rows, 12), _matrix(cols, 7))
        np.testing.assert_allclose(view[: rows * cols], expected, atol=3e-6)


def test_table_of_the_grids_own_shape_is_untouched():
    table = np.random.default_rng(0).normal(size=(144, 5)).astype(np.float32) * 1e3
    out = _resize_table(table, (12, 12), *_coordinates([(12, 12)], 150))
    np.testing.assert_array_equal(out[0, :144], table)


def test_golden_positions():
    names = [key.removeprefix("pos_") for key in GOLDEN if key.startswith("pos_")]
    assert len(names) == 5
    grids = [tuple(map(int, name.split("x"))) for name in names]
    out = _resize_table(GOLDEN["sd/pos_embed"], (4, 4), *_coordinates(grids, 70))
    for view, name, (rows, cols) in zip(out, names, grids, strict=True):
        np.testing.assert_allclose(view[: rows * cols], GOLDEN[f"pos_{name}"], atol=5e-6, rtol=0)


def test_upsampling_is_what_the_formula_gives():
    maps = _maps(GRIDS, ROOM)
    out = np.asarray(jax.jit(upsample_2x)(jnp.asarray(maps), jnp.asarray(GRIDS)))
    assert out.shape == (len(GRIDS), 4 * ROOM, 3)
    for view, source, (rows, cols) in zip(out, maps, GRIDS, strict=True):
        image = source[: rows * cols].reshape(rows, cols, 3)
        expected = _resized(image, _matrix(2 * rows, rows), _matrix(2 * cols, cols))
        np.testing.assert_allclose(view[: 4 * rows * cols], expected, atol=3e-6)


@pytest.mark.parametrize("side", [1, 4, 12])
def test_bilinear_is_what_the_formula_gives(side):
    maps = _maps(GRIDS, ROOM)
    out = np.asarray(jax.jit(resize_bilinear, static_argnums=2)(jnp.asarray(maps), jnp.asarray(GRIDS), side))
    for view, source, (rows, cols) in zip(out, maps, GRIDS, strict=True):
        if rows == 0:
            continue
        image = source[: rows * cols].reshape(rows, cols, 3)
        matrices = (_matrix(side, size, lambda x: max(1 - abs(x), 0)) for size in (rows, cols))
        np.testing.assert_allclose(view, _resized(image, *matrices), atol=3e-6)


def test_torch_agrees():
    torch = pytest.importorskip("torch")
    views = GRIDS[:-1]
    maps, table = _maps(views, ROOM), _maps([(12, 12)], 144)[0]
    grids, y, x = _coordinates(views, ROOM)
    resized = _resize_table(table, (12, 12), grids, y, x)
    upsampled = jax.jit(upsample_2x)(maps, grids)
    reduced = jax.jit(resize_bilinear, static_argnums=2)(maps, grids, 12)
    for view, (rows, cols) in enumerate(views):
        for ours, source, before, after, mode in (
            (resized, table, (12, 12), (rows, cols), "bicubic"),
            (upsampled, maps[view], (rows, cols), (2 * rows, 2 * cols), "bicubic"),
            (reduced, maps[view], (rows, cols), (12, 12), "bilinear"),
        ):
            image = torch.from_numpy(source[: before[0] * before[1]].reshape(1, *before, 3).transpose(0, 3, 1, 2))
            theirs = torch.nn.functional.interpolate(image, size=after, mode=mode, align_corners=False)[0].numpy()
            expected = theirs.transpose(1, 2, 0).reshape(-1, 3)
            np.testing.assert_allclose(ours[view, : len(expected)], expected, atol=5e-6, rtol=0)


def test_a_view_depends_on_itself_alone():
    functions = (upsample_2x, lambda x, grids: resize_bilinear(x, grids, 12))
    for function, factor in zip(map(jax.jit, functions), (4, None), strict=True):
        together = function(jnp.asarray(_maps(GRIDS, 200)), jnp.asarray(GRIDS))
        assert np.isfinite(together).all()
        for view in (1, 4, 6):
            grid = GRIDS[view]
            count = grid[0] * grid[1]
            alone = function(jnp.asarray(_maps([grid], count)), jnp.asarray([grid]))[0]
            kept = together[view, : factor * count] if factor else together[view]
            np.testing.assert_allclose(kept, alone, atol=1e-6, rtol=0)


def test_gradients_are_those_of_a_linear_map():
    grids, rows, cols = _coordinates(GRIDS, ROOM)
    maps, table = jnp.asarray(_maps(GRIDS, ROOM)), jnp.asarray(_maps([(4, 4)], 16)[0])
    for function, x in (
        (lambda t: resize_table(t, (4, 4), grids, rows, cols), table),
        (lambda m: upsample_2x(m, grids), maps),
        (lambda m: resize_bilinear(m, grids, 12), maps),
    ):
        out = jax.jit(function)(x)
        weights = jnp.asarray(np.random.default_rng(1).normal(size=out.shape), jnp.float32)
        gradient = jax.jit(jax.grad(lambda x, f=function, w=weights: jnp.sum(f(x) * w)))(x)
        assert np.isfinite(gradient).all()
        np.testing.assert_allclose(jnp.sum(gradient * x), jnp.sum(weights * out), rtol=1e-3)


def test_dtypes():
    maps = jnp.asarray(_maps(GRIDS, ROOM), jnp.bfloat16)
    for function in map(jax.jit, (upsample_2x, lambda x, grids: resize_bilinear(x, grids, 12))):
        out = function(maps, jnp.asarray(GRIDS))
        assert out.dtype == jnp.bfloat16
        exact = function(maps.astype(jnp.float32), jnp.asarray(GRIDS))
        np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.03)
