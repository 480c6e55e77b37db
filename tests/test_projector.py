"""The projectors without attention."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uhd_jax.config import ConnectorConfig, PyramidConfig
from uhd_jax.models.projector import BilinearMlp, PlainMlp

PIXELS = 12  # per patch: 3 x 2 x 2
GRIDS = [(4, 5), (1, 16), (16, 1), (1, 1), (0, 0)]
ROOM = 24
MODULES = {
    "mlp": PlainMlp(ConnectorConfig("mlp"), 16, 2, jnp.float32),
    "bilinear": BilinearMlp(ConnectorConfig("bilinear_mlp", query_side=3), 16, 2, jnp.float32),
    "pyramid": BilinearMlp(
        ConnectorConfig("bilinear_mlp", query_side=3, pyramid=PyramidConfig(3, "bilinear")), 16, 2, jnp.float32
    ),
}
every_module = pytest.mark.parametrize("name", MODULES)


@functools.cache
def _params(name: str) -> dict:
    views = jnp.zeros((1, 4, 8)), jnp.full((1, 2), 2), jnp.zeros((1, 4, PIXELS))
    return jax.jit(MODULES[name].init)(jax.random.key(0), *views)["params"]


def _views(grids: list, room: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, the same for a grid whatever the room and its neighbours and large noise behind; grids; no pixels."""
    out = 100 * np.random.default_rng(9).normal(size=(len(grids), room, 8)).astype(np.float32)
    for view, grid in zip(out, grids, strict=True):
        view[: grid[0] * grid[1]] = np.random.default_rng(grid).normal(size=(grid[0] * grid[1], 8))
    return out, np.array(grids, np.int32), np.zeros((len(grids), room, PIXELS), np.float32)


def _run(name: str, grids: list, room: int) -> np.ndarray:
    return np.asarray(jax.jit(MODULES[name].apply)({"params": _params(name)}, *_views(grids, room)))


def _mlp(params: dict, x: np.ndarray) -> np.ndarray:
    hidden = x @ params["linear_1"]["kernel"] + params["linear_1"]["bias"]
    hidden = hidden * (1 + jax.scipy.special.erf(hidden / np.sqrt(2))) / 2
    return hidden @ params["linear_2"]["kernel"] + params["linear_2"]["bias"]


@every_module
def test_a_view_depends_on_itself_alone(name):
    together = _run(name, GRIDS, ROOM)
    assert together.shape == (len(GRIDS), ROOM if name == "mlp" else 9, 16)
    assert np.isfinite(together).all()
    for view in (0, 1, 3):
        count = GRIDS[view][0] * GRIDS[view][1]
        alone = _run(name, [GRIDS[view]], count)[0]
        np.testing.assert_allclose(together[view, : len(alone)], alone, atol=1e-5, rtol=0)


def test_plain_mlp():
    expected = _mlp(_params("mlp"), _views([(4, 5)], 20)[0][0])
    np.testing.assert_allclose(_run("mlp", [(4, 5)], 20)[0], expected, atol=1e-5)


def test_maps_are_reduced_before_the_mlp():
    constant = np.ones((1, 20, 1), np.float32) * np.arange(8)  # resized, it stays what it is
    views = constant.astype(np.float32), np.array([(4, 5)], np.int32), np.zeros((1, 20, PIXELS), np.float32)
    for name, levels in (("bilinear", 1), ("pyramid", 2)):
        assert _params(name)["linear_1"]["kernel"].shape == (8 * levels, 16)
        out = MODULES[name].apply({"params": _params(name)}, *views)[0]
        expected = _mlp(_params(name), np.tile(np.arange(8.0), levels))
        np.testing.assert_allclose(out, np.tile(expected, (9, 1)), atol=1e-5)
    # Of 3 x 3 cells from 6 x 9, the middle one lies between rows 2 and 3 and upon column 4.
    image = np.random.default_rng(0).normal(size=(6, 9, 8)).astype(np.float32)
    views = image.reshape(1, 54, 8), np.array([(6, 9)], np.int32), np.zeros((1, 54, PIXELS), np.float32)
    out = MODULES["bilinear"].apply({"params": _params("bilinear")}, *views)[0, 4]
    np.testing.assert_allclose(out, _mlp(_params("bilinear"), (image[2, 4] + image[3, 4]) / 2), atol=1e-5)


@every_module
def test_gradients_are_finite(name):
    features, grids, pixels = _views(GRIDS, ROOM)
    own = (np.arange(ROOM) < grids.prod(axis=1, keepdims=True))[..., None]

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(params, features):
        out = jnp.sin(MODULES[name].apply({"params": params}, features, grids, pixels))
        return jnp.sum(out * own if name == "mlp" else out)

    of_params, of_features = gradients(_params(name), features)
    for leaf in jax.tree.leaves(of_params):
        assert np.isfinite(leaf).all() and leaf.any()
    assert np.isfinite(of_features).all()


@every_module
def test_bfloat16(name):
    views = _views(GRIDS, ROOM)
    module = type(MODULES[name])(MODULES[name].config, 16, 2, jnp.bfloat16)
    out = module.apply({"params": _params(name)}, *views)
    assert out.dtype == jnp.bfloat16
    own = slice(1) if name == "mlp" else slice(None)  # what lies behind the views is large
    exact = _run(name, GRIDS, ROOM)
    np.testing.assert_allclose(out[:4, own].astype(jnp.float32), exact[:4, own], atol=0.05)
