"""`--config=FILE.py:ARG --config.a.b=VALUE`: what becomes of it, and which key is named when it is wrong."""

from __future__ import annotations

import pytest

from uhd_jax.cli import configs
from uhd_jax.cli.common import UsageError
from uhd_jax.config import ConfigError


def test_values_are_replaced_and_typed(config_file):
    config = configs.load(
        [
            f"--config={config_file}:other",
            "--config.train.stages[0].steps=7",
            "--config.train.stages[0].learning_rate=1",
            "--config.train.stages[0].trainable=('decoder',)",
            "--config.train.stages[0].data.options.task=page",
            "--config.train.seed=5",  # not mentioned in the file
            "--config.model.scan_layers=false",
        ]
    )
    stage = config.train.stages[0]
    assert (config.name, stage.steps, stage.trainable, stage.data.options["task"]) == ("other", 7, ("decoder",), "page")
    assert (stage.learning_rate, type(stage.learning_rate)) == (1.0, float)
    assert (config.train.seed, config.model.scan_layers) == (5, False)


def test_without_replacements_the_configuration_is_that_of_the_file(config_file):
    plain = configs.load([f"--config={config_file}"])
    assert plain == configs.load([f"--config={config_file}", "--config.train.seed=0"])
    assert plain.train.stages[0].steps == 3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("0.25", 0.25),
        ("true", True),
        ("None", None),
        ("held_out", "held_out"),
        ("data/train.jsonl", "data/train.jsonl"),
        ("'7'", "7"),
        ("", ""),
        ("a=b", "a=b"),
        ("[[1,2],[2,1]]", ((1, 2), (2, 1))),
        ("((1,2),)", ((1, 2),)),
        ('{"a": [1]}', {"a": (1,)}),
        ("{1,2}", "{1,2}"),
        ("07", "07"),
    ],
)
def test_options_of_a_source_may_be_new(config_file, monkeypatch, text, value):
    monkeypatch.setattr("uhd_jax.data.sources.check_data", lambda data, key: None)
    config = configs.load([f"--config={config_file}", f"--config.train.stages[0].data.options.fresh={text}"])
    assert config.train.stages[0].data.options == {"task": "cell", "fresh": value}


def test_a_new_option_may_be_replaced_in_turn(config_file):
    flag = "--config.train.stages[0].data.options.samples"
    config = configs.load([f"--config={config_file}", f"{flag}=7", "--config.train.seed=2", f"{flag}=8"])
    assert (config.train.stages[0].data.options["samples"], config.train.seed) == (8, 2)


@pytest.mark.parametrize(
    ("replacement", "error", "parts"),
    [
        ("--config.train.sed=1", UsageError, ("--config.train.sed", "'sed'", "seed")),
        ("--config.train.stages[1].steps=1", UsageError, ("stages[1]", "known here: 0")),
        ("--config.train.stages.steps=1", UsageError, ("'steps'",)),
        ("--config.train.seed.x=1", UsageError, ("'x'",)),
        ("--config.train.seed=many", UsageError, ("config.train.seed", "many")),
        ("--config.model.scan_layers=perhaps", UsageError, ("config.model.scan_layers", "perhaps")),
        ("--config.a b=1", UsageError, ("--config.a b",)),
        ("--config.model.mode=2x", ConfigError, ("config.model.mode", "2x")),
        ("--config.model.tower.heads=5", ConfigError, ("config.model.tower.heads", "5")),
        (
            "--config.train.stages[0].data.source=dreams",
            ConfigError,
            ("config.train.stages[0].data.source: 'dreams' is not one of array_record, arrow, digit_pages,",),
        ),
        (
            "--config.train.stages[0].data.options.tusk=page",
            ConfigError,
            ("config.train.stages[0].data.options.tusk: unknown key", "task"),
        ),
        (
            "--config.train.stages[0].data.options.samples=many",
            ConfigError,
            ("config.train.stages[0].data.options.samples: expected int, got str 'many'",),
        ),
        ("--config.train.stages[0].data.options.shapes[0]=1", UsageError, ("'shapes'", "task")),
        ("--config.train.stages[0].data.option=1", UsageError, ("'option'", "options, source")),
    ],
)
def test_bad_replacements_name_their_key(config_file, replacement, error, parts):
    with pytest.raises(error) as caught:
        configs.load([f"--config={config_file}", replacement])
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("def get_config(): return {'name': 'x', 'modell': {}}", "config.modell: unknown key"),
        ("def get_config(): return {'name': 'x', 'model': {}}", "config.train: missing"),
        ("def get_config(): return 3", "expected a mapping"),
        ("def get_config(): return 1 / 0", "ZeroDivisionError"),
        ("x = 1", "get_config"),
        ("def get_config(: pass", "SyntaxError"),
    ],
)
def test_bad_configuration_files(tmp_path, source, part):
    path = tmp_path / "bad.py"
    path.write_text(source)
    with pytest.raises(ConfigError, match=part):
        configs.load([f"--config={path}"])


def test_a_bad_variant_names_the_file(config_file):
    with pytest.raises(ConfigError, match=r"plain\.py:stage9.*KeyError.*stage9"):
        configs.load([f"--config={config_file}:stage9"])


def test_split_takes_both_spellings():
    config, others = configs.split(["a.png", "--config", "x.py", "--json", "--config.train.seed", "-1", "--configs=1"])
    assert config == ["--config=x.py", "--config.train.seed=-1"]
    assert others == ["a.png", "--json", "--configs=1"]
