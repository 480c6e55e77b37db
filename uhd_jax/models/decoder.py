"""One decoder for Llama/Vicuna, Qwen2, Qwen3 and Qwen3.5: pre-norm, grouped-query attention, rotary positions, SwiGLU.

Qwen3.5 is a hybrid: its layers come in groups of some gated delta layers and one full-attention layer behind them.

Dimension letters: B rows, T tokens, S cache length, D width, N heads, K kv heads, H head dim, V vocab, L full-attention
layers, G gated delta layers.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uhd_jax.config import DecoderConfig
from uhd_jax.models import layers
from uhd_jax.models.attending import self_attention
from uhd_jax.models.gated_delta import DeltaCache, GatedDelta
from uhd_jax.models.stacks import in_groups, run_stack, stack_init, stack_param
from uhd_jax.ops.attention import attention
from uhd_jax.ops.rope import apply_rope, rope_angles
from uhd_jax.sharding.gathering import layer_gatherer
from uhd_jax.sharding.vocabulary import lookup

KeyValues = dict[str, jax.Array]  # "key", "value": float[.., S, K, H]
# Keys and values of all layers, float[L, B, S, K, H], and whose are meant, int32[]. All of them go from layer to layer,
# so that new ones are written in place: handed out layer by layer, the whole cache would be copied every step.
OfLayer = tuple[KeyValues, jax.Array]

# What decoding token by token goes on from: "key", "value" float[L, B, S, K, H]; of a hybrid also what its gated delta
# layers keep, "conv" float[G, B, W - 1, C] and "state" float32[G, B, value heads, key dim, value dim].
Cache = dict[str, jax.Array]


class DecoderLayer(nn.Module):
    """x + attention(input_norm(x)), then x + mlp(post_attention_norm(x)). No biases but Qwen2's on q, k, v."""

    config: DecoderConfig
    dtype: layers.Dtype
    attention: str = "auto"  # `ModelConfig.attention`

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        angles: Any,
        segments: jax.Array,
        cache: OfLayer | None = None,
        index: jax.Array | None = None,
        window: int | None = None,
    ) -> tuple[jax.Array, KeyValues]:
        """One layer.

        Args:
          x: float[B, T, D].
          angles: `rope_angles` of the tokens' positions.
          segments: int32[B, T]; without a cache, tokens look at earlier ones of their segment.
          cache: keys and values of all layers, of this one's all up to `index` are looked at; or None to attend to x
            itself.
          index: int32[B], where in the cache the (single) token of each row is written.
          window: how much of the cache is read, above every index; None for all of it.

        Returns:
          float[B, T, D], and the keys and values: those of all layers, updated, or x's own float[B, T, K, H].
        """
        cfg = self.config
        attended, keys_values = DecoderAttention(cfg, self.dtype, self.attention, name="attention")(
            _norm(cfg, self.dtype, "input_norm")(x), angles, segments, cache, index, window
        )
        x = x + attended
        normed = _norm(cfg, self.dtype, "post_attention_norm")(x)
        return x + GatedMlp(cfg.mlp_width, self.dtype, name="mlp")(normed), keys_values


class DeltaLayer(nn.Module):
    """The same with a gated delta net in the place of attention."""

    config: DecoderConfig
    dtype: layers.Dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, segments: jax.Array, cache: DeltaCache | None = None
    ) -> tuple[jax.Array, DeltaCache]:
        """float[B, T, D] -> float[B, T, D], and the cache; see GatedDelta."""
        cfg = self.config
        normed = _norm(cfg, self.dtype, "input_norm")(x)
        mixed, cache = GatedDelta(cfg, self.dtype, name="delta")(normed, segments, cache)
        x = x + mixed
        normed = _norm(cfg, self.dtype, "post_attention_norm")(x)
        return x + GatedMlp(cfg.mlp_width, self.dtype, name="mlp")(normed), cache


def _norm(config: DecoderConfig, dtype: layers.Dtype, name: str | None) -> layers.RMSNorm:
    return layers.RMSNorm(config.norm_eps, dtype, config.zero_centred_norm, name=name)


class DecoderAttention(nn.Module):
    """Grouped-query attention; Qwen3 normalises each head's query and key before rotating them, Qwen3.5 gates what
    comes out by the sigmoid of one more projection."""

    config: DecoderConfig
    dtype: layers.Dtype
    implementation: str

    @nn.compact
    def __call__(self, x, angles, segments, cache, index, window):
        """See DecoderLayer."""
        cfg = self.config

        def project(name, heads):
            out = layers.dense(heads * cfg.head_dim, self.dtype, name, bias=cfg.qkv_bias)(x)
            return out.reshape(*x.shape[:2], heads, cfg.head_dim)

        query, key, value = project("query", cfg.heads), project("key", cfg.kv_heads), project("value", cfg.kv_heads)
        if cfg.qk_norm:
            query = _norm(cfg, self.dtype, "query_norm")(query)
            key = _norm(cfg, self.dtype, "key_norm")(key)
        query, keys_values = apply_rope(query, angles), {"key": apply_rope(key, angles), "value": value}
        if cache is None:
            out = self_attention(
                query, *keys_values.values(), segments, causal=True, implementation=self.implementation
            )
        else:
            stack, layer = cache
            keys_values = {name: _write(stack[name], layer, index, new[:, 0]) for name, new in keys_values.items()}
            seen = [_read(stack, layer, window) for stack in keys_values.values()]
            filled = (jnp.arange(seen[0].shape[1])[None] <= index[:, None]).astype(jnp.int32)
            out = attention(query, *seen, jnp.ones_like(index)[:, None], filled)
        if cfg.gated_attention:
            out = out * nn.sigmoid(project("gate", cfg.heads))
        return layers.dense(cfg.width, self.dtype, "out", bias=False)(out.reshape(*x.shape[:2], -1)), keys_values


