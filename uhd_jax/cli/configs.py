"""`--config=FILE.py:ARG --config.a.b=VALUE`: from the command line to the typed configuration.

The file is loaded and checked first, then completed with every default, so that any key has a type and may be replaced,
whether the file mentions it or not. Only the options of a data source are open: one that the file does not mention is
read as JSON or a Python literal, else as a string, and the source checks it.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path

from uhd_jax.cli.common import UsageError
from uhd_jax.config import ConfigError, RunConfig, from_config_dict, to_dict


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates `--config...` arguments, each made one `--key=value`, from all others; order is kept.

    Raises:
      UsageError: the last `--config...` argument has no value.
    """
    config, others, rest = [], [], list(argv)
    while rest:
        argument = rest.pop(0)
        if argument != "--config" and not argument.startswith(("--config=", "--config.")):
            others.append(argument)
        elif "=" in argument:
            config.append(argument)
        elif rest and not rest[0].startswith("--"):
            config.append(f"{argument}={rest.pop(0)}")
        else:
            raise UsageError(f"{argument} needs a value")
    return config, others


def load(argv: Sequence[str]) -> RunConfig:
    """Builds the configuration from the arguments that `split` set aside.

    Raises:
      UsageError: no file is named, or a replaced key does not exist or does not take its value.
      ConfigError: the file cannot be loaded, or does not describe a run, or names an unknown data source or one that
        does not take its options.
    """
    from uhd_jax.data.sources import check_data  # slow to import, and help does without it

    files = [argument.partition("=")[2] for argument in argv if argument.startswith("--config=")]
    overrides = [argument for argument in argv if not argument.startswith("--config=")]
    if not files:
        raise UsageError(f"{overrides[0]} replaces a value of a file, but no --config=FILE.py is given")
    config = load_file(files[-1])
    if overrides:
        config = _replace(config, overrides)
    for index, stage in enumerate(config.train.stages):
        check_data(stage.data, f"config.train.stages[{index}].data")
    return config


def load_file(name: str) -> RunConfig:
    """Runs `get_config` of a configuration file. `name` is `FILE.py` or `FILE.py:ARG`.

    Raises:
      ConfigError: the file does not exist, fails, has no `get_config`, or does not describe a run.
    """
    file, colon, argument = name.partition(":")
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"--config={name}: there is no file {file}")
    spec = importlib.util.spec_from_file_location("_configuration", path)
    if spec is None:
        raise ConfigError(f"--config={name}: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(argument) if colon else module.get_config()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"--config={name}: {file} failed with {type(error).__name__}: {error}") from error
    return from_config_dict(config)


def _replace(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    complete = _to_config_dict(to_dict(config))
    replaced = [override for override in overrides if not _add_option(complete, override)]
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", complete, flag_values=values, sys_argv=replaced)
    try:
        values(["uhd-jax", *replaced])
    except (flags.Error, ValueError, TypeError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    return from_config_dict(_to_plain(values["config"].value))


def _add_option(complete: ConfigDict, override: str) -> bool:
    """Sets an option of a data source that is not there yet; False for a key that is. Others are refused.

    ml_collections would refuse an unknown key too, but with an exception of its own kind at each level.
    """
    flag, _, text = override.partition("=")
    try:
        path = tuple(config_path.split(flag.removeprefix("--")))[1:]
    except ValueError:
        raise UsageError(f"{flag}: not a key; write e.g. --config.train.stages[0].steps=10") from None
    value = complete
    for depth, part in enumerate(path, 1):
        if isinstance(value, ConfigDict):
            known = list(value)
        elif isinstance(value, tuple):
            known = range(len(value))
        else:
            known = ()
        if part not in known and depth == len(path) and path[-3:-1] == ("data", "options"):
            value[part] = _to_config_dict(literal(text))
            return True
        if part not in known:
            raise UsageError(f"{flag}: unknown key {part!r}; known here: {', '.join(map(str, known)) or 'none'}")
        value = value[part]
    return False


def literal(text: str) -> Any:
    """What JSON, or else Python, reads in a text, with JSON types only; the text itself where neither does."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return json.loads(json.dumps(read(text)))
    return text


def _to_config_dict(value: Any) -> Any:
    # Tuples, because ml_collections replaces tuples from the command line, but not lists.
    if isinstance(value, dict):
        return ConfigDict({key: _to_config_dict(item) for key, item in value.items()})
    if isinstance(value, list):
        return tuple(map(_to_config_dict, value))
    return value


def _to_plain(value: Any) -> Any:
    if isinstance(value, ConfigDict):
        return {key: _to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_to_plain, value))
    return value
