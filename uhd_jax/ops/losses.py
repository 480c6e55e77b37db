"""Token cross-entropy that never builds the [tokens, vocabulary] logits whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from uhd_jax.ops.precision import wide_dtype


def weighted_cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Sum over tokens of weight times cross-entropy, float32[].

    Args:
      logits: float32[..., V].
      targets: int32[...].
      weights: float32[...]; a token of weight 0 adds exactly 0, whatever its logits.
    """
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.sum(jnp.where(weights > 0, losses * weights, 0.0))


def chunked_cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk_tokens: int
) -> jax.Array:
    """`weighted_cross_entropy` of hidden @ head, a few columns of the rows at a time.

    Rows stay whole along B, so that a batch sharded over devices is never regrouped; each chunk's logits are computed
    again in the backward pass instead of being kept.

    Args:
      hidden: float[B, T, D].
      head: float[D, V].
      targets: int32[B, T].
      weights: float32[B, T].
      chunk_tokens: at most about so many tokens have logits at one time.
    """
    batch, length, width = hidden.shape
    columns = max(1, min(length, chunk_tokens // batch))
    chunks = -(-length // columns)
    padding = chunks * columns - length

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, chunks, columns, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def step(total, chunk):
        hidden, targets, weights = chunk
        logits = jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=wide_dtype(hidden))
        return total + weighted_cross_entropy(logits, targets, weights), None

    total, _ = jax.lax.scan(step, jnp.zeros((), wide_dtype(hidden)), (split(hidden), split(targets), split(weights)))
    return total
