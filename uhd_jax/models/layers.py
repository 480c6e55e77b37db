"""Small pieces every part of the model uses: norms, dense layers, attention and its MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uhd_jax.models.attending import self_attention
from uhd_jax.ops.precision import wide
from uhd_jax.ops.rope import apply_rope_pairs

Dtype = Any

Initializer = Callable[..., jax.Array]

lecun_init = nn.initializers.lecun_normal()
torch_linear_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # the weight rule of torch.nn.Linear


def dense(features: int, dtype: Dtype, name: str, *, bias: bool = True, init: Initializer = lecun_init) -> nn.Dense:
    """A linear layer with float32 parameters, computed in `dtype`; kernel [in, out]."""
    return nn.Dense(features, use_bias=bias, dtype=dtype, param_dtype=jnp.float32, kernel_init=init, name=name)


class LayerNorm(nn.Module):
    """LayerNorm computed in float32 whatever comes in, returned in `dtype` (bfloat16 norms overflowed upstream)."""

    eps: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., D] -> float[..., D]."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        x = wide(x)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.eps) * scale + bias).astype(self.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm computed in float32, returned in `dtype`; zero-centred ones multiply by 1 + scale."""

    eps: float
    dtype: Dtype
    zero_centred: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., D] -> float[..., D]."""
        start = nn.initializers.zeros if self.zero_centred else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],), jnp.float32) + float(self.zero_centred)
        x = wide(x)
        rms = jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x / rms * scale).astype(self.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with separate, biased projections."""

    heads: int
    dtype: Dtype
    implementation: str = "auto"  # `ModelConfig.attention`

    @nn.compact
    def __call__(
        self, x: jax.Array, segments: jax.Array | None, angles: tuple[jax.Array, jax.Array] | None = None
    ) -> jax.Array:
        """Self-attention on x float[B, T, D] inside segments int32[B, T], or at all -> float[B, T, D].

        With `angles` of `rope_angles_2d`, queries and keys are rotated.
        """
        width = x.shape[-1]
        split = (*x.shape[:-1], self.heads, width // self.heads)
        query, key, value = (dense(width, self.dtype, n)(x).reshape(split) for n in ("query", "key", "value"))
        if angles is not None:
            query, key = apply_rope_pairs(query, angles), apply_rope_pairs(key, angles)
        attended = self_attention(query, key, value, segments, causal=False, implementation=self.implementation)
        return dense(width, self.dtype, "out")(attended.reshape(x.shape))


def gelu_tanh(x: jax.Array) -> jax.Array:
    """The tanh approximation of GELU."""
    return nn.gelu(x, approximate=True)


def quick_gelu(x: jax.Array) -> jax.Array:
    """The approximation of GELU that CLIP was trained with."""
    return x * nn.sigmoid(1.702 * x)


class Mlp(nn.Module):
    """Two linear layers around a GELU."""

    width: int
    dtype: Dtype
    activation: Callable[[jax.Array], jax.Array] = gelu_tanh

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., D] -> float[..., D]."""
        hidden = self.activation(dense(self.width, self.dtype, "fc1")(x))
        return dense(x.shape[-1], self.dtype, "fc2")(hidden)
