"""Attention by kernels of accelerators: splash on TPUs, cuDNN on GPUs; arguments and results as of `ops.attention`.

Both work on what one device holds: on a mesh they stand in a `shard_map`. Neither keeps logits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

BLOCKS = (512, 384, 256, 128)  # queries, and keys, of one tile; multiples of a TPU's 128 lanes
_TILE_COST = 64  # of beginning a tile, in rows of work


def tiling(length: int) -> tuple[int, int]:
    """The length that a row is padded to, and the tile that divides it, for the least work."""
    padded = {block: -(-length // block) * block for block in BLOCKS}
    block = min(BLOCKS, key=lambda block: padded[block] ** 2 * (1 + _TILE_COST / block))
    return padded[block], block


def splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    *,
    causal: bool,
    interpret: bool = False,
) -> jax.Array:
    """Self-attention by JAX's splash kernel, forward and backward.

    Args:
      query: float[B, T, N, H].
      key: float[B, T, K, H].
      value: float[B, T, K, H].
      segments: int32[B, T].
      causal: as of `ops.attention.attention`.
      interpret: computes tile by tile in plain JAX, on any device, slowly.

    Returns:
      float[B, T, N, H].
    """
    # Slow to import, and only needed here.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads, head_dim = query.shape[1:]
    padded, block = tiling(length)
    query = (query.astype(jnp.float32) * head_dim**-0.5).astype(query.dtype)
    query, key, value = (
        jnp.pad(array, ((0, 0), (0, padded - length), (0, 0), (0, 0))).swapaxes(1, 2) for array in (query, key, value)
    )
    segments = jnp.pad(segments, ((0, 0), (0, padded - length)), constant_values=-1)
    mask = masks.CausalMask((padded, padded)) if causal else masks.FullMask((padded, padded))
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    out = jax.vmap(attend)(query, key, value, kernel.SegmentIds(segments, segments))
    return out.swapaxes(1, 2)[:, :length]


def cudnn_takes(query: jax.Array, causal: bool) -> bool:
    """Whether cuDNN's kernel has this form: half precision, heads of at most 128 values; for packed rows an even T."""
    length, _, head_dim = query.shape[1:]
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    return half and head_dim % 8 == 0 and head_dim <= 128 and not (causal and length % 2)


def cudnn(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, *, causal: bool) -> jax.Array:
    """Self-attention by cuDNN, as `splash`. Without `causal`, segments are 1 on a prefix and 0 behind it.

    A prefix goes to cuDNN as its length, and what lies behind it comes out as zeros. Samples packed in a row, which
    cuDNN has no argument for, go as a bias of all pairs besides the causal rule: bfloat16[B, 1, T, T].
    """
    if causal:
        where = {"mask": (segments[:, :, None] == segments[:, None, :])[:, None]}
    else:
        lengths = jnp.maximum(jnp.sum(segments, axis=1, dtype=jnp.int32), 1)
        where = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
    return jax.nn.dot_product_attention(query, key, value, is_causal=causal, implementation="cudnn", **where)
