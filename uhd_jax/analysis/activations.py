"""What a training step keeps in memory besides its state, from the traced program; nothing is computed or compiled."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.extend import core

from uhd_jax.batch import Bucket, abstract_batch
from uhd_jax.config import ChatConfig, ModelConfig, SlicingConfig
from uhd_jax.models import uhd
from uhd_jax.ops import neighbourhood
from uhd_jax.training.stages import merge_params, split_params


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch on one device; an estimate of the most that exist at one time is their sum."""

    kept: int  # arrays that the forward pass leaves for the backward pass, under the config's remat policies
    worked_on: int  # the largest of: one layer made again; a chunk's logits and windows of the pyramid, with gradients

    @property
    def total(self) -> int:
        """kept + worked_on."""
        return self.kept + self.worked_on


def activations(config: ModelConfig, bucket: Bucket, trainable: Sequence[str], mode: str | None = None) -> Activations:
    """Estimates the activations of a training step.

    What is kept is exact for the program as traced: every array that the gradient of the trained parameters reads and
    that is neither a parameter nor part of the batch. What the compiler adds or saves is not known here: it fuses,
    shares buffers and may keep copies of weights in the dtype of the computation.

    Args:
      config: the model, with its remat policies.
      bucket: shapes of a micro-batch on one device, padding included.
      trainable: parts.
      mode: "16x" or "4x"; None for the config's.

    Raises:
      ConfigError: the model has none of the parts.
    """
    # What is cut and said makes no difference to the traced program, but to the cache.
    config = dataclasses.replace(config, slicing=SlicingConfig(), chat=ChatConfig())
    kept = _kept_bytes(config, bucket, tuple(trainable), mode)
    columns = max(1, min(bucket.tokens - 1, config.loss_chunk // bucket.rows))
    work = [2 * 4 * bucket.rows * columns * config.decoder.vocab_size, 2 * _window_bytes(config, bucket)]
    for policy, layers in (("tower_remat", config.tower.layers), ("decoder_remat", config.decoder.layers)):
        if getattr(config, policy) != "none":
            whole = _kept_bytes(dataclasses.replace(config, **{policy: "none"}), bucket, tuple(trainable), mode)
            work.append((whole - kept) // layers)
    return Activations(kept, max(work))


def _window_bytes(config: ModelConfig, bucket: Bucket) -> int:
    """Of the windows that a level of the pyramid gathers, as many as exist at one time."""
    pyramid, itemsize = config.connector.pyramid, jnp.dtype(config.dtype).itemsize
    if pyramid.upsampling != "vdim" or max(pyramid.levels) == 0:
        return 0
    window = (2 ** (max(pyramid.levels) - 1) + 6) ** 2 * config.tower.width * itemsize
    return bucket.rows * bucket.slots * min(neighbourhood.GATHERED_BYTES, bucket.patches * window)


@functools.lru_cache(maxsize=64)
def _kept_bytes(config: ModelConfig, bucket: Bucket, trainable: tuple[str, ...], mode: str | None) -> int:
    params = jax.eval_shape(lambda key: uhd.init_params(config, key), jax.random.key(0))
    trained, frozen = split_params(params, trainable)

    def pull_back(trained, frozen, batch):
        def loss(trained):
            return uhd.loss_sums(merge_params(trained, frozen), batch, config, mode)[0]

        return jax.vjp(loss, trained)[1]  # a tree whose leaves are the arrays that it keeps

    traced = jax.make_jaxpr(pull_back)(trained, frozen, abstract_batch(bucket)).jaxpr
    kept = {var for var in traced.outvars if not isinstance(var, core.Literal)} - {*traced.invars}
    return sum(var.aval.size * var.aval.dtype.itemsize for var in kept)
