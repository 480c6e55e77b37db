"""The full-size runs of v1 and v2: they build, and train what the recipes say."""

import functools

import jax
import pytest

from uhd_jax.cli.configs import load_file
from uhd_jax.config import ConfigError
from uhd_jax.models import uhd
from uhd_jax.training.stages import split_params

V1 = ["", "7b", "arxiv", "arxiv,7b", "mlp", "fixed_2x2", "no_overview,no_schema", "tune_tower,stage2"]
V2 = ["", "13b", "qwen2", "paper", "mask=5", "mask=1", "pyramid=bilinear", "pyramid=deconvolution", "bins=fixed"]
V2 += ["connector=perceiver", "connector=bilinear_mlp", "layout=A,stage1"]


@functools.cache
def abstract_params(model):
    return jax.eval_shape(functools.partial(uhd.init_params, model), jax.random.key(0))


@pytest.mark.parametrize("name", [f"uhd_v1.py:{arg}" for arg in V1] + [f"uhd_v2.py:{arg}" for arg in V2])
def test_every_stage_trains_all_the_parts_it_names(name):
    config = load_file(f"configs/{name}")
    params = abstract_params(config.model)
    for stage in config.train.stages:
        for part in stage.trainable:
            assert jax.tree.leaves(split_params(params, [part])[0]), f"{stage.name}: no parameters in {part}"


def sizes(params, part):
    return sum(leaf.size for leaf in jax.tree.leaves(split_params(params, [part])[0]))


def test_frozen_as_the_recipes_say():
    v1 = load_file("configs/uhd_v1.py").train.stages
    assert v1[0].trainable == ("connector", "connector_positions")
    assert load_file("configs/uhd_v1.py:mlp").train.stages[1].packed_length > 7 * 576
    assert v1[1].trainable == ("connector", "decoder")
    v2 = load_file("configs/uhd_v2.py").train.stages
    assert "upsampler" not in v2[1].trainable and "upsampler_fixup" in v2[1].trainable
    assert "upsampler_fixup" not in load_file("configs/uhd_v2.py:paper").train.stages[1].trainable
    assert (v2[0].max_slices, v2[0].template, v2[0].slots) == (1, "plain", 1)
    assert load_file("configs/uhd_v2.py:qwen2").train.stages[0].template == ""


def test_published_sizes():
    v2 = abstract_params(load_file("configs/uhd_v2.py").model)
    assert sizes(v2, "upsampler") + sizes(v2, "upsampler_fixup") == 1_062_066
    tower = sum(leaf.size for leaf in jax.tree.leaves(v2["tower"]))
    assert tower == 303_507_456
    v1 = abstract_params(load_file("configs/uhd_v1.py").model)
    assert round(sum(leaf.size for leaf in jax.tree.leaves(v1["connector"])) / 1e6, 2) == 137.84


@pytest.mark.parametrize(
    "name", ["uhd_v1.py:7b,13b", "uhd_v1.py:arxiv,mlp", "uhd_v1.py:v3", "uhd_v2.py:7b,qwen2", "uhd_v2.py:mask=x"]
)
def test_contradictions_and_unknown_options(name):
    with pytest.raises(ConfigError):
        load_file(f"configs/{name}")
