"""Attention weights of a model, for pictures: a path of its own beside `models.uhd`, which knows nothing of it.

The model runs unchanged, layer by layer; what its attentions are called with is observed, and the weights are computed
from queries and keys once more. A pure function of parameters and one prompt; nothing of it is in the programs that
train or answer.
Dimension letters: V views, P patches, Q windows or all queries together, K keys, L full-attention layers, A asking
positions, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from uhd_jax.batch import Batch
from uhd_jax.config import ModelConfig
from uhd_jax.models import uhd
from uhd_jax.models.compressor import _CrossAttention
from uhd_jax.models.decoder import DecoderAttention
from uhd_jax.models.layers import Attention
from uhd_jax.models.resampler import WindowAttention
from uhd_jax.ops.precision import wide_dtype
from uhd_jax.ops.rope import apply_rope

_PROJECTED = {"query": "query", "key": "key", "query_norm": "query", "key_norm": "key"}


class AttentionMaps(NamedTuple):
    """Weights, means over heads. None where a model has no such attention."""

    compressor: jax.Array | None  # float32[V, P] in merge order: received in each 2x2 window, mean over its queries
    connector: jax.Array | None  # float32[V, Q, K]: mean over the queries of a window
    decoder: jax.Array  # float32[L, A, T]


def weights(query: jax.Array, key: jax.Array, seen: jax.Array | None) -> jax.Array:
    """Softmax weights, mean over heads, float32[B, T, S].

    Args:
      query: float[B, T, N, H].
      key: float[B, S, K, H]; K divides N.
      seen: bool[B or 1, T or 1, S], where a query may look; None: everywhere.
    """
    heads, head_dim = query.shape[-2:]
    key = jnp.repeat(key, heads // key.shape[-2], axis=-2)
    logits = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=wide_dtype(query)) * head_dim**-0.5
    if seen is not None:
        logits = jnp.where(seen[:, None], logits, jnp.finfo(logits.dtype).min)
    return jnp.mean(jax.nn.softmax(logits, axis=-1), axis=1)


class _Observer:
    """Sees every call of a module: remembers what queries and keys become, and makes weights when an attention ends."""

    def __init__(self, asking: jax.Array):
        self.compressor: list[jax.Array] = []
        self.connector: list[jax.Array] = []
        self.decoder: list[jax.Array] = []
        self._asking, self._parts = asking, {}

    def __call__(self, call: Any, arguments: Any, options: Any, context: Any) -> Any:
        result = call(*arguments, **options)
        module = context.module
        if context.method_name != "__call__":
            return result
        if module.name in _PROJECTED:
            self._parts[_PROJECTED[module.name]] = result
        elif isinstance(module, DecoderAttention):
            self._see_decoder(module, angles=arguments[1])
        elif isinstance(module, WindowAttention):
            self._see_connector(module, mask=arguments[3])
        elif isinstance(module, Attention | _CrossAttention) and "compressor" in module.path:
            query, key = (self._split(name, module.heads) for name in ("query", "key"))
            received = jnp.mean(weights(query, key, None), axis=1)  # [V * P / 4, 4]
            self.compressor.append(received)
        return result

    def _split(self, name: str, heads: int) -> jax.Array:
        x = self._parts[name]
        return x.reshape(*x.shape[:2], heads, -1)

    def _see_decoder(self, module: DecoderAttention, angles: Any) -> None:
        cfg = module.config
        query, key = self._split("query", cfg.heads), self._split("key", cfg.kv_heads)
        query, key = apply_rope(query, angles)[:, self._asking], apply_rope(key, angles)
        seen = jnp.arange(key.shape[1])[None, None] <= self._asking[None, :, None]
        self.decoder.append(weights(query, key, seen)[0])

    def _see_connector(self, module: WindowAttention, mask: jax.Array) -> None:
        query, key = self._parts["query"], self._parts["key"]  # [Q, S, D], [V, Q, K, D]
        views, windows, keys, width = key.shape
        split = (module.heads, width // module.heads)
        query = jnp.broadcast_to(query, (views, *query.shape)).reshape(views * windows, -1, *split)
        seen = jnp.broadcast_to(mask[:, None], (views, windows, keys)).reshape(-1, 1, keys)
        found = weights(query, key.reshape(-1, keys, *split), seen)
        self.connector.append(jnp.mean(found, axis=1).reshape(views, windows, keys))


@functools.partial(jax.jit, static_argnames=("config", "mode"))
def attention_maps(
    params: uhd.Params, batch: Batch, asking: jax.Array, config: ModelConfig, mode: str | None = None
) -> AttentionMaps:
    """Where one prompt's model looks.

    Args:
      params: the model's parameters.
      batch: one row with one sample.
      asking: int32[A], positions in it from which the decoder's attention is wanted.
      config: the model.
      mode: "16x" or "4x"; None for the config's.
    """
    plain = dataclasses.replace(
        config, scan_layers=False, tower_remat="none", decoder_remat="none", attention="xla"
    )  # every layer by itself, so that it can be seen
    observer = _Observer(asking)
    with nn.intercept_methods(observer):
        uhd.hidden_states(params, batch, plain, mode)
    views = batch.patches.shape[0] * batch.patches.shape[1]
    inside = [received.reshape(views, -1) for received in observer.compressor]
    return AttentionMaps(
        inside[0] if inside else None,
        observer.connector[0] if observer.connector else None,
        jnp.stack(observer.decoder),
    )
