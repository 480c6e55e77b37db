"""Checkpoints of training runs and saved models. The only room that imports Orbax.

A run keeps `WORKDIR/checkpoints/STEP/` with four items: `params` (the model's parameters), `training` (optimiser,
counters, key), `iterator` and `meta` (JSON). A step is written beside its final name and renamed once complete, so a
kill at any moment leaves the last complete one as the newest; half-written folders are ignored and overwritten.
A saved model is a folder with `params` and `model.json`.
"""

from uhd_jax.checkpoint.faults import FOLDER, MODEL_FILE, CheckpointError, newest_step
from uhd_jax.checkpoint.models import SavedModel, Streamed, load_model, load_model_config, save_model
from uhd_jax.checkpoint.runs import (
    ITEMS,
    Checkpointer,
    ConfigMismatch,
    Restored,
    differing_keys,
    require_same_config,
    require_same_model,
)

__all__ = [
    "FOLDER",
    "ITEMS",
    "MODEL_FILE",
    "Checkpointer",
    "CheckpointError",
    "ConfigMismatch",
    "Restored",
    "SavedModel",
    "Streamed",
    "differing_keys",
    "load_model",
    "load_model_config",
    "newest_step",
    "require_same_config",
    "require_same_model",
    "save_model",
]
