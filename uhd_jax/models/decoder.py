"""One decoder for Llama/Vicuna, Qwen2 and Qwen3: pre-norm, grouped-query attention, rotary positions, SwiGLU.

Dimension letters: B rows, T tokens, S cache length, D width, N heads, K kv heads, H head dim, V vocab, L layers.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uhd_jax.config import DecoderConfig
from uhd_jax.models import layers
from uhd_jax.ops.attention import attention
from uhd_jax.ops.rope import apply_rope, rope_angles

KeyValues = dict[str, jax.Array]  # "key", "value": float[.., S, K, H]


class DecoderLayer(nn.Module):
    """x + attention(input_norm(x)), then x + mlp(post_attention_norm(x)). No biases but Qwen2's on q, k, v."""

    config: DecoderConfig
    dtype: layers.Dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, angles: Any, mask: jax.Array, cache: KeyValues | None = None, index: jax.Array | None = None
    ) -> tuple[jax.Array, KeyValues]:
        """One layer.

        Args:
          x: float[B, T, D].
          angles: `rope_angles` of the tokens' positions.
          mask: bool[B, 1, T, S]; S is T without a cache.
          cache: this layer's keys and values float[B, S, K, H], or None to attend to x itself.
          index: int32[B], where in the cache the (single) token of each row is written.

        Returns:
          float[B, T, D], and the keys and values: the updated cache, or x's own.
        """
        cfg = self.config
        attended, keys_values = DecoderAttention(cfg, self.dtype, name="attention")(
            layers.RMSNorm(cfg.norm_eps, self.dtype, name="input_norm")(x), angles, mask, cache, index
        )
        x = x + attended
        normed = layers.RMSNorm(cfg.norm_eps, self.dtype, name="post_attention_norm")(x)
        return x + GatedMlp(cfg.mlp_width, self.dtype, name="mlp")(normed), keys_values


class DecoderAttention(nn.Module):
    """Grouped-query attention; Qwen3 normalises each head's query and key before rotating them."""

    config: DecoderConfig
    dtype: layers.Dtype

    @nn.compact
    def __call__(self, x, angles, mask, cache, index):
        """See DecoderLayer."""
        cfg = self.config

        def project(name, heads):
            out = layers.dense(heads * cfg.head_dim, self.dtype, name, bias=cfg.qkv_bias)(x)
            return out.reshape(*x.shape[:2], heads, cfg.head_dim)

        query, key, value = project("query", cfg.heads), project("key", cfg.kv_heads), project("value", cfg.kv_heads)
        if cfg.qk_norm:
            query = layers.RMSNorm(cfg.norm_eps, self.dtype, name="query_norm")(query)
            key = layers.RMSNorm(cfg.norm_eps, self.dtype, name="key_norm")(key)
        keys_values = {"key": apply_rope(key, angles), "value": value}
        if cache is not None:
            rows = jnp.arange(x.shape[0])
            keys_values = {name: cache[name].at[rows, index].set(new[:, 0]) for name, new in keys_values.items()}
        out = attention(apply_rope(query, angles), keys_values["key"], keys_values["value"], mask)
        return layers.dense(cfg.width, self.dtype, "out", bias=False)(out.reshape(*x.shape[:2], -1)), keys_values


class GatedMlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    width: int
    dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., D] -> float[..., D]."""
        gate = layers.dense(self.width, self.dtype, "gate", bias=False)(x)
        up = layers.dense(self.width, self.dtype, "up", bias=False)(x)
        return layers.dense(x.shape[-1], self.dtype, "down", bias=False)(nn.silu(gate) * up)


class Decoder(nn.Module):
    """Embedding, layers, final norm and head, as methods over one parameter tree."""

    config: DecoderConfig
    dtype: layers.Dtype = jnp.float32
    scan: bool = True
    remat: str = "none"

    def setup(self):
        """Declares the parameters."""
        cfg = self.config
        normal = nn.initializers.normal(0.02)
        self.embedding = self.param("embedding", normal, (cfg.vocab_size, cfg.width), jnp.float32)
        if not cfg.tied_head:
            self.head = self.param("head", normal, (cfg.width, cfg.vocab_size), jnp.float32)
        self.layer = DecoderLayer(cfg, self.dtype, parent=None)
        x = jnp.zeros((1, 1, cfg.width), self.dtype)
        angles = (jnp.zeros((1, 1, cfg.head_dim // 2)),) * 2
        mask = jnp.ones((1, 1, 1, 1), bool)
        self.layers = self.param("layers", layers.stack_init(self.layer, cfg.layers, x, angles, mask))
        self.final_norm = layers.RMSNorm(cfg.norm_eps, self.dtype)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32[B, T] -> float[B, T, D]."""
        return self.embedding[tokens].astype(self.dtype)

    def head_kernel(self) -> jax.Array:
        """float32[D, V]: the output matrix, the transposed embedding when tied."""
        return self.embedding.T if self.config.tied_head else self.head

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cache: KeyValues | None = None,
        index: jax.Array | None = None,
        keep: bool = False,
    ) -> tuple[jax.Array, KeyValues | None]:
        """Runs all layers and the final norm.

        Args:
          x: float[B, T, D] embeddings with visual tokens in place.
          positions: int32[B, T].
          mask: bool[B, 1, T, S].
          cache: keys and values float[L, B, S, K, H] when decoding token by token.
          index: int32[B] position in the cache of the new token, with `cache`.
          keep: return all layers' keys and values (always done with `cache`), to start a cache from.

        Returns:
          float[B, T, D], and keys and values [L, B, S, K, H] or None.
        """
        angles = rope_angles(positions, self.config.head_dim, self.config.rope_theta)
        keep = keep or cache is not None

        def step(x, inputs):
            params, layer_cache = inputs
            x, keys_values = self.layer.apply({"params": params}, x, angles, mask, layer_cache, index)
            return x, keys_values if keep else None

        x, keys_values = layers.run_stack(step, x, (self.layers, cache), scan=self.scan, remat=self.remat)
        return self.final_norm(x), keys_values
