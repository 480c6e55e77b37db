"""CLIP's and MoonViT's name tables: exact there and back, strict, and blind to the second CLIP of v2's checkpoints."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_v4 import load

from uhd_jax.config import CompressorConfig, TowerConfig
from uhd_jax.config.presets import CLIP_L_14_336, MOONVIT_SO400M
from uhd_jax.convert.tables import ConvertError, export_tensors, flatten, import_tensors
from uhd_jax.convert.towers import clip_tower_table, moonvit_table
from uhd_jax.models.clip import ClipTower
from uhd_jax.models.vit import Tower

SIZES = dict(heads=4, layers=3, norm_eps=1e-5)
CLIP = TowerConfig(kind="clip", width=32, mlp_width=64, table_side=4, skipped_layers=1, **SIZES)
MOONVIT = TowerConfig(kind="moonvit", width=48, mlp_width=80, table_side=8, table_cols=6, **SIZES)
V2_TOWER = "model.vision_tower.vision_tower.vision_model."
V2_COPY = "model.mm_projector.upsampler.model.0.vision_tower.vision_model."


def _abstract(config: TowerConfig) -> dict:
    module = ClipTower(config) if config.kind == "clip" else Tower(config, CompressorConfig("none"))
    patches, grids = jnp.zeros((1, 4, config.patch_dim)), jnp.ones((1, 2), int)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), patches, grids, levels=0, compress=False))
    return {"tower": shapes["params"]}


def _clip_weights(prefix: str) -> dict[str, np.ndarray]:
    golden = np.load(Path(__file__).parent / "golden" / "b_clip_interp.npz")
    return {n.replace("sd/vision_model.", prefix): golden[n] for n in golden.files if n.startswith("sd/")}


def _moonvit_weights(prefix: str) -> dict[str, np.ndarray]:
    return {prefix + name: tensor for name, tensor in load("moonvit", "weights").items()}


FAMILIES = {
    "clip": (CLIP, clip_tower_table(CLIP, V2_TOWER), _clip_weights(V2_TOWER)),
    "moonvit": (MOONVIT, moonvit_table(MOONVIT, ""), _moonvit_weights("")),
    "moonvit in Kimi-VL": (MOONVIT, moonvit_table(MOONVIT, "vision_tower."), _moonvit_weights("vision_tower.")),
}
every_family = pytest.mark.parametrize("config, table, weights", FAMILIES.values(), ids=FAMILIES)


@every_family
def test_there_and_back_is_exact(config, table, weights):
    params = import_tensors(table, weights, _abstract(config))
    back = export_tensors(table, params)
    assert set(back) == set(weights)
    for name, tensor in weights.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


@every_family
def test_whatever_does_not_fit_is_named(config, table, weights):
    norm = next(name for name in weights if name.endswith("layers.1.layer_norm1.bias") or name.endswith("1.norm0.bias"))
    wide = next(name for name in weights if name.endswith("fc1.weight"))
    table_name = next(name for name in weights if "pos" in name)
    broken = {name: tensor for name, tensor in weights.items() if name != norm}
    broken |= {wide: weights[wide].T, table_name: np.swapaxes(weights[table_name], 0, 1), "extra.weight": np.ones(3)}
    with pytest.raises(ConvertError) as raised:
        import_tensors(table, broken, _abstract(config))
    lines = str(raised.value).splitlines()
    assert len(lines) == 5
    for start in (f"missing {norm}", f"{wide} has", f"{table_name} has", "unexpected extra.weight"):
        assert any(line.strip().startswith(start) for line in lines), start


def test_the_second_clip_is_never_taken():
    copy = {name: tensor + 1 for name, tensor in _clip_weights(V2_COPY).items()}
    both = copy | _clip_weights(V2_TOWER)
    table, abstract = clip_tower_table(CLIP, V2_TOWER), _abstract(CLIP)
    with pytest.raises(ConvertError) as raised:
        import_tensors(table, both, abstract)
    assert str(raised.value).count(f"unexpected {V2_COPY}") == len(copy)
    found = import_tensors(table, both, abstract, lambda name: name in copy)
    expected = import_tensors(table, _clip_weights(V2_TOWER), abstract)
    for path, leaf in flatten(expected).items():
        np.testing.assert_array_equal(flatten(found)[path], leaf, err_msg=path)


def test_heads_keep_their_rows():
    """Rows D .. 2D of the joined projection are the keys."""
    config, table, weights = FAMILIES["moonvit"]
    key = import_tensors(table, weights, _abstract(config))["tower"]["layers"]["attention"]["key"]
    np.testing.assert_array_equal(key["kernel"][2], weights["encoder.blocks.2.wqkv.weight"][48:96].T)
    np.testing.assert_array_equal(key["bias"][2], weights["encoder.blocks.2.wqkv.bias"][48:96])


@pytest.mark.parametrize(
    "preset, table, parameters, tensors",
    [(CLIP_L_14_336, clip_tower_table, 303_507_456, 391), (MOONVIT_SO400M, moonvit_table, 416_866_032, 329)],
    ids=["clip", "moonvit"],
)
def test_published_counts(preset, table, parameters, tensors):
    config = TowerConfig(**preset)
    shapes = flatten(_abstract(config))
    assert sum(leaf.size for leaf in shapes.values()) == parameters
    entries = table(config, "")
    assert {entry.ours for entry in entries} == set(shapes)
    assert len({name for entry in entries for name in entry.names(config.layers)}) == tensors
