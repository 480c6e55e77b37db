"""Parts of the model, and the recipes of the paper and of the scripts."""

import jax
import pytest
import tiny
from flax.traverse_util import flatten_dict

from uhd_jax.config import PARTS, ConfigError, StageConfig, from_config_dict
from uhd_jax.models import uhd
from uhd_jax.training.stages import PART_PATTERNS, RECIPES, merge_params, part_of, recipe, split_params

DATA = [{"source": "records", "options": {"path": f"stage{number}.jsonl"}} for number in (1, 2, 3, 4)]


def test_every_parameter_is_in_one_part_and_no_part_is_empty():
    assert tuple(sorted(PART_PATTERNS)) == tuple(sorted(PARTS))
    parts = {path: part_of(path) for path in flatten_dict(tiny.params(), sep="/")}
    assert set(parts.values()) == set(PARTS) - {"connector_positions", "upsampler", "upsampler_fixup"}
    assert parts["tower/layers/mlp/fc1/kernel"] == "tower"
    assert parts["tower/compressor/linear_1/kernel"] == "compressor"
    assert parts["tower/patch_embedding/bias"] == "patch_embedding"
    with pytest.raises(ValueError, match="'elsewhere/kernel' belongs to 0 parts"):
        part_of("elsewhere/kernel")


def test_parts_of_every_kind_of_model():
    paths = {}
    for model in (*tiny.KINDS.values(), tiny.HYBRID):
        params = jax.eval_shape(lambda model=model: uhd.init_params(model, jax.random.key(0)))
        paths |= {path: part_of(path) for path in flatten_dict(params, sep="/")}
    assert set(paths.values()) == set(PARTS)
    parts = {
        "tower/class_token": "tower",
        "tower/pre_norm/scale": "tower",
        "connector/position_table": "connector_positions",
        "connector/queries/set_3": "connector",
        "connector/level_embeddings/level_2": "connector",
        "connector/upsampler/up2/range_temperature": "upsampler",
        "connector/upsampler/deconvolution_1/kernel": "upsampler",
        "connector/upsampler/fixup/kernel": "upsampler_fixup",
    }
    assert paths.items() >= parts.items()


def test_split_and_merge_are_inverse():
    params = tiny.params()
    trainable, frozen = split_params(params, ("connector", "position_table"))
    assert set(trainable) == {"tower", "connector"}
    assert set(trainable["tower"]) == {"position_table"}
    assert set(frozen["tower"]) == {"layers", "patch_embedding", "compressor", "final_norm"}
    merged = merge_params(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True))


def test_training_nothing_is_refused():
    without = {"decoder": tiny.params()["decoder"]}
    with pytest.raises(ValueError, match="no parameters in the parts"):
        split_params(without, ("compressor",))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_stages_with_the_published_numbers(name):
    stages = [from_config_dict(stage, StageConfig, "stage") for stage in recipe(name, DATA, rows=8)]
    assert [stage.learning_rate for stage in stages] == [1e-4, 1e-5, 5e-5, 1e-5]
    assert [stage.learning_rate_min for stage in stages] == [5e-5, 5e-6, 1e-5, 1e-6]
    assert [stage.steps for stage in stages] == [2000, 10_000, 5000, 10_000]
    assert [stage.warmup_steps for stage in stages] == [1000, 1000, 500, 1000]
    assert [stage.packed_length for stage in stages] == [1700, 8192, 10_240, 4900]
    assert [stage.max_slices for stage in stages] == [1, 9, 9, 9]
    assert [stage.tower_learning_rate_factor for stage in stages] == [1.0, 0.2, 0.2, 1.0]
    assert [stage.sample_weight_power for stage in stages] == [1.0, 1.0, 1.0, 0.5]
    assert all(stage.schedule == "timm_cosine" and stage.rows == 8 for stage in stages)
    assert stages[2].data.options["path"] == "stage3.jsonl"


def test_what_the_recipes_train():
    vit = {"tower", "patch_embedding", "position_table", "compressor"}
    in_house, onevision, script = ([set(parts) for parts in RECIPES[name]] for name in RECIPES)
    assert in_house == [vit | {"connector"}, vit, set(PARTS), set(PARTS)]
    assert onevision == [vit | {"connector"}, set(PARTS), set(PARTS), set(PARTS)]
    assert script[0] == {"connector", "compressor", "position_table"}
    of_connectors = {"connector_positions", "upsampler", "upsampler_fixup"}  # of other connectors than v4's
    assert script[1] == script[2] == script[3] == set(PARTS) - {"patch_embedding"} - of_connectors


def test_step_scale_and_wrong_arguments():
    doubled = recipe("in_house", DATA, rows=8, step_scale=2)
    assert [(stage["steps"], stage["warmup_steps"]) for stage in doubled][0] == (4000, 2000)
    with pytest.raises(ConfigError, match="'A9' is not one of"):
        recipe("A9", DATA, rows=8)
    with pytest.raises(ConfigError, match="data for 3 stages"):
        recipe("in_house", DATA[:3], rows=8)


def test_images_are_altered_as_in_the_scripts():
    stages = [from_config_dict(stage, StageConfig, "stage") for stage in recipe("in_house", DATA, 8)]
    scripts = [from_config_dict(stage, StageConfig, "stage") for stage in recipe("released_script", DATA, 8)]
    assert [stage.augment.ocr_probability for stage in stages] == [0, 0, 0.7, 0.7]
    assert [stage.augment.resize_probability for stage in stages] == [0, 0, 0, 0.5]
    assert [stage.augment.jpeg_probability for stage in stages] == [0, 0, 0, 0.2]
    assert {stage.max_aspect_ratio for stage in stages} == {10}
    assert (stages[3].augment.jpeg_quality, scripts[3].augment.jpeg_quality) == ((75, 95), (6, 26))
