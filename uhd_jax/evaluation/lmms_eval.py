"""What lmms-eval finds through its entry-point group `lmms_eval.models`: the model `uhd_jax`.

lmms-eval (0.7 or newer) asks every package for such a manifest when it starts, and imports the class when the model is
asked for. It only warns where that fails, and then does not know the model.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The `ModelManifest` of this package."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="uhd_jax", chat_class_path="uhd_jax.evaluation.lmms_model.UhdJax", aliases=("uhd-jax",)
    )
