"""Options of hierarchical window attention; tests/test_parity_v2_hiwin.py has its numbers."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_params

from uhd_jax.config import ConnectorConfig, PyramidConfig
from uhd_jax.models.hiwin import Hiwin, level_bins, pool_projected
from uhd_jax.models.layers import LayerNorm
from uhd_jax.models.resampler import SpatialResampler
from uhd_jax.ops.roi_align import MAX_BINS, choose_bins, pool_windows

pytestmark = pytest.mark.usefixtures("unoptimised")

GRIDS = jnp.array([(6, 6), (4, 7), (0, 0)], jnp.int32)
FEATURES = jax.random.normal(jax.random.key(0), (3, 36, 6))
PATCHES = jax.random.normal(jax.random.key(1), (3, 36, 12))
ONE_SET = ConnectorConfig("hiwin", query_side=3, query_sets=1)


@functools.partial(jax.jit, static_argnums=0)
def run(config: ConnectorConfig, params: dict) -> jax.Array:
    return Hiwin(config, 16, 4, jnp.float32).apply({"params": params}, FEATURES, GRIDS, PATCHES)


@pytest.fixture(scope="module")
def params():
    module = Hiwin(ONE_SET, 16, 4, jnp.float32)
    return random_params(jax.eval_shape(lambda: module.init(jax.random.key(0), FEATURES, GRIDS, PATCHES))["params"])


def test_bins():
    for level in range(4):
        assert level_bins("selective", level, GRIDS).tolist()[:2] == [[3, 3], [2, 4]]
        assert level_bins("fixed", level, GRIDS).tolist() == [[3, 3]] * 3
    by_level = [level_bins("pyramid", level, GRIDS).tolist()[0] for level in range(4)]
    assert by_level == [[2, 2], [3, 3], [3, 4], [3, 4]]
    assert max(np.prod(by_level, axis=1)) == MAX_BINS


def test_what_the_kinds_of_bins_change(params):
    selective, fixed, pyramid = (
        run(dataclasses.replace(ONE_SET, bins=kind), params) for kind in ("selective", "fixed", "pyramid")
    )
    np.testing.assert_array_equal(selective[0], fixed[0])  # a square view has 3x3 bins either way
    assert np.abs(selective[1] - fixed[1]).max() > 1e-2
    assert np.abs(pyramid[0] - fixed[0]).max() > 1e-2


def test_pooling_first_and_projecting_later_is_the_same():
    vector = jax.ShapeDtypeStruct((16,), jnp.float32)
    linear = {"kernel": jax.ShapeDtypeStruct((6, 16), jnp.float32), "bias": vector}
    args = FEATURES, *random_params((linear, {"scale": vector, "bias": vector}))
    bins = choose_bins(GRIDS)

    def later(features, linear, norm):
        return pool_projected(features, GRIDS, bins, linear, norm, 1e-6, 3, "float32")

    def first(features, linear, norm):
        projected = features @ linear["kernel"] + linear["bias"]
        return pool_windows(LayerNorm(1e-6, jnp.float32).apply({"params": norm}, projected), GRIDS, bins, 3)

    np.testing.assert_allclose(later(*args)[0], first(*args)[0], atol=1e-5, rtol=0)
    np.testing.assert_array_equal(later(*args)[1], first(*args)[1])

    def gradients(pool):
        return jax.tree.leaves(jax.jit(jax.grad(lambda *a: jnp.sum(pool(*a)[0] ** 3), argnums=(0, 1, 2)))(*args))

    for ours, expected in zip(gradients(later), gradients(first), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def test_window_borders_are_rounded_where_asked(params):
    sharp = run(ONE_SET, params)
    rounded = run(dataclasses.replace(ONE_SET, box_dtype="bfloat16"), params)
    np.testing.assert_array_equal(sharp[0], rounded[0])  # borders of 2, 4 and 6 cells
    assert 1e-5 < np.abs(sharp[1] - rounded[1]).max() < 0.1  # of 7/3 and 4/3 cells


def test_one_set_of_queries_without_a_pyramid_is_the_spatial_resampler(params):
    level, embedding = params["level_0"], params["level_embeddings"]["level_0"]
    plain = dict(params, level_0=dict(level, bias=0 * level["bias"]), level_embeddings={"level_0": 0 * embedding})
    names = ("position_table", "output", "query_norm", "key_value_norm", "attention", "post_norm")
    same = {name: params[name] for name in names}
    assert set(params) == {*names, "queries", "level_0", "level_embeddings"}
    same |= {"queries": params["queries"]["set_0"], "key_value": {"kernel": level["kernel"]}}
    ours, theirs = (
        dataclasses.replace(ONE_SET, kind=kind, box_dtype="bfloat16") for kind in ("hiwin", "spatial_resampler")
    )
    expected = SpatialResampler(theirs, 16, 4, jnp.float32).apply({"params": same}, FEATURES, GRIDS, PATCHES)
    np.testing.assert_allclose(run(ours, plain), expected, atol=1e-6, rtol=0)
    assert np.abs(run(ours, params) - expected).max() > 1e-2


def test_parameters_of_the_released_form():
    config = ConnectorConfig("hiwin", query_side=3, pyramid=PyramidConfig(5, "bilinear"))
    module = Hiwin(config, 16, 4, jnp.float32)
    tree = jax.eval_shape(lambda: module.init(jax.random.key(0), FEATURES, GRIDS, PATCHES))["params"]
    assert set(tree["queries"]) == {"set_0", "set_1", "set_2", "set_3"}
    assert set(tree["level_embeddings"]) == {"level_0", "level_2"}
    assert tree["join"]["kernel"].shape == (64, 16)
    assert {"level_0", "level_2", "set_norm"} < set(tree) and "level_1" not in tree
