"""The compressor's start values and its eight variants."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_v4 import load

from uhd_jax.config import COMPRESSORS, TowerConfig
from uhd_jax.convert.minicpmv import compressor_table, tower_table
from uhd_jax.convert.tables import flatten, import_tensors, unflatten
from uhd_jax.models.compressor import REUSED, Compressor, reuse_init
from uhd_jax.models.vit import TowerLayer
from uhd_jax.ops.merge import merge_windows

CONFIG = TowerConfig(width=32, mlp_width=44, layers=1, heads=4, table_side=7)
D = "window_attention_reused_mlp"


@functools.cache
def _init(kind: str, seed: int = 0) -> dict:
    module = Compressor(kind, CONFIG, jnp.float32)
    return jax.jit(module.init)(jax.random.key(seed), jnp.zeros((1, 4, 32))).get("params", {})


@functools.cache
def _layer(seed: int = 1) -> dict:
    params = jax.jit(TowerLayer(CONFIG, jnp.float32).init)(jax.random.key(seed), jnp.zeros((1, 4, 32)), None)["params"]
    random = np.random.default_rng(seed + 1)
    return jax.tree.map(lambda leaf: np.asarray(leaf) + 0.1 * random.normal(size=leaf.shape).astype(np.float32), params)


def _apply(kind: str, params: dict, x: jax.Array) -> np.ndarray:
    return np.asarray(_jitted(Compressor(kind, CONFIG, jnp.float32))({"params": params}, x)[0])


def _apply_layer(params: dict, x: jax.Array) -> np.ndarray:
    return np.asarray(_jitted(TowerLayer(CONFIG, jnp.float32))({"params": params}, x, None))


@functools.cache
def _jitted(module):
    return jax.jit(module.apply)


def _golden() -> tuple[dict, dict]:
    """Layer k and the compressor the PyTorch code built from it, in our names."""
    weights = load("v4_reuse_init", "weights")
    layer = {}
    for entry in tower_table(CONFIG, ""):
        name = entry.theirs.replace("encoder.layers.{L}.", "layer.")
        if name in weights:
            layer[entry.ours.removeprefix("tower/layers/")] = entry.rule.forth(weights[name])
    merger = {name: tensor for name, tensor in weights.items() if name.startswith("vit_merger.")}
    shapes = jax.eval_shape(lambda params: params, _init(D))
    compressor = import_tensors(compressor_table("vit_merger."), merger, {"tower": {"compressor": shapes}})
    return unflatten(layer), compressor["tower"]["compressor"]


def test_reuse_init_equals_the_original():
    layer, golden = _golden()
    ours = flatten(reuse_init(D, layer, _init(D)))
    for path, tensor in flatten(golden).items():
        np.testing.assert_array_equal(ours[path], tensor, err_msg=path)


def _windows_of(x: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Raster tokens [1, rows * cols, D] -> merge order of one level."""
    x = x.reshape(1, rows // 2, 2, cols // 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(1, rows * cols, -1)


def test_golden_outputs():
    layer, _ = _golden()
    io = load("v4_reuse_init", "io")
    params = reuse_init(D, layer, _init(D))
    for given, expected in (("x", "y"), ("const_windows_x", "const_windows_y")):
        ours = _apply(D, params, _windows_of(io[given], 4, 8))
        np.testing.assert_allclose(ours, io[expected], atol=1e-5, rtol=0)


def test_equal_windows_give_what_the_layer_gives():
    layer = _layer()
    tokens = jax.random.normal(jax.random.key(3), (1, 6, 32))
    ours = _apply(D, reuse_init(D, layer, _init(D)), jnp.repeat(tokens, 4, axis=1))
    alone = tokens.reshape(6, 1, 32)  # each token attends to itself only
    expected = _apply_layer(layer, alone).reshape(1, 6, 32)
    np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)


def mean_distance(params: dict, layer: dict, seed: int = 4) -> float:
    """Relative distance between the compressor's output and the window mean of the layer's, on random windows."""
    x = jax.random.normal(jax.random.key(seed), (8, 64, 32))
    windows = merge_windows(x).reshape(-1, 4, 32)
    mean = _apply_layer(layer, windows).mean(1).reshape(8, 16, 32)
    ours = _apply(D, params, x)
    return float(np.linalg.norm(ours - mean) / np.linalg.norm(mean))


def test_reuse_stays_near_the_layer_and_random_does_not():
    layer = _layer()
    reused, random = (mean_distance(params, layer) for params in (reuse_init(D, layer, _init(D)), _init(D)))
    assert reused < 0.6 * random, (reused, random)


@pytest.mark.parametrize("kind", [kind for kind in COMPRESSORS if kind != "none"])
def test_variants(kind):
    """Each variant quarters the tokens, looks at its own window only, and uses all four tokens of it."""
    params = reuse_init(kind, _layer(), _init(kind))
    x = jax.random.normal(jax.random.key(5), (2, 16, 32))
    out = _apply(kind, params, x)
    assert out.shape == (2, 4, 32)
    for token in range(4):
        changed = _apply(kind, params, x.at[0, 4 + token].add(jnp.arange(32.0) / 8)) - out
        touched = np.abs(np.asarray(changed)).max(-1) > 1e-6
        np.testing.assert_array_equal(touched, [[False, True, False, False], [False] * 4])


@pytest.mark.parametrize("kind", REUSED)
def test_reused_variants_keep_structure_and_take_the_layers_weights(kind):
    fresh, layer = _init(kind), _layer()
    start = reuse_init(kind, layer, fresh)
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, fresh)
    shared = set(flatten(layer)) & set(flatten(start))
    assert shared or kind == "reused_mlp"
    for path in shared:
        np.testing.assert_array_equal(flatten(start)[path], flatten(layer)[path])


def test_cross_attention_queries_differ():
    params = reuse_init("cross_attention_mean", _layer(), _init("cross_attention_mean"))
    x = jax.random.normal(jax.random.key(6), (1, 16, 32))
    top_left, mean = (_apply(f"cross_attention_{q}", params, x) for q in ("top_left", "mean"))
    assert np.abs(top_left - mean).max() > 0.01


def test_plain_mlp_starts_as_identity_and_mean():
    params = _init("unshuffle_mlp")
    np.testing.assert_array_equal(params["linear_1"]["kernel"], np.eye(128))
    hidden = np.random.default_rng(0).normal(size=(128,)).astype(np.float32)
    np.testing.assert_allclose(hidden @ params["linear_2"]["kernel"], hidden.reshape(4, 32).mean(0), atol=1e-6)
