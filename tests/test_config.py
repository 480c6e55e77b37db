"""The typed configuration: what it refuses, how it names it, and that it survives JSON."""

from __future__ import annotations

import copy

import pytest
import tiny
from ml_collections import ConfigDict

from uhd_jax.config import ConfigError, ModelConfig, PreResizeConfig, RunConfig, from_config_dict, to_dict


def _values() -> dict:
    return to_dict(tiny.run())


def test_survives_json_and_a_config_dict():
    run = from_config_dict(_values())
    assert run == tiny.run() == from_config_dict(ConfigDict(_values()))
    assert isinstance(run, RunConfig) and hash(run.model) == hash(tiny.MODEL)


def _changed(path: str, value) -> dict:
    values = copy.deepcopy(_values())
    node = values
    *parents, key = path.split(".")
    for parent in parents:
        node = node[int(parent)] if parent.isdigit() else node[parent]
    node[key] = value
    return values


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("model.tower.hieght", 3, "config.model.tower.hieght: unknown key; known keys here: kind, width"),
        ("model.tower.width", "wide", "config.model.tower.width: expected int, got str 'wide'"),
        ("model.tower.width", 16.5, "config.model.tower.width: expected int, got float 16.5"),
        ("model.tower.layers", True, "config.model.tower.layers: expected int, got bool True"),
        ("model.tower", 3, "config.model.tower: expected a mapping, got int"),
        ("model.compressor.kind", "magic", "config.model.compressor.kind: 'magic' is not one of"),
        ("train.stages.0.trainable", "tower", "config.train.stages[0].trainable: expected a list, got str"),
        ("train.stages.0.trainable", ["eyes"], "config.train.stages[0].trainable: 'eyes' is not one of"),
        ("train.stages.0.data.options", [], "config.train.stages[0].data.options: expected a mapping, got list"),
        ("model.tower.heads", 3, "config.model.tower.heads: 3 does not divide width 16"),
        ("model.decoder.kv_heads", 3, "config.model.decoder.kv_heads: 3 does not divide heads 4"),
        ("model.decoder.head_dim", 7, "config.model.decoder.head_dim: must be even"),
        ("model.compressor.after_layer", 3, "config.model.compressor.after_layer: 3 is not a layer index"),
        ("model.compressor.kind", "none", "config.model.mode: '16x' needs a compressor"),
        ("model.connector.rounds", 3, "config.model.connector.rounds: must be 1 or 2"),
        ("train.packing_window", 0, "config.train.packing_window: must be at least 1, not 0"),
        ("train.log_every", 0, "config.train.log_every: must be at least 1, not 0"),
        ("train.stages.0.rows", 0, "config.train.stages[0].rows: must be at least 1, not 0"),
        ("train.stages.0.learning_rate", -1.0, "config.train.stages[0].learning_rate: must be at least 0"),
        ("train.stages.0.accumulation", 3, "config.train.stages[0].accumulation: 3 does not divide rows 8"),
        ("train.stages", [], "config.train.stages: is empty"),
    ],
)
def test_refusals_name_the_key(path, value, message):
    with pytest.raises(ConfigError) as error:
        from_config_dict(_changed(path, value))
    assert str(error.value).startswith(message)


def test_a_missing_key_is_named():
    values = _values()
    del values["model"]["decoder"]["vocab_size"]
    with pytest.raises(ConfigError, match="config.model.decoder.vocab_size: missing"):
        from_config_dict(values)


def test_repeated_stage_names_are_refused():
    stages = [tiny.stage(), tiny.stage()]
    with pytest.raises(ConfigError, match="stages: names repeat"):
        tiny.run(stages)


def test_whole_numbers_serve_as_floats():
    run = from_config_dict(_changed("train.stages.0.learning_rate", 1))
    assert run.train.stages[0].learning_rate == 1.0 and isinstance(run.train.stages[0].learning_rate, float)


def test_merge_levels_follow_mode_and_connector():
    model = tiny.MODEL
    assert (model.merge_levels(), model.merge_levels("4x")) == (2, 1)
    values = to_dict(model) | {"compressor": {"kind": "none"}, "connector": {"rounds": 2}}
    assert from_config_dict(values, ModelConfig).merge_levels() == 2
    with pytest.raises(ConfigError, match="mode: '8x' is not one of"):
        model.merge_levels("8x")


def test_resolution_of_a_stage():
    assert tiny.MODEL.for_stage(tiny.stage()) == tiny.MODEL
    stage = tiny.stage(scale_resolution=56, template="plain", pre_resize=PreResizeConfig(long_side=1024))
    model = tiny.MODEL.for_stage(stage)
    assert (model.slicing.scale_resolution, model.slicing.pre_resize.long_side) == (56, 1024)
    assert model.chat.template == "plain"
