"""What a stage minimises: the model's loss on language, or the reconstruction that pre-trains a pyramid."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from uhd_jax.config import ModelConfig, StageConfig
from uhd_jax.models import uhd
from uhd_jax.training import vdim
from uhd_jax.training.step import LossSums


def scaffold_init(model: ModelConfig, stage: StageConfig) -> Callable[[jax.Array], dict[str, Any]]:
    """From a key to what a stage trains beside the model."""
    if stage.objective == "language":
        return lambda key: {}
    return functools.partial(vdim.init_scaffold, model, stage.reconstruction.form)


def loss_sums_of(model: ModelConfig, stage: StageConfig) -> LossSums:
    """The stage's loss, as `make_train_step` takes it."""
    if stage.objective == "language":
        return lambda params, batch, key: uhd.loss_sums(params, batch, model)
    return functools.partial(vdim.loss_sums, config=model, reconstruction=stage.reconstruction)
