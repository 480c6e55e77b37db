"""Reading the golden files made with transformers' MiniCPM-V 4.6 modules, for parity tests."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file

from uhd_jax.config import ChatConfig, CompressorConfig, ConnectorConfig, DecoderConfig, ModelConfig, SlicingConfig
from uhd_jax.convert import minicpmv
from uhd_jax.convert.tables import import_tensors
from uhd_jax.models import uhd
from uhd_jax.slicing.pixels import merge_order
from uhd_jax.slicing.plan import Grid

GOLDEN = Path(__file__).parent / "golden"


def load(folder: str, name: str) -> dict[str, np.ndarray]:
    """The tensors of one golden file."""
    return load_file(GOLDEN / folder / f"{name}.safetensors")


def vision_model(folder: str) -> tuple[ModelConfig, dict]:
    """Config and parameters (tower and connector) of a `v4_vision_*` folder; the decoder is only a width."""
    meta = json.loads((GOLDEN / folder / "meta.json").read_text())
    raw = json.loads((GOLDEN / folder / "config.json").read_text())
    weights = {f"model.{name}": tensor for name, tensor in load(folder, "weights").items()}
    inserted = any("vit_merger" in name for name in weights)
    width = weights[f"model.merger.mlp.{meta['merger_times'] - 1}.linear_2.bias"].shape[0]
    config = ModelConfig(
        decoder=DecoderConfig(8, width, 8, 1, 1, 1, 2),
        tower=minicpmv.tower_config(raw["vision_config"]),
        compressor=CompressorConfig(
            "window_attention_reused_mlp" if inserted else "none", raw["vision_config"]["insert_layer_id"]
        ),
        connector=ConnectorConfig(rounds=meta["merger_times"]),
        slicing=SlicingConfig(),
        chat=ChatConfig(),
        mode=meta["mode"],
        dtype="float32",
    )
    abstract = jax.eval_shape(lambda: uhd.init_params(config, jax.random.key(0)))
    abstract.pop("decoder")
    return config, import_tensors(minicpmv.table(config), weights, abstract)


def split_views(pixel_values: np.ndarray, grids: np.ndarray) -> list[np.ndarray]:
    """[1, 3, 14, 14 * sum(P)] raster-ordered patches side by side -> per view [P, 3 * 14 * 14] in raster order."""
    _, channels, side, total = pixel_values.shape
    patches = pixel_values[0].reshape(channels, side, total // side, side).transpose(2, 0, 1, 3)
    patches = patches.reshape(total // side, -1)
    return np.split(patches, np.cumsum(np.prod(grids, axis=1))[:-1])


def padded_views(views: list[np.ndarray], grids: np.ndarray, levels: int, room: int) -> np.ndarray:
    """Views in raster order -> [V, room, patch_dim] in merge order, zeros behind each view."""
    out = np.zeros((len(views), room, views[0].shape[1]), views[0].dtype)
    for view, patches, grid in zip(out, views, grids, strict=True):
        view[: len(patches)] = patches[merge_order(Grid(*map(int, grid)), levels)]
    return out
