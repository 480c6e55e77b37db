"""How the next token is chosen: greedy, sampled or with a penalty on what was said, each row in its own way.

Dimension letters: B rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; top_k, top_p and seed then do nothing.

    `repetition_penalty` is transformers' (arXiv 1909.05858): the logits of tokens that stand in the prompt or in the
    answer so far are divided by it where they are positive, and multiplied where they are negative, before all else.
    Beam search multiplies their log probabilities by it.
    """

    temperature: float = 0.0
    top_k: int = 0  # keep the k likeliest; 0 keeps all
    top_p: float = 1.0  # keep the likeliest whose probabilities reach top_p together
    seed: int = 0  # below 2**32
    stream: int = 0  # tells answers with the same seed apart: the prompt's number in a list, the choice's among several
    repetition_penalty: float = 1.0  # above 1 against repetitions, below 1 for them

    def __post_init__(self):
        real, whole = numbers.Real, numbers.Integral
        self._require("temperature", real, lambda value: 0 <= value < math.inf, "a finite number of at least 0")
        self._require("top_k", whole, lambda value: value >= 0, "a whole number of at least 0 (which keeps all)")
        self._require("top_p", real, lambda value: 0 < value <= 1, "a number above 0 and at most 1")
        positive = "a finite number above 0"
        self._require("repetition_penalty", real, lambda value: 0 < value < math.inf, positive)
        self._require("seed", whole, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2**32 - 1")

    def _require(self, name: str, kind: type, allowed: Callable[[Any], bool], what: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, kind) or isinstance(value, bool) or not allowed(value):
            raise ValueError(f"{name}={value!r}: must be {what}")


class Draws(NamedTuple):
    """The same for every row, as arrays."""

    temperature: Any  # float32[B]
    top_k: Any  # int32[B], at least 1
    top_p: Any  # float32[B]
    seed: Any  # uint32[B]
    stream: Any  # int32[B]
    step: Any  # int32[B]: how many tokens were chosen before
    penalty: Any  # float32[B], on the logits of tokens that were there before
    beam_penalty: Any  # float32[B], on their log probabilities that are told


def empty_draws(rows: int) -> Draws:
    """Greedy rows, to be written into."""
    top_p, penalty, beam_penalty = (np.ones(rows, np.float32) for _ in range(3))
    whole = (np.zeros(rows, kind) for kind in (np.uint32, np.int32, np.int32))
    return Draws(np.zeros(rows, np.float32), np.ones(rows, np.int32), top_p, *whole, penalty, beam_penalty)


def set_draws(draws: Draws, row: int, sampling: Sampling, step: int, vocab_size: int, beams: bool = False) -> None:
    """Writes one row's way of choosing; of a beam's row, which tokens are told."""
    if sampling.temperature > 0:  # beyond the limits greedy and uniform anyway; not beyond float32
        draws.temperature[row] = min(max(sampling.temperature, 1e-6), 1e6)
    draws.top_k[row] = min(sampling.top_k or vocab_size, vocab_size)
    draws.top_p[row] = sampling.top_p
    penalty = min(max(sampling.repetition_penalty, 1e-6), 1e6)
    (draws.beam_penalty if beams else draws.penalty)[row] = penalty
    draws.seed[row], draws.stream[row], draws.step[row] = sampling.seed, sampling.stream, step


def penalised(scores: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Scores made worse for tokens that were there before, as transformers' `RepetitionPenaltyLogitsProcessor`.

    Args:
      scores: float32[B, V], logits or log probabilities.
      seen: bool[B, V], the tokens of the prompt and of the answer so far.
      penalty: float32[B]; 1 changes nothing.
    """
    penalty = penalty[:, None]
    return jax.lax.cond(
        jnp.any(penalty != 1),
        lambda: jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores),
        lambda: scores,
    )


def choose(logits: jax.Array, draws: Draws, seen: jax.Array) -> jax.Array:
    """Next tokens int32[B] from logits float32[B, V], and bool[B, V] of the tokens that were there before.

    A row's randomness depends on its own seed, stream and step only, never on the other rows.
    """
    logits = penalised(logits, seen, draws.penalty)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    random = draws.temperature > 0
    return jax.lax.cond(jnp.any(random), lambda: jnp.where(random, _sample(logits, draws), greedy), lambda: greedy)


def _sample(logits, draws):
    logits = logits / jnp.where(draws.temperature > 0, draws.temperature, 1)[:, None]
    order = jnp.sort(logits, axis=-1)[:, ::-1]
    kth = jnp.take_along_axis(order, draws.top_k[:, None] - 1, axis=-1)
    probabilities = jax.nn.softmax(order, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of the likelier tokens
    count = jnp.sum(before < draws.top_p[:, None], axis=-1, keepdims=True)
    nucleus = jnp.take_along_axis(order, jnp.maximum(count, 1) - 1, axis=-1)
    logits = jnp.where(logits >= jnp.maximum(kth, nucleus), logits, -jnp.inf)

    def key(seed, step, stream):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), stream)

    keys = jax.vmap(key)(draws.seed, draws.step, draws.stream)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
