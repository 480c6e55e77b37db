"""RoI-align of uniform windows: against the box-by-box procedure, golden boxes and bins; rooms, gradients, bfloat16."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from uhd_jax.ops.resize import resize_table
from uhd_jax.ops.roi_align import choose_bins, pool_table, pool_windows

GOLDEN = np.load(Path(__file__).parent / "golden" / "a_v1_resampler.npz")
GRIDS = [(24, 24), (20, 27), (7, 75), (33, 16), (3, 14), (1, 16), (16, 1), (1, 1), (10, 10), (10, 57), (11, 4), (0, 0)]
ROOM = 620
f32 = np.float32

_pool_windows = jax.jit(pool_windows, static_argnums=(3, 4))
_pool_table = jax.jit(pool_table, static_argnums=(1, 4, 5))


def _boxes(grid: tuple[int, int], side: int, kind=np.float32) -> np.ndarray:
    """float32[side**2, 4] (x1, y1, x2, y2), row-major, rounded to `kind`."""
    y, x = (np.array([i * size / side for i in range(side + 1)]).astype(kind).astype(f32) for size in grid)
    return np.array([(x[j], y[i], x[j + 1], y[i + 1]) for i in range(side) for j in range(side)])


def _samples(first: f32, last: f32, bins: int, size: int) -> list[list[tuple[int, int, float] | None]]:
    """Per bin the (lower cell, upper cell, share of the upper) of every sample, None beyond the map; in float32."""
    extent = max(f32(last - first), f32(1))
    step = f32(extent / f32(bins))
    count = math.ceil(step)
    out = []
    for number in range(bins):
        samples = []
        for sample in range(count):
            offset = f32(f32(f32(sample + 0.5) * step) / f32(count))
            position = f32(f32(first + f32(f32(number) * step)) + offset)
            low = int(position)
            if position < -1 or position > size:
                samples.append(None)
            elif low >= size - 1:
                samples.append((size - 1, size - 1, 0.0))
            else:
                samples.append((low, low + 1, float(position) - low))
        out.append(samples)
    return out


def _roi_align(image: np.ndarray, boxes: np.ndarray, bins: tuple[int, int]) -> np.ndarray:
    """float64[boxes, bins, D], one box, one bin, one sample after the other."""
    height, width, depth = image.shape
    out = np.zeros((len(boxes), bins[0] * bins[1], depth))
    for box, (x1, y1, x2, y2) in enumerate(boxes):
        for i, down in enumerate(_samples(y1, y2, bins[0], height)):
            for j, across in enumerate(_samples(x1, x2, bins[1], width)):
                for y in down:
                    for x in across:
                        if y is None or x is None:
                            continue
                        (y0, y1_, fy), (x0, x1_, fx) = y, x
                        top = image[y0, x0] * (1 - fx) + image[y0, x1_] * fx
                        bottom = image[y1_, x0] * (1 - fx) + image[y1_, x1_] * fx
                        out[box, i * bins[1] + j] += (top * (1 - fy) + bottom * fy) / (len(down) * len(across))
    return out


def _maps(grids: list, room: int, depth: int = 2) -> np.ndarray:
    """Random features, the same for a grid whatever the room and its neighbours; noise behind each view."""
    out = np.random.default_rng(9).normal(size=(len(grids), room, depth)).astype(np.float32)
    for view, grid in zip(out, grids, strict=True):
        count = grid[0] * grid[1]
        view[:count] = np.random.default_rng(grid).normal(size=(count, depth))
    return out


def _pool(grids: list, room: int, side: int, box_dtype: str = "float32") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pooled maps, masks and bins."""
    bins = choose_bins(jnp.asarray(grids))
    pooled, mask = _pool_windows(_maps(grids, room), jnp.asarray(grids), bins, side, box_dtype)
    return np.asarray(pooled), np.asarray(mask), np.asarray(bins)


def _nearest(height: int, width: int) -> tuple[int, int]:
    proposals = [(4, 2), (3, 2), (4, 3), (3, 3), (2, 4), (2, 3), (3, 4)]  # (width, height)
    errors = [abs(math.log(width / height) - math.log(w / h)) for w, h in proposals]
    w, h = proposals[errors.index(min(errors))]
    return h, w


def test_bins_of_every_small_grid():
    grids = np.array([(h, w) for h in range(1, 65) for w in range(1, 65)], np.int32)
    expected = np.array([_nearest(*map(int, grid)) for grid in grids])
    np.testing.assert_array_equal(jax.jit(choose_bins)(grids), expected)


def test_bins_of_long_grids():
    grids = np.array([(1, 9216), (9216, 1), (96, 96), (72, 128), (1, 2**20)], np.int32)
    np.testing.assert_array_equal(choose_bins(grids), [_nearest(*map(int, grid)) for grid in grids])


def test_golden_bins():
    names = [key.removeprefix("pool_") for key in GOLDEN if key.startswith("pool_")]
    grids = jnp.asarray([tuple(map(int, name.split("x"))) for name in names])
    np.testing.assert_array_equal(choose_bins(grids), [GOLDEN[f"pool_{name}"] for name in names])


