"""The gated delta layer of the Qwen3.5 decoder, which holds the past in a state of fixed size (spec v4 section 4.4)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from uhd_jax.config import DecoderConfig
from uhd_jax.models import layers
from uhd_jax.ops.gated_delta import (
    causal_convolution,
    chunked_delta,
    convolution_step,
    convolution_tail,
    recurrent_delta,
)
from uhd_jax.ops.precision import wide
from uhd_jax.sharding.activations import by_heads, by_tokens

DeltaCache = dict[str, jax.Array]  # "conv": float[.., K - 1, C]; "state": float32[.., N, key dim, value dim]


def _decay_init(key: jax.Array, shape: tuple[int, ...], dtype: layers.Dtype) -> jax.Array:
    return jnp.log(jax.random.uniform(key, shape, dtype, 1, 16))


def _dt_init(key: jax.Array, shape: tuple[int, ...], dtype: layers.Dtype) -> jax.Array:
    """The inverse of softplus on 0.001 to 0.1, even in the logarithm."""
    step = jnp.exp(jax.random.uniform(key, shape, dtype, jnp.log(0.001), jnp.log(0.1)))
    return step + jnp.log(-jnp.expm1(-step))


class GatedDelta(nn.Module):
    """Projections, causal convolution and SiLU, gated delta rule, gated norm, output projection; no biases.

    Decays start as in Mamba-2 (arXiv 2405.21060): log_decay on log 1..16, softplus(dt_bias) on 0.001..0.1.
    """

    config: DecoderConfig
    dtype: layers.Dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, segments: jax.Array, cache: DeltaCache | None = None
    ) -> tuple[jax.Array, DeltaCache]:
        """Mixes the tokens of each sample.

        Args:
          x: float[B, T, D]; T is 1 with a cache.
          segments: int32[B, T], number of the sample, 0 is padding.
          cache: what a call returned for the tokens before, or None at the beginning of the samples.

        Returns:
          float[B, T, D], and the cache after each row's last sample.
        """
        cfg = self.config
        key_heads, heads = cfg.delta_key_heads, cfg.delta_value_heads
        keys, values = key_heads * cfg.delta_key_dim, heads * cfg.delta_value_dim
        channels, float32 = 2 * keys + values, jnp.float32  # of parameters

        def project(name, features):
            return layers.dense(features, self.dtype, name, bias=False)(x)

        mixed = project("qkv", channels)
        kernel = self.param("conv", nn.initializers.lecun_normal(), (cfg.delta_conv, channels), float32)
        if cache is None:
            tail = convolution_tail(mixed, cfg.delta_conv, segments)
            mixed = causal_convolution(by_heads(mixed), kernel, segments)
        else:
            mixed, tail = convolution_step(mixed, kernel, cache["conv"])
        query, key, value = jnp.split(nn.silu(mixed), [keys, 2 * keys], axis=-1)
        query, key = (by_heads(a.reshape(*x.shape[:2], key_heads, cfg.delta_key_dim)) for a in (query, key))
        value = by_heads(value.reshape(*x.shape[:2], heads, cfg.delta_value_dim))

        rate = jnp.exp(self.param("log_decay", _decay_init, (heads,), float32))
        bias = self.param("dt_bias", _dt_init, (heads,), float32)
        log_decay = by_heads(-rate * nn.softplus(wide(project("a", heads)) + bias))
        beta = by_heads(nn.sigmoid(wide(project("b", heads))))
        if cache is None:
            out, state = chunked_delta(query, key, value, log_decay, beta, segments)
            out = by_tokens(out)
        else:
            out, state = recurrent_delta(query, key, value, log_decay, beta, segments, cache["state"])

        gate = wide(project("z", values)).reshape(out.shape)
        out = layers.RMSNorm(cfg.norm_eps, out.dtype, name="norm")(out) * nn.silu(gate)
        out = out.reshape(*x.shape[:2], values).astype(self.dtype)
        return layers.dense(cfg.width, self.dtype, "out", bias=False)(out), {"conv": tail, "state": state}
