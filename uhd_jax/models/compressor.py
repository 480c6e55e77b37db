"""The compressor inside the tower: every 2x2 window of tokens becomes one token.

All eight variants of the ablation (LLaVA-UHD v4 Tables 4 and A3; spec v4 sections 1.6, 2.4, 2.5). The paper's module D
is `window_attention_reused_mlp`. Where the paper gives only names and FLOPs, the variant says what was chosen here.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uhd_jax.config import TowerConfig
from uhd_jax.models import layers
from uhd_jax.ops.attention import attention
from uhd_jax.ops.merge import merge_windows
from uhd_jax.ops.precision import wide

REUSED = ("reused_mlp", "cross_attention_top_left", "cross_attention_mean", "window_attention_mlp")
REUSED += ("window_attention_reused_mlp",)


class Compressor(nn.Module):
    """float[V, P, D] in merge order -> float[V, P/4, D], in merge order of one level less."""

    kind: str
    config: TowerConfig
    dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Returns the merged tokens, and the window attention's output float[V, P, D] where the variant has one.

        Padding comes in whole windows (every side of a view is even), so it never mixes with patches.
        """
        if self.kind == "average_pool":
            return jnp.mean(merge_windows(x), axis=-2), None
        if self.kind == "unshuffle_mlp":
            return self._plain_mlp(x), None
        if self.kind == "reused_mlp":
            return self._reused_mlp(x), None
        if self.kind.startswith("cross_attention"):
            return self._cross_attention(x), None
        attended = self._window_attention(x)
        x = x + attended
        merged = self._plain_mlp(x) if self.kind == "window_attention_mlp" else self._reused_mlp(x)
        return merged, attended

    def _norm(self, name: str) -> layers.LayerNorm:
        return layers.LayerNorm(self.config.norm_eps, self.dtype, name=name)

    def _window_attention(self, x: jax.Array) -> jax.Array:
        windows = merge_windows(self._norm("norm1")(x))
        flat = windows.reshape(-1, *windows.shape[-2:])
        return layers.Attention(self.config.heads, self.dtype, name="attention")(flat, None).reshape(x.shape)

    def _reused_mlp(self, x: jax.Array) -> jax.Array:
        """Mean of the window + W2 gelu_tanh(W1 LN_4d(concat of the window)), W1: 4d -> 4f, W2: 4f -> d."""
        windows = merge_windows(x)
        joined = self._norm("mlp_norm")(windows.reshape(*windows.shape[:-2], -1))
        hidden = nn.gelu(layers.dense(4 * self.config.mlp_width, self.dtype, "linear_1")(joined), approximate=True)
        residual = jnp.mean(wide(windows), axis=-2).astype(self.dtype)
        return layers.dense(self.config.width, self.dtype, "linear_2")(hidden) + residual

    def _plain_mlp(self, x: jax.Array) -> jax.Array:
        """W2 gelu_erf(W1 LN_4d(concat of the window)), 4d -> 4d -> d, started as identity and window mean.

        No residual beside it: the start values carry the mean already.
        """
        windows = merge_windows(x)
        width = self.config.width
        joined = self._norm("mlp_norm")(windows.reshape(*windows.shape[:-2], -1))

        def identity(key, shape, dtype):
            return jnp.eye(*shape, dtype=dtype)

        def window_mean(key, shape, dtype):
            return jnp.tile(jnp.eye(shape[1], dtype=dtype), (4, 1)) / 4

        hidden = nn.gelu(layers.dense(4 * width, self.dtype, "linear_1", init=identity)(joined), approximate=False)
        return layers.dense(width, self.dtype, "linear_2", init=window_mean)(hidden)

    def _cross_attention(self, x: jax.Array) -> jax.Array:
        """One query per window (its top-left token, or the mean) attends to the window's four; then norm2 and an Mlp.

        The paper's cost counts the query projection on all four tokens; projecting the one query gives the same
        numbers, since picking and averaging commute with a linear layer.
        """
        heads, width = self.config.heads, self.config.width

        def pick(windows):
            if self.kind == "cross_attention_top_left":
                return windows[..., 0, :]
            return jnp.mean(wide(windows), axis=-2).astype(windows.dtype)

        windows = merge_windows(self._norm("norm1")(x)).reshape(-1, 4, width)
        block = _CrossAttention(heads, self.dtype, name="attention")
        merged = pick(merge_windows(x))
        merged = merged + block(pick(windows)[:, None], windows).reshape(merged.shape)
        return merged + layers.Mlp(self.config.mlp_width, self.dtype, name="mlp")(self._norm("norm2")(merged))


class _CrossAttention(nn.Module):
    """As `layers.Attention`, with queries from elsewhere."""

    heads: int
    dtype: layers.Dtype

    @nn.compact
    def __call__(self, query: jax.Array, context: jax.Array) -> jax.Array:
        """Query float[B, T, D], context float[B, S, D] -> float[B, T, D]."""
        width = query.shape[-1]

        def project(x, name):
            return layers.dense(width, self.dtype, name)(x).reshape(*x.shape[:-1], self.heads, width // self.heads)

        out = attention(project(query, "query"), project(context, "key"), project(context, "value"))
        return layers.dense(width, self.dtype, "out")(out.reshape(query.shape))


def reuse_init(kind: str, layer: Any, fresh: Any) -> Any:
    """Start values of a compressor from the layer it follows (spec v4 section 2.5).

    With the four tokens of every window equal, the paper's module then computes exactly what `layer` computes on one
    of them: W1 is block-diagonal in four copies of fc1, W2 is a quarter of four copies of fc2 side by side, and the
    residual is the window mean.

    Args:
      kind: a compressor kind; those without reused weights are returned as they are.
      layer: parameters of one tower layer (no layer axis).
      fresh: the compressor's own initial parameters, whose structure is kept.

    Returns:
      The parameters to start from, same structure and shapes as `fresh`.
    """
    if kind not in REUSED:
        return fresh
    start = dict(fresh)
    for name in ("attention", "norm1", "norm2", "mlp"):
        if name in start:
            start[name] = layer[name]
    if kind in ("reused_mlp", "window_attention_reused_mlp"):
        fc1, fc2 = layer["mlp"]["fc1"], layer["mlp"]["fc2"]
        start["mlp_norm"] = jax.tree.map(lambda leaf: jnp.tile(leaf, 4), layer["norm2"])
        start["linear_1"] = {"kernel": jnp.kron(jnp.eye(4), fc1["kernel"]), "bias": jnp.tile(fc1["bias"], 4)}
        start["linear_2"] = {"kernel": jnp.tile(fc2["kernel"], (4, 1)) / 4, "bias": fc2["bias"]}
    return start
