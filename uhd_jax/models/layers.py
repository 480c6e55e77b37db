"""Small pieces every part of the model uses: norms, dense layers, and stacks of equal layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uhd_jax.models.attending import self_attention
from uhd_jax.ops.precision import wide
from uhd_jax.ops.rope import apply_rope_pairs
from uhd_jax.sharding.activations import over_tokens
from uhd_jax.sharding.gathering import GatherLayer, keep_all_but_whole

Dtype = Any

Initializer = Callable[..., jax.Array]

lecun_init = nn.initializers.lecun_normal()
torch_linear_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # the weight rule of torch.nn.Linear

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


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


def stack_init(layer: nn.Module, depth: int, *example: Any) -> Callable[[jax.Array], dict]:
    """Initialiser of `depth` equal layers as one tree whose leaves have a leading layer axis [L, ...].

    For `self.param("layers", stack_init(...))`. `layer` must be unbound (parent=None); `example` are arguments of its
    `__call__`, of which only shapes and dtypes matter.
    """

    def init(key: jax.Array) -> dict:
        keys = jax.random.split(key, depth)
        return jax.vmap(lambda k: layer.init(k, *example)["params"])(keys)

    return init


def stack_param(module: nn.Module, name: str, init: Callable[[jax.Array], dict]) -> dict:
    """The stacked tree `name` of a module, made by `init` of `stack_init` where it is not there yet.

    Unlike `module.param` it does not compare shapes: in a `shard_map` a device has a part of each layer.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init)


def run_stack(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    stacked: Any,
    *,
    scan: bool,
    remat: str,
    start: int = 0,
    stop: int | None = None,
    pin: bool = True,
    gather: GatherLayer | None = None,
) -> tuple[Any, Any]:
    """Runs layers `start` to `stop` (exclusive) of a stacked tree.

    Args:
      step: (carry, one layer's slice of `stacked`) -> (carry, output of the layer).
      carry: goes from layer to layer.
      stacked: tree whose leaves have a leading layer axis.
      scan: one compiled body for all layers, else a Python loop (to compare, and to count FLOPs).
      remat: name in REMAT_POLICIES, or "none".
      start: first layer.
      stop: one past the last layer; None for all.
      pin: keep what is carried where its rows are; off where its leading axis is not one of rows.
      gather: makes a layer's slice whole where devices hold parts of it, in the loop, and again for the gradient.

    Returns:
      The last carry, and the layers' outputs stacked on a leading axis.
    """

    def run(carry, layer):
        carry = jax.tree.map(over_tokens, carry) if pin else carry
        return step(carry, layer if gather is None else gather(layer))

    policy = REMAT_POLICIES.get(remat)
    if remat == "none" and gather is not None:
        policy = keep_all_but_whole
    if policy is not None:
        run = jax.checkpoint(run, policy=policy, prevent_cse=not scan)
    part = jax.tree.map(lambda leaf: leaf[start:stop], stacked)
    if scan:
        return jax.lax.scan(run, carry, part)
    outputs = []
    for index in range(jax.tree.leaves(part)[0].shape[0]):
        carry, output = run(carry, jax.tree.map(lambda leaf, i=index: leaf[i], part))
        outputs.append(output)
    if not outputs:
        return jax.lax.scan(run, carry, part)  # no layers: scan knows the outputs' shapes
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