@pytest.mark.parametrize("side", [4, 12])
@pytest.mark.parametrize("box_dtype", ["float32", "bfloat16"])
def test_against_box_by_box(side, box_dtype):
    kind = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[box_dtype]
    grids = [*GRIDS[:-1], (1, 435)] if side == 12 else GRIDS[:-1]  # bfloat16 rounds 435 up
    pooled, mask, bins = _pool(grids, ROOM, side, box_dtype=box_dtype)
    for grid, view, own, (high, wide) in zip(grids, pooled, mask, bins, strict=True):
        image = _maps([grid], grid[0] * grid[1])[0].reshape(*grid, -1).astype(np.float64)
        expected = _roi_align(image, _boxes(grid, side, kind), (high, wide))
        np.testing.assert_array_equal(own, np.arange(12) < high * wide)
        np.testing.assert_allclose(view[:, : high * wide], expected, atol=2e-5, rtol=0, err_msg=str(grid))
        assert not view[:, high * wide :].any()


def test_rounded_borders_differ():
    exact, rounded = (_pool([(20, 27)], 540, 12, box_dtype=kind)[0] for kind in ("float32", "bfloat16"))
    assert np.abs(exact - rounded).max() > 0.01


def test_golden_boxes():
    names = [key.removeprefix("boxes144_") for key in GOLDEN if key.startswith("boxes144_")]
    grids = [tuple(map(int, name.split("x"))) for name in names]
    pooled, _, bins = _pool(grids, ROOM, 12)
    for grid, name, view, (high, wide) in zip(grids, names, pooled, bins, strict=True):
        image = _maps([grid], grid[0] * grid[1])[0].reshape(*grid, -1).astype(np.float64)
        expected = _roi_align(image, GOLDEN[f"boxes144_{name}"][:, 1:], (high, wide))
        np.testing.assert_allclose(view[:, : high * wide], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("side", [4, 8, 12, 16])
def test_samples_on_the_edge(side):
    """Small grids, whose last windows reach beyond the map; which samples still count is a matter of rounding."""
    views = [((size, size), bins) for size in range(1, side + 1) for bins in [(2, 3), (3, 4), (4, 2)]]
    grids, bins = (jnp.asarray(part) for part in zip(*views, strict=True))
    pooled, _ = _pool_windows(jnp.ones((len(views), side * side, 1)), grids, bins, side)
    for (grid, shape), view in zip(views, np.asarray(pooled), strict=True):
        expected = _roi_align(np.ones((*grid, 1)), _boxes(grid, side), shape)
        np.testing.assert_allclose(view[:, : math.prod(shape)], expected, atol=1e-5, rtol=0, err_msg=str(grid))


@pytest.mark.parametrize("box_dtype", ["float32", "bfloat16"])
def test_a_table_is_pooled_as_its_resized_map_is(box_dtype):
    table = jnp.asarray(_maps([(12, 12)], 144, depth=4)[0])
    grids = jnp.asarray(GRIDS)
    bins, cols = choose_bins(grids), jnp.maximum(grids[:, 1:], 1)
    index = jnp.arange(ROOM)[None]
    resized = resize_table(table, (12, 12), grids, index // cols, index % cols)
    expected, _ = _pool_windows(resized, grids, bins, 12, box_dtype)
    np.testing.assert_allclose(_pool_table(table, (12, 12), grids, bins, 12, box_dtype), expected, atol=1e-5, rtol=0)


def test_a_view_depends_on_itself_alone():
    together, _, _ = _pool(GRIDS, ROOM, 12)
    assert np.isfinite(together).all()
    assert not together[GRIDS.index((0, 0))].any()
    for view in (1, 4, 7):
        grid = GRIDS[view]
        alone, _, _ = _pool([grid], grid[0] * grid[1], 12)
        np.testing.assert_allclose(together[view], alone[0], atol=1e-6, rtol=0)


def test_gradients_are_those_of_a_linear_map():
    grids = jnp.asarray(GRIDS)
    bins, maps, table = choose_bins(grids), jnp.asarray(_maps(GRIDS, ROOM)), jnp.asarray(_maps([(4, 4)], 16)[0])
    gradients = []
    for function, x in (
        (lambda m: pool_windows(m, grids, bins, 4)[0], maps),
        (lambda t: pool_table(t, (4, 4), grids, bins, 4), table),
    ):
        out = jax.jit(function)(x)
        weights = jnp.asarray(np.random.default_rng(1).normal(size=out.shape), jnp.float32)
        gradients.append(jax.jit(jax.grad(lambda x, f=function, w=weights: jnp.sum(f(x) * w)))(x))
        assert np.isfinite(gradients[-1]).all()
        np.testing.assert_allclose(jnp.sum(gradients[-1] * x), jnp.sum(weights * out), rtol=1e-3)
    for view, (rows, cols) in zip(np.asarray(gradients[0]), GRIDS, strict=True):
        assert not view[rows * cols :].any()


def test_bfloat16():
    grids = jnp.asarray(GRIDS)
    maps = jnp.asarray(_maps(GRIDS, ROOM), jnp.bfloat16)
    pooled, _ = _pool_windows(maps, grids, choose_bins(grids), 12)
    exact, _ = _pool_windows(maps.astype(jnp.float32), grids, choose_bins(grids), 12)
    assert pooled.dtype == jnp.bfloat16
    np.testing.assert_allclose(pooled.astype(jnp.float32), exact, atol=0.05)
