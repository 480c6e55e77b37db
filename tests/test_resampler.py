"""v1's resamplers: formulas in float64, start values, and what a view's result may and may not depend on."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uhd_jax.config import ConfigError, ConnectorConfig, PyramidConfig
from uhd_jax.models.resampler import Perceiver, SpatialResampler, position_table
from uhd_jax.ops.resize import resize_table
from uhd_jax.ops.roi_align import choose_bins, pool_windows

PIXELS = 12  # per patch: 3 x 2 x 2
MODULES = {
    "perceiver": Perceiver(ConnectorConfig("perceiver", query_side=3), 16, 2, jnp.float32),
    "perceiver on a pyramid": Perceiver(
        ConnectorConfig("perceiver", query_side=3, pyramid=PyramidConfig(3, "bilinear")), 16, 2, jnp.float32
    ),
    "spatial resampler": SpatialResampler(ConnectorConfig("spatial_resampler", query_side=3), 16, 2, jnp.float32),
}
GRIDS = [(4, 5), (1, 16), (16, 1), (1, 1), (0, 0), (7, 3)]
ROOM = 24
every_module = pytest.mark.parametrize("name", MODULES)


@functools.cache
def _params(name: str) -> dict:
    views = jnp.zeros((1, 4, 8)), jnp.full((1, 2), 2), jnp.zeros((1, 4, PIXELS))
    params = jax.jit(MODULES[name].init)(jax.random.key(0), *views)["params"]
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: np.asarray(leaf) + 0.3 * random.normal(size=leaf.shape).astype(np.float32), params)


def _features(grids: list, room: int, depth: int) -> np.ndarray:
    """Random, the same for a grid whatever the room and its neighbours; large noise behind each view."""
    out = 100 * np.random.default_rng(9).normal(size=(len(grids), room, depth)).astype(np.float32)
    for view, grid in zip(out, grids, strict=True):
        view[: grid[0] * grid[1]] = np.random.default_rng(grid).normal(size=(grid[0] * grid[1], depth))
    return out


def _run(name: str, grids: list, room: int, **changes) -> np.ndarray:
    module = dataclasses.replace(MODULES[name], **changes)
    views = _features(grids, room, 8), np.array(grids, np.int32), _features(grids, room, PIXELS)
    return np.asarray(jax.jit(module.apply)({"params": _params(name)}, *views))


@every_module
def test_a_view_depends_on_itself_alone(name):
    together = _run(name, GRIDS, ROOM)
    assert together.shape == (len(GRIDS), 9, 16)
    assert np.isfinite(together).all()
    for view in (0, 1, 3):
        rows, cols = GRIDS[view]
        alone = _run(name, [GRIDS[view]], rows * cols)[0]
        np.testing.assert_allclose(together[view], alone, atol=1e-5, rtol=0)
    assert np.abs(together[0] - together[5]).max() > 0.1


@every_module
def test_gradients_are_finite(name):
    features, pixels = _features(GRIDS, ROOM, 8), _features(GRIDS, ROOM, PIXELS)
    grids = np.array(GRIDS, np.int32)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(params, features):
        out = MODULES[name].apply({"params": params}, features, grids, pixels)
        return jnp.sum(jnp.sin(out))

    of_params, of_features = gradients(_params(name), features)
    for path, leaf in jax.tree_util.tree_leaves_with_path(of_params):
        assert np.isfinite(leaf).all()
        is_key_bias = jax.tree_util.keystr(path).endswith("['key']['bias']")  # the softmax takes it out again
        assert is_key_bias or np.abs(leaf).max() > 1e-4, jax.tree_util.keystr(path)
    assert np.isfinite(of_features).all()
    for view, (rows, cols) in zip(of_features, GRIDS, strict=True):
        if rows > 0:
            assert view[: rows * cols].any() and not view[rows * cols :].any()


@every_module
def test_bfloat16(name):
    half, exact = (_run(name, GRIDS, ROOM, dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), exact, atol=0.15)


def _layer_norm(x: np.ndarray, params: dict) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * params["scale"] + params["bias"]


def _attend(params: dict, query: np.ndarray, key: np.ndarray, value: np.ndarray, heads: int) -> np.ndarray:
    """[D], [K, D], [K, D] -> [D]: one query, one head after the other."""
    query, key, value = (
        x @ params[name]["kernel"] + params[name]["bias"]
        for x, name in ((query, "query"), (key, "key"), (value, "value"))
    )
    size = query.shape[-1] // heads
    out = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        logits = key[:, part] @ query[part] / np.sqrt(size)
        weights = np.exp(logits - logits.max())
        out.append(weights / weights.sum() @ value[:, part])
    return np.concatenate(out) @ params["out"]["kernel"] + params["out"]["bias"]


def _expected(name: str, params: dict, features: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """One view in float64; positions and pooling by operations that have tests of their own."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    count = grid[0] * grid[1]
    index = jnp.arange(count)[None]
    table, grids = jnp.asarray(params["position_table"]), jnp.asarray([grid])
    positions = np.asarray(resize_table(table, (3, 3), grids, index // grid[1], index % grid[1]), np.float64)[0]
    values = _layer_norm(features @ params["key_value"]["kernel"], params["key_value_norm"])
    keys = values + positions
    queries = _layer_norm(params["queries"], params["query_norm"]) + params["position_table"]
    if name == "perceiver":
        seen = [(keys, values)] * 9
    else:
        bins = choose_bins(grids)
        own = int(bins[0, 0] * bins[0, 1])
        pooled = [
            np.asarray(pool_windows(jnp.asarray(x)[None], grids, bins, 3)[0][0], np.float64) for x in (keys, values)
        ]
        seen = [(pooled[0][window, :own], pooled[1][window, :own]) for window in range(9)]
    found = np.stack([_attend(params["attention"], q, *kv, heads=2) for q, kv in zip(queries, seen, strict=True)])
    return _layer_norm(found, params["post_norm"]) @ params["output"]


@pytest.mark.parametrize("name", ["perceiver", "spatial resampler"])
@pytest.mark.parametrize("grid", [(4, 5), (1, 16), (7, 3)])
def test_formula(name, grid):
    ours = _run(name, GRIDS, ROOM)[GRIDS.index(grid)]
    features = _features([grid], grid[0] * grid[1], 8)[0].astype(np.float64)
    np.testing.assert_allclose(ours, _expected(name, _params(name), features, grid), atol=1e-5, rtol=0)


def test_perceiver_on_a_pyramid_sees_every_level():
    """On level 0 alone its result is that of no pyramid; a second level changes it."""
    name = "perceiver on a pyramid"
    alone = ConnectorConfig("perceiver", query_side=3)
    np.testing.assert_allclose(
        _run(name, GRIDS, ROOM, config=alone)[0],
        _expected("perceiver", _params(name), _features([(4, 5)], 20, 8)[0].astype(np.float64), (4, 5)),
        atol=1e-5,
        rtol=0,
    )
    assert np.abs(_run(name, GRIDS, ROOM, config=alone)[0] - _run(name, GRIDS, ROOM)[0]).max() > 0.05


def test_rounded_window_borders():
    name = "spatial resampler"
    rounded = dataclasses.replace(MODULES[name].config, box_dtype="bfloat16")
    exact, other = (_run(name, [(20, 31)], 620, config=config)[0] for config in (MODULES[name].config, rounded))
    assert 0 < np.abs(exact - other).max() < 1


def test_start_values():
    module = SpatialResampler(ConnectorConfig("spatial_resampler", query_side=4), 128, 2, jnp.float32)
    views = jnp.zeros((1, 4, 96)), jnp.full((1, 2), 2), jnp.zeros((1, 4, PIXELS))
    params = jax.jit(module.init)(jax.random.key(0), *views)["params"]
    np.testing.assert_array_equal(params["position_table"], position_table(4, 128))
    deviations = {
        "queries": (params["queries"], 0.02),
        "key_value": (params["key_value"]["kernel"], 0.02),
        "out": (params["attention"]["out"]["kernel"], 0.02),
        "query": (params["attention"]["query"]["kernel"], (2 * 128) ** -0.5),  # Xavier's: 2 / (in + 3 * in)
        "output": (params["output"], 128**-0.5),
    }
    for name, (leaf, deviation) in deviations.items():
        np.testing.assert_allclose(jnp.std(leaf), deviation, rtol=0.05, err_msg=name)
    assert np.abs(params["attention"]["value"]["kernel"]).max() <= (6 / (4 * 128)) ** 0.5  # uniform
    for name in ("query", "key", "value", "out"):
        assert not params["attention"][name]["bias"].any()


def test_position_table_of_an_odd_width():
    with pytest.raises(ConfigError, match="width: 30"):
        position_table(4, 30)
