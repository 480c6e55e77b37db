"""Attention behind one function, and the two masks the models need."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Softmax attention with grouped key heads; logits and softmax in float32.

    Args:
      query: float[B, T, N, H].
      key: float[B, S, K, H]; K divides N, and query head n reads key head n // (N / K).
      value: float[B, S, K, H].
      mask: bool[B or 1, 1, T or 1, S], True where a query may look. A query that may look nowhere gets the mean of the
        values: finite, and for the caller to ignore.

    Returns:
      float[B, T, N, H] in the dtype of the query.
    """
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla")


def valid_keys_mask(lengths: jax.Array, size: int) -> jax.Array:
    """bool[B, 1, 1, S]: the first `lengths[b]` of S keys. For views padded behind their patches."""
    return (jnp.arange(size)[None] < lengths[:, None])[:, None, None, :]


def packed_causal_mask(segments: jax.Array) -> jax.Array:
    """bool[B, 1, T, T]: earlier or same token of the same sample; padding (segment 0) looks at padding only.

    Example, one row with segments [1, 1, 2, 0]:

        1 0 0 0
        1 1 0 0
        0 0 1 0
        0 0 0 1
    """
    index = jnp.arange(segments.shape[1])
    same = segments[:, :, None] == segments[:, None, :]
    return (same & (index[:, None] >= index[None, :]))[:, None]
