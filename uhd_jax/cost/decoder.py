"""The decoder: multiply-accumulates of its layers and head, and parameters.

A gated delta layer takes its tokens in chunks, as `ops.gated_delta.chunked_delta` does: products among the tokens of a
chunk, the inverse of its triangular system, and three products with the state.
"""

from __future__ import annotations

from uhd_jax.config import PARTS, DecoderConfig
from uhd_jax.cost.stretches import Stretch
from uhd_jax.cost.work import Work

CHUNK = 64  # tokens of a chunk


def decoder_stretches(decoder: DecoderConfig, work: Work, causal: bool) -> list[Stretch]:
    """From the embeddings to the logits of every token, in data order. `causal` halves the pairs inside chunks."""
    attending = decoder.layers // decoder.full_attention_interval
    deltas = decoder.layers - attending
    weights = attending * _attention_weights(decoder) + deltas * _delta_weights(decoder)
    weights += decoder.layers * 3 * decoder.width * decoder.mlp_width + decoder.width * decoder.vocab_size
    pairs = attending * 2 * decoder.heads * decoder.head_dim * work.token_pairs
    pairs += deltas * _delta_pairs(decoder, causal) * work.tokens
    return [Stretch("decoder", work.tokens * weights, pairs, upstream=PARTS)]


def decoder_parameters(decoder: DecoderConfig) -> int:
    """Number of parameters."""
    attending = decoder.layers // decoder.full_attention_interval
    heads = decoder.heads * (2 if decoder.gated_attention else 1) + 2 * decoder.kv_heads
    attention = _attention_weights(decoder)
    attention += heads * decoder.head_dim if decoder.qkv_bias else 0
    attention += 2 * decoder.head_dim if decoder.qk_norm else 0
    delta = _delta_weights(decoder) + 2 * decoder.delta_value_heads + decoder.delta_value_dim  # decays, and the norm
    mlp = 3 * decoder.width * decoder.mlp_width + 2 * decoder.width  # with both norms of a layer
    tables = decoder.vocab_size * decoder.width * (1 if decoder.tied_head else 2)
    mixing = attending * attention + (decoder.layers - attending) * delta
    return mixing + decoder.layers * mlp + tables + decoder.width


def _attention_weights(decoder: DecoderConfig) -> int:
    """Entries of queries, keys, values and output, and of Qwen3.5's gate."""
    heads = decoder.heads * (3 if decoder.gated_attention else 2) + 2 * decoder.kv_heads
    return decoder.width * decoder.head_dim * heads


def _delta_weights(decoder: DecoderConfig) -> int:
    """Entries of a gated delta layer's projections and convolution."""
    values = decoder.delta_value_heads * decoder.delta_value_dim
    channels = 2 * decoder.delta_key_heads * decoder.delta_key_dim + values
    projections = decoder.width * (channels + 2 * values + 2 * decoder.delta_value_heads)  # qkv, z and out, a and b
    return projections + decoder.delta_conv * channels


def _delta_pairs(decoder: DecoderConfig, causal: bool) -> float:
    """Products of two activations for one token of a gated delta layer."""
    key, value = decoder.delta_key_dim, decoder.delta_value_dim
    others = (CHUNK + 1) / 2 if causal else CHUNK
    inside = others * (2 * key + value)  # keys and queries with keys, and the changes' sum
    # The inverse of the triangular system, of blocks that double in size (two products of each pair of blocks), times
    # values and keys.
    solution = (CHUNK**2 - 1) / 3 + others * (key + value)
    return decoder.delta_value_heads * (inside + solution + 3 * key * value)
