"""The full-size configuration files of v4 and of MiniCPM-V 4.6."""

import importlib.util
from pathlib import Path

import pytest

from uhd_jax import cost
from uhd_jax.config import ConfigError, from_config_dict
from uhd_jax.slicing.plan import Size, plan_image

FILE = Path(__file__).parents[1] / "configs" / "uhd_v4.py"


def load(arg="", file=FILE):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_config_dict(module.get_config(arg))


def test_the_published_model_in_four_stages():
    config = load()
    assert sum(cost.parameter_counts(config.model).values()) == 8_753_160_624
    assert [stage.name for stage in config.train.stages] == ["stage1", "stage2", "stage3", "stage4"]
    assert config.train.stages[1].trainable == ("tower", "patch_embedding", "position_table", "compressor")
    assert config.train.stages[3].data.options == {"path": "data/stage4.jsonl"}
    assert config.model.compressor.after_layer == 6
    assert (config.train.optimizer.b2, config.train.optimizer.weight_decay) == (0.98, 0.01)


def test_options():
    (stage,) = load("recipe=released_script,stage1,data=/d,rows=8,step_scale=2").train.stages
    assert stage.trainable == ("connector", "compressor", "position_table")
    assert (stage.steps, stage.warmup_steps, stage.rows) == (4000, 2000, 8)
    assert stage.data.options == {"path": "/d/stage1.jsonl"}


@pytest.mark.parametrize("encoding", ["slices", "global"])
@pytest.mark.parametrize("compressor", ["none", "window_attention_reused_mlp"])
def test_moonvit_with_either_encoding_with_and_without_compressor(encoding, compressor):
    model = load(f"tower=moonvit,encoding={encoding},compressor={compressor}").model
    counts = cost.parameter_counts(model)
    # Of MoonViT's published 416,866,032 parameters its last norm is among the tower's.
    assert sum(counts[part] for part in ("tower", "patch_embedding", "position_table")) == 416_866_032
    assert ("compressor" in counts and counts["compressor"] > 0) == (compressor != "none")
    plan = plan_image(Size(896, 1344), model)
    assert (len(plan.views), plan.visual_tokens) == ((1, 384) if encoding == "global" else (7, 454))


@pytest.mark.parametrize("arg", ["tower=vit", "stage5", "recipe", "colour=red", "recipe=best"])
def test_unknown_options_are_named(arg):
    with pytest.raises(ConfigError, match=arg.partition("=")[2] or arg):
        load(arg)


def test_minicpm_v_4_6_as_released():
    config = load("rows=16,steps=50,data=/d/own.jsonl", FILE.with_name("minicpm_v_4_6.py"))
    assert sum(cost.parameter_counts(config.model).values()) == 1_300_428_016
    (stage,) = config.train.stages
    assert (stage.rows, stage.steps, stage.warmup_steps) == (16, 50, 5)
    assert stage.data.options == {"path": "/d/own.jsonl"}
    with pytest.raises(ConfigError, match="option 'stage1'"):
        load("stage1", FILE.with_name("minicpm_v_4_6.py"))
