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
    batch, length, heads, head_dim = query.shape
    key_heads = key.shape[2]
    groups = heads // key_heads
    # Heads first, and the query heads of a key head as more queries: both products are then plain batched matrix
    # products.
    query = query.reshape(batch, length, key_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    query = query.reshape(batch, key_heads, groups * length, head_dim)
    logits = jnp.matmul(query, key.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32) * head_dim**-0.5
    if mask is not None:
        logits = logits.reshape(batch, key_heads, groups, length, -1)
        logits = jnp.where(mask[:, :, None], logits, jnp.finfo(jnp.float32).min)
        logits = logits.reshape(batch, key_heads, groups * length, -1)
    out = _weighted_values(logits, value.transpose(0, 2, 1, 3))
    out = out.reshape(batch, key_heads, groups, length, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads, head_dim)


@jax.custom_vjp
def _weighted_values(logits: jax.Array, value: jax.Array) -> jax.Array:
    """softmax(float32[.., T, S]) @ float[.., S, H] -> float[.., T, H].

    The gradient is written out because the mean of the weights' gradients, which the softmax needs, is also the product
    of output and its gradient: a sum over H instead of S. Keeps the weights for it, in the dtype of the values.
    """
    return _forward(logits, value)[0]


def _forward(logits, value):
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    out = jnp.matmul(weights, value)
    return out, (weights, value, out)


def _backward(kept, gradient):
    weights, value, out = kept
    of_weights = jnp.matmul(gradient, jnp.swapaxes(value, -1, -2), preferred_element_type=jnp.float32)
    mean = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    return weights * (of_weights - mean), jnp.matmul(jnp.swapaxes(weights, -1, -2), gradient)


_weighted_values.defvjp(_forward, _backward)


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
