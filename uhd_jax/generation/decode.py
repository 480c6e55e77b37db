"""Cached decoding of a batch of prompts, greedy or sampled, one compiled program per bucket of shapes.

Dimension letters: B rows, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uhd_jax.batch import Batch
from uhd_jax.config import ModelConfig
from uhd_jax.models import uhd


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; the others then do nothing."""

    temperature: float = 0.0
    top_k: int = 0  # keep the k likeliest; 0 keeps all
    top_p: float = 1.0  # keep the likeliest whose probabilities reach top_p together
    seed: int = 0  # below 2**32

    def __post_init__(self):
        real, whole = numbers.Real, numbers.Integral
        self._require("temperature", real, lambda value: 0 <= value < math.inf, "a finite number of at least 0")
        self._require("top_k", whole, lambda value: value >= 0, "a whole number of at least 0 (which keeps all)")
        self._require("top_p", real, lambda value: 0 < value <= 1, "a number above 0 and at most 1")
        self._require("seed", whole, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2**32 - 1")

    def _require(self, name: str, kind: type, allowed: Callable[[Any], bool], what: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, kind) or not allowed(value):
            raise ValueError(f"{name}={value!r}: must be {what}")


@functools.partial(jax.jit, static_argnames=("greedy",))
def _choose(logits, keys, temperature, top_k, top_p, greedy):
    if greedy:
        return jnp.argmax(logits, axis=-1)
    logits = logits / temperature
    order = jnp.sort(logits, axis=-1)[:, ::-1]
    kth = order[:, top_k - 1, None]
    probabilities = jax.nn.softmax(order, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of the likelier tokens
    count = jnp.sum(before < top_p, axis=-1, keepdims=True)
    nucleus = jnp.take_along_axis(order, jnp.maximum(count, 1) - 1, axis=-1)
    logits = jnp.where(logits >= jnp.maximum(kth, nucleus), logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits)


def choose_tokens(logits: jax.Array, sampling: Sampling, step: int) -> jax.Array:
    """Next tokens int32[B] from logits float32[B, V].

    Row b's randomness depends on the seed, b and the step only, never on the other rows.
    """
    rows = jnp.arange(logits.shape[0])
    key = jax.random.fold_in(jax.random.key(sampling.seed), step)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    greedy = sampling.temperature == 0
    vocab_size = logits.shape[-1]
    top_k = min(sampling.top_k or vocab_size, vocab_size)
    temperature = min(max(sampling.temperature, 1e-6), 1e6)  # beyond, greedy and uniform anyway; not beyond float32
    return _choose(logits, keys, temperature, top_k, sampling.top_p, greedy)


def generate_tokens(
    params: Any,
    config: ModelConfig,
    batch: Batch,
    *,
    max_new_tokens: int,
    stop: Collection[int],
    sampling: Sampling,
    cache_length: int,
    mode: str | None = None,
    on_tokens: Callable[[np.ndarray], None] | None = None,
) -> list[list[int]]:
    """Continues the prompt in each row.

    Args:
      params: the model's parameters.
      config: the model.
      batch: one prompt per row from its left end, segments 1 on it and 0 behind; a row of padding only yields [].
      max_new_tokens: at most so many tokens per row, at least 1.
      stop: ids that end a row's answer; the id itself is not part of the answer.
      sampling: greedy or not.
      cache_length: room for the longest prompt plus the answer.
      mode: "16x" or "4x"; None for the config's.
      on_tokens: called after every step with int32[B], -1 where a row has ended.

    Returns:
      The answer's ids, per row.
    """
    lengths = np.sum(np.asarray(batch.segments) > 0, axis=1)
    if lengths.max() + max_new_tokens - 1 > cache_length:
        raise ValueError(f"{lengths.max()} prompt and {max_new_tokens} new tokens exceed the cache of {cache_length}")
    answers: list[list[int]] = [[] for _ in lengths]
    running = lengths > 0
    logits, cache = uhd.prefill(params, batch, config, cache_length, mode)
    for step in range(max_new_tokens):
        chosen = choose_tokens(logits, sampling, step)
        tokens = np.asarray(chosen)
        running = running & ~np.isin(tokens, list(stop))
        for row in np.flatnonzero(running):
            answers[row].append(int(tokens[row]))
        if on_tokens is not None:
            on_tokens(np.where(running, tokens, -1))
        if not running.any() or step == max_new_tokens - 1:
            break
        logits, cache = uhd.decode_step(params, chosen, jnp.asarray(lengths + step, jnp.int32), cache, config)
    return answers
