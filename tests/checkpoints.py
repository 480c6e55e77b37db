"""Tiny checkpoints of the official layouts on disk, and reading them as `uhd-jax convert import` does."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from uhd_jax.config import ModelConfig
from uhd_jax.convert.families import Family, drops, find_family, select
from uhd_jax.convert.source import open_source
from uhd_jax.convert.tables import export_tensors, flatten, load, match, unflatten
from uhd_jax.models import uhd


def write_checkpoint(folder: Path, tensors: Mapping[str, np.ndarray], config: Mapping | None, shards: int = 1) -> Path:
    """safetensors in so many files, with their index where there are several, and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    groups = [names[number::shards] for number in range(shards)]
    files = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
    if shards == 1:
        files = ["model.safetensors"]
    for file, group in zip(files, groups, strict=True):
        save_file({name: np.asarray(tensors[name], order="C") for name in group}, folder / file)
    if shards > 1:
        placed = {name: file for file, group in zip(files, groups, strict=True) for name in group}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def abstract(family: Family, config: ModelConfig) -> dict[str, Any]:
    """Shapes of the parameters that a family fills."""
    return select(jax.eval_shape(lambda: uhd.init_params(config, jax.random.key(0))), family.parts)


def read_checkpoint(folder: Path, allow_pickle: bool = False, **changes) -> tuple[Family, ModelConfig, dict[str, Any]]:
    """Family, configuration and float32 parameters; `changes` are values of parts that no file says, by part."""
    with open_source(folder, allow_pickle) as source:
        family = find_family(source)
        config = family.config(source)
        for part, values in changes.items():
            config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **values)})
        moves = match(family.table(config), source.tensors, abstract(family, config), drops(family.dropped(config)))
        params = unflatten({move.path: load(move, source.read, np.float32) for move in moves})
    return family, config, params


def exported(family: Family, config: ModelConfig, params: dict[str, Any]) -> dict[str, np.ndarray]:
    """All tensors of an export."""
    filled = {name: np.zeros(shape, np.float32) for name, shape in family.filled(config).items()}
    return export_tensors(family.table(config), params) | filled


def assert_same_tree(ours: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Bit-equal, leaf by leaf."""
    ours, other = flatten(ours), flatten(other)
    assert ours.keys() == other.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, other[path], err_msg=path)


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 tensors; norms and scalars lie around one."""
    random = np.random.default_rng(seed)
    return {
        name: random.normal(float("norm" in name or not shape), 0.2, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
