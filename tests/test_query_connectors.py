"""What every connector with a fixed number of visual tokens per view promises, whatever the views' patch grids."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_params

from uhd_jax.config import QUERY_CONNECTORS, ConnectorConfig, PyramidConfig
from uhd_jax.models.hiwin import Hiwin
from uhd_jax.models.projector import BilinearMlp
from uhd_jax.models.resampler import Perceiver, SpatialResampler

pytestmark = pytest.mark.usefixtures("unoptimised")

MODULES = {"bilinear_mlp": BilinearMlp, "perceiver": Perceiver, "spatial_resampler": SpatialResampler, "hiwin": Hiwin}
CASES = {
    "bilinear_mlp": ConnectorConfig("bilinear_mlp", query_side=3, pyramid=PyramidConfig(3, "deconvolution")),
    "perceiver": ConnectorConfig("perceiver", query_side=3, pyramid=PyramidConfig(3, "bilinear")),
    "spatial_resampler": ConnectorConfig("spatial_resampler", query_side=3),
    "hiwin": ConnectorConfig("hiwin", query_side=3, pyramid=PyramidConfig(3)),
    "hiwin, one set": ConnectorConfig("hiwin", query_side=3, query_sets=1, bins="pyramid", pyramid=PyramidConfig(2)),
}
WIDTH, TOWER_WIDTH, HEADS = 16, 6, 4
GRIDS = np.array([(3, 5), (1, 16), (16, 1), (0, 0), (1, 1), (4, 4)], np.int32)
ROOM = 16


def module(case: str, dtype=jnp.float32):
    return MODULES[CASES[case].kind](CASES[case], WIDTH, HEADS, dtype)


def views(grids: np.ndarray, room: int, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Features, grids and patches. A view's own depend on its grid alone; what lies behind them on the seed."""
    behind = np.random.default_rng(seed)
    features = behind.normal(size=(len(grids), room, TOWER_WIDTH)).astype(np.float32)
    patches = behind.normal(size=(len(grids), room, 588)).astype(np.float32)
    for view, (rows, cols) in enumerate(grids):
        own = np.random.default_rng([rows, cols])
        features[view, : rows * cols] = own.normal(size=(rows * cols, TOWER_WIDTH))
        patches[view, : rows * cols] = own.normal(size=(rows * cols, 588))
    return jnp.asarray(features), jnp.asarray(grids), jnp.asarray(patches)


@functools.cache
def params(case: str):
    shapes = jax.eval_shape(lambda: module(case).init(jax.random.key(0), *views(GRIDS, ROOM)))["params"]
    return random_params(shapes)


def test_every_kind_is_tested():
    assert {config.kind for config in CASES.values()} == set(QUERY_CONNECTORS) == set(MODULES)


@pytest.mark.parametrize("case", CASES)
def test_a_views_tokens_depend_on_nothing_but_the_view(case):
    traces = []

    @jax.jit
    def run(params, *views):
        traces.append(views)
        return module(case).apply({"params": params}, *views)

    expected = run(params(case), *views(GRIDS, ROOM))
    assert expected.shape == (6, 9, WIDTH)
    used = GRIDS[:, 0] > 0
    for left, right in zip(*np.triu_indices(6, 1), strict=True):
        assert np.abs(expected[left] - expected[right]).max() > 1e-3  # no view is another's stand-in

    close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=0)
    order = np.array([5, 3, 0, 4, 2, 1])
    close(run(params(case), *views(GRIDS[order], ROOM, seed=1))[used[order]], expected[order][used[order]])
    neighbours = GRIDS.copy()
    neighbours[:3] = (2, 8), (0, 0), (7, 2)
    close(run(params(case), *views(neighbours, ROOM, seed=2))[4:], expected[4:])
    assert len(traces) == 1  # eight grids, one program
    close(run(params(case), *views(GRIDS[:3], ROOM + 5, seed=3)), expected[:3])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_finite(case, dtype):
    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(params, features, grids, patches):
        out = module(case, jnp.dtype(dtype)).apply({"params": params}, features.astype(dtype), grids, patches)
        return jnp.sum(out.astype(jnp.float32) ** 2), out  # of empty slots too

    features, grids, patches = views(GRIDS, ROOM)
    (_, out), (of_params, of_features) = run(params(case), features, grids, patches)
    assert out.dtype == dtype
    assert all(
        np.isfinite(leaf).all() for leaf in jax.tree.leaves((np.asarray(out, np.float32), of_params, of_features))
    )
    assert all(np.any(leaf) for leaf in jax.tree.leaves(of_params))
    for view, cells in enumerate(np.prod(GRIDS, axis=1)):
        if not cells:
            continue  # what an empty slot gives is for nobody
        assert not np.any(of_features[view, cells:])
        assert np.any(of_features[view, :cells])
