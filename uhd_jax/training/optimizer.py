"""AdamW as in the released scripts, and the learning-rate schedules (spec v4 section 1.10)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from uhd_jax.config import OptimizerConfig, StageConfig
from uhd_jax.training.stages import TOWER_PARTS, part_of

WARMUP_START = 1e-8
FIRST_STEPS, FIRST_CLIP_NORM = 10, 1e-4  # of the released pre-training of VDIM


def make_schedule(stage: StageConfig) -> Callable[[jax.Array], jax.Array]:
    """int32[] step of the stage, from 0 -> float32[] learning rate.

    All three warm up linearly from 1e-8 over `warmup_steps`. Then:
      timm_cosine: a cosine as long as the whole stage begins after the warm-up, so the stage ends before the cosine
        does and never reaches the minimum (the released runs; stage 1 ends at 7.5e-5 between 1e-4 and 5e-5).
      cosine: reaches the minimum at the stage's last step.
      constant: stays.
    """
    peak, low, warmup = stage.learning_rate, stage.learning_rate_min, stage.warmup_steps
    span = stage.steps if stage.schedule == "timm_cosine" else max(1, stage.steps - 1 - warmup)

    def schedule(step):
        warming = WARMUP_START + step * ((peak - WARMUP_START) / max(1, warmup))
        progress = jnp.clip((step - warmup) / span, 0.0, 1.0)
        decaying = low + 0.5 * (peak - low) * (1 + jnp.cos(jnp.pi * progress))
        after = peak if stage.schedule == "constant" else decaying
        return jnp.where(step < warmup, warming, after).astype(jnp.float32)

    return schedule


def make_optimizer(config: OptimizerConfig, stage: StageConfig) -> optax.GradientTransformation:
    """Clipping, Adam, decoupled weight decay and the tower's factor.

    The caller subtracts learning rate times update. The rate is a function of the stage's step, not of this state: a
    skipped step must leave the state as it was, and still move on in the schedule. To be initialised with the trainable
    parameters alone, so that frozen ones have no moments. Decayed is whatever has no "bias" in its path, norm scales
    included, as in the scripts.

    The objective "reconstruction" has its own (spec v1-v2 section 5.3), `config` is not for it: Adam with the usual
    numbers, in the released form NAdam (without torch's slow increase of the momentum), whose gradients are clipped
    during the first ten steps.
    """
    if stage.objective == "reconstruction":
        released = stage.reconstruction.form == "released"
        clip = optax.conditionally_transform(
            optax.clip_by_global_norm(FIRST_CLIP_NORM), lambda step: released & (step < FIRST_STEPS)
        )
        return optax.chain(clip, optax.scale_by_adam(nesterov=released))

    def finish(updates, params):
        def one(path, update, param):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            decay = 0.0 if "bias" in name else config.weight_decay
            factor = stage.tower_learning_rate_factor if part_of(name) in TOWER_PARTS else 1.0
            return factor * (update + decay * param)

        return jax.tree_util.tree_map_with_path(one, updates, params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.stateless(finish),
    )