def _write(stack: jax.Array, layer: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
    """float[L, B, S, K, H] with new[b] float[K, H] at [layer, b, index[b]]."""

    def write(row, index, new):
        zero = jnp.zeros_like(index)  # all of one dtype, under x64 too
        return jax.lax.dynamic_update_slice(row, new[None, None].astype(row.dtype), (layer, index, zero, zero))

    return jax.vmap(write, in_axes=(1, 0, 0), out_axes=1)(stack, index, new)


def _read(stack: jax.Array, layer: jax.Array, window: int | None) -> jax.Array:
    """float[B, window, K, H]: the beginning of one layer's rows."""
    _, rows, length, *heads = stack.shape
    start = (layer, *[jnp.zeros_like(layer)] * 4)
    return jax.lax.dynamic_slice(stack, start, (1, rows, window or length, *heads))[0]


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
    attention: str = "auto"

    def setup(self):
        """Declares the parameters."""
        cfg = self.config
        normal = nn.initializers.normal(0.02)
        self.embedding = self.param("embedding", normal, (cfg.vocab_size, cfg.width), jnp.float32)
        if not cfg.tied_head:
            self.head = self.param("head", normal, (cfg.width, cfg.vocab_size), jnp.float32)
        self.layer = DecoderLayer(cfg, self.dtype, self.attention, parent=None)
        x = jnp.zeros((1, 1, cfg.width), self.dtype)
        angles = (jnp.zeros((1, 1, (cfg.rotary_dim or cfg.head_dim) // 2)),) * 2
        segments = jnp.ones((1, 1), jnp.int32)
        groups = cfg.layers // cfg.full_attention_interval
        self.layers = stack_param(self, "layers", stack_init(self.layer, groups, x, angles, segments))
        if cfg.layers > groups:
            self.delta_layer = DeltaLayer(cfg, self.dtype, parent=None)
            start = stack_init(self.delta_layer, cfg.layers - groups, x, segments)
            self.delta_layers = stack_param(self, "delta_layers", start)
        self.final_norm = _norm(cfg, self.dtype, None)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32[B, T] -> float[B, T, D]."""
        return lookup(self.embedding, tokens, self.dtype)

    def head_kernel(self) -> jax.Array:
        """float32[D, V]: the output matrix, the transposed embedding when tied."""
        return self.embedding.T if self.config.tied_head else self.head

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segments: jax.Array | None = None,
        cache: Cache | None = None,
        index: jax.Array | None = None,
        window: int | None = None,
        keep: bool = False,
    ) -> tuple[jax.Array, Cache | None]:
        """Runs all layers and the final norm.

        Args:
          x: float[B, T, D] embeddings with visual tokens in place.
          positions: int32[B, T]; with the config's `mrope_sections` also int32[3, B, T].
          segments: int32[B, T], number of the sample, 0 is padding; None where each row is one sample.
          cache: what a call returned, when decoding token by token; T is then 1.
          index: int32[B] position in the cache of the new token, with `cache`.
          window: as of `DecoderLayer`.
          keep: return a cache (always done with `cache`), whose S is T, to start decoding from.

        Returns:
          float[B, T, D], and the cache or None.
        """
        cfg = self.config
        angles = rope_angles(positions, cfg.rotary_dim or cfg.head_dim, cfg.rope_theta, cfg.mrope_sections)
        segments = jnp.ones(x.shape[:2], jnp.int32) if segments is None else segments
        keep = keep or cache is not None

        def attend(carry, inputs):
            x, stack = carry
            params, number = inputs
            own = None if stack is None else (stack, number)
            x, kept = self.layer.apply({"params": params}, x, angles, segments, own, index, window)
            if stack is not None:
                return (x, kept), None
            return (x, None), kept if keep else None

        def delta(x, inputs):
            params, layer_cache = inputs
            x, kept = self.delta_layer.apply({"params": params}, x, segments, layer_cache)
            return x, kept if keep else None

        def run(step, carry, name, inputs):
            whole = layer_gatherer(getattr(self, name), f"decoder/{name}/", self.dtype)
            gather = whole and (lambda inputs: (whole(inputs[0]), inputs[1]))
            return run_stack(step, carry, inputs, scan=self.scan, remat=self.remat, pin=cache is None, gather=gather)

        stack = None if cache is None else {name: cache[name] for name in ("key", "value")}
        full = self.layers, jnp.arange(cfg.layers // cfg.full_attention_interval, dtype=jnp.int32)
        if cfg.full_attention_interval == 1:
            (x, stack), kept = run(attend, (x, stack), "layers", full)
            return self.final_norm(x), kept if cache is None else stack

        def group(carry, inputs):
            x, stack = carry
            x, of_delta = run(delta, x, "delta_layers", inputs[0])
            carry, of_full = run(attend, (x, stack), "layers", jax.tree.map(lambda leaf: leaf[None], inputs[1]))
            return carry, (of_delta, jax.tree.map(lambda leaf: leaf[0], of_full))

        states = None if cache is None else {name: cache[name] for name in ("conv", "state")}
        deltas = in_groups((self.delta_layers, states), cfg.full_attention_interval - 1)
        (x, stack), (states, kept) = run_stack(
            group, (x, stack), (deltas, full), scan=self.scan, remat="none", pin=cache is None
        )
        x = self.final_norm(x)
        if not keep:
            return x, None
        keys_values = kept if cache is None else stack
        return x, keys_values | {name: leaf.reshape(-1, *leaf.shape[2:]) for name, leaf in states.items()}
