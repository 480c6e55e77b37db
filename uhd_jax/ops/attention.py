"""Attention in plain JAX, on any device; kernels for accelerators with the same arguments are in `attention_kernels`.

Who may look at whom is said by one integer per token, its *segment*, not by a mask of all pairs: kernels skip what the
segments rule out, and nothing of the size of all pairs is handed from layer to layer.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from uhd_jax.ops.precision import wide, wide_dtype

BLOCK = 512  # queries that long rows are worked through by
LONG = 2**22  # pairs of query and key from which on logits of all of them never exist together


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    *,
    causal: bool = False,
) -> jax.Array:
    """Softmax attention with grouped key heads; logits and softmax in float32.

    From `LONG` pairs on, blocks of queries are worked through one after the other, and made again for the gradient.

    Args:
      query: float[B, T, N, H].
      key: float[B, S, K, H]; K divides N, and query head n reads key head n // (N / K).
      value: float[B, S, K, H].
      segments: int32[B, T]; a query looks at the keys of its own segment, padding (0) at padding. None: at all.
      key_segments: int32[B, S]; None: `segments`. A query without any key gets the mean of the values: finite, and for
        the caller to ignore.
      causal: queries look at keys of the same or a lower index only. One row with segments [1, 1, 2, 0]:

        1 0 0 0
        1 1 0 0
        0 0 1 0
        0 0 0 1

    Returns:
      float[B, T, N, H] in the dtype of the query.
    """
    length = query.shape[1]
    if segments is not None and key_segments is None:
        key_segments = segments
    # Heads first: the products are then plain batched matrix products.
    key, value = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)
    index = jnp.arange(length) if causal else None
    if length <= BLOCK or length * value.shape[2] < LONG:
        return _attend(query, key, value, _visible(segments, key_segments, index, value.shape[2]))

    @jax.checkpoint
    def block(queries):
        query, segments, index = queries
        return _attend(query, key, value, _visible(segments, key_segments, index, value.shape[2]))

    blocks = -(-length // BLOCK)

    def split(array, axis):
        if array is None:
            return None
        padding = [(0, 0)] * array.ndim
        padding[axis] = (0, blocks * BLOCK - length)
        array = jnp.pad(array, padding)
        array = array.reshape(*array.shape[:axis], blocks, BLOCK, *array.shape[axis + 1 :])
        return jnp.moveaxis(array, axis, 0)

    out = jax.lax.map(block, (split(query, 1), split(segments, 1), split(index, 0)))
    return jnp.moveaxis(out, 0, 1).reshape(query.shape[0], -1, *query.shape[2:])[:, :length]


def _visible(segments, key_segments, index, keys: int) -> jax.Array | None:
    """bool[B or 1, 1, T, S], True where a query may look; None: everywhere."""
    mask = None
    if segments is not None:
        mask = segments[:, None, :, None] == key_segments[:, None, None, :]
    if index is not None:
        earlier = (index[:, None] >= jnp.arange(keys))[None, None]
        mask = earlier if mask is None else mask & earlier
    return mask


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """As `attention`, with key float[B, K, H, S], value float[B, K, S, H], and a mask."""
    batch, length, heads, head_dim = query.shape
    key_heads = key.shape[1]
    groups = heads // key_heads
    # The query heads of a key head are so many more queries.
    query = query.reshape(batch, length, key_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    query = query.reshape(batch, key_heads, groups * length, head_dim)
    logits = jnp.matmul(query, key, preferred_element_type=wide_dtype(query)) * head_dim**-0.5
    if mask is not None:
        logits = logits.reshape(batch, key_heads, groups, length, -1)
        logits = jnp.where(mask[:, :, None], logits, jnp.finfo(logits.dtype).min)
        logits = logits.reshape(batch, key_heads, groups * length, -1)
    out = _weighted_values(logits, value)
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
    of_weights = jnp.matmul(gradient, jnp.swapaxes(value, -1, -2), preferred_element_type=wide_dtype(gradient))
    mean = jnp.sum(wide(gradient) * wide(out), axis=-1, keepdims=True)
    return weights * (of_weights - mean), jnp.matmul(jnp.swapaxes(weights, -1, -2), gradient)


_weighted_values.defvjp(_forward, _backward)


def view_segments(lengths: jax.Array, size: int) -> jax.Array:
    """int32[B, S]: 1 on the first `lengths[b]` of S tokens, 0 behind. For views padded behind their patches."""
    return (jnp.arange(size)[None] < lengths[:, None]).astype(jnp.int32)
