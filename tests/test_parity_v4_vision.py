"""Tower, compressor and connector against every stored intermediate of the PyTorch modules."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_v4 import load, padded_views, split_views, vision_model

from uhd_jax.models import uhd
from uhd_jax.slicing.pixels import merge_order
from uhd_jax.slicing.plan import Grid

FOLDERS = ["v4_vision_16x", "v4_vision_4x", "v4_vision_16x_times2"]
TOLERANCE = 1e-5


def _raster(x: np.ndarray, grids: np.ndarray, levels: int) -> np.ndarray:
    """[V, P, D] in merge order -> [sum of real tokens, D] in raster order, as the PyTorch modules concatenate."""
    parts = []
    for view, grid in zip(x, grids, strict=True):
        order = merge_order(Grid(*map(int, grid)), levels)
        raster = np.empty((len(order), x.shape[-1]), x.dtype)
        raster[order] = view[: len(order)]
        parts.append(raster)
    return np.concatenate(parts)


@pytest.fixture(scope="module", params=FOLDERS)
def run(request):
    """Golden outputs beside ours for one folder."""
    config, params = vision_model(request.param)
    inputs, golden = load(request.param, "inputs"), load(request.param, "outputs")
    grids = inputs["target_sizes"]
    levels = config.merge_levels()
    patches = padded_views(split_views(inputs["pixel_values"], grids), grids, levels, room=128)
    compress = config.mode == "16x"
    features, taps = uhd.tower(config).apply(
        {"params": params["tower"]}, patches, jnp.asarray(grids), levels=levels, compress=compress, collect=True
    )
    tokens = uhd.connector(config).apply({"params": params["connector"]}, features)
    return config, grids, levels, golden, jax.tree.map(np.asarray, taps), np.asarray(features), np.asarray(tokens)


def test_every_layer(run):
    config, grids, levels, golden, taps, features, _ = run
    ours = {"embeddings": _raster(taps["embeddings"], grids, levels)}
    for index, layer in enumerate(taps["layers_before"]):
        ours[f"layer_{index:02d}"] = _raster(layer, grids, levels)
    inside = int("compressor" in taps)
    for index, layer in enumerate(taps.get("layers_after", [])):
        ours[f"layer_{index + len(taps['layers_before']):02d}"] = _raster(layer, grids // 2, levels - 1)
    if inside:
        ours["vit_merger"] = _raster(taps["compressor"], grids // 2, levels - 1)
    ours["last_hidden_state"] = _raster(features, grids // 2**inside, levels - inside)
    stored = {name for name in golden if not name.startswith("features") and name != "vit_merger_attn_window_order"}
    assert stored == set(ours)
    for name in stored:
        np.testing.assert_allclose(ours[name], golden[name][0], atol=TOLERANCE, rtol=0, err_msg=name)


def test_window_attention(run):
    _, grids, levels, golden, taps, _, _ = run
    if "vit_merger_attn_window_order" not in golden:
        assert "compressor_attention" not in taps
        return
    ours = []
    for view, grid in zip(taps["compressor_attention"], grids, strict=True):
        # golden order: windows in raster order, four patches each; ours: the same windows in merge order
        windows = view[: np.prod(grid)].reshape(-1, 4, view.shape[-1])
        raster = np.empty_like(windows)
        raster[merge_order(Grid(*map(int, grid // 2)), levels - 1)] = windows
        ours.append(raster.reshape(-1, view.shape[-1]))
    golden_tokens = golden["vit_merger_attn_window_order"][0]
    np.testing.assert_allclose(np.concatenate(ours), golden_tokens, atol=TOLERANCE, rtol=0)


def test_visual_tokens_in_raster_order(run):
    _, grids, levels, golden, _, _, tokens = run
    for index, grid in enumerate(grids):
        count = int(np.prod(grid)) // 4**levels
        np.testing.assert_allclose(tokens[index, :count], golden[f"features_view_{index}"], atol=TOLERANCE, rtol=0)
