"""The whole model as pure functions of a parameter tree: views -> visual tokens -> decoder -> logits or loss.

Parameters are a nested dict {"tower", "connector", "decoder"} of float32 arrays; layers are stacked on a leading axis.
Dimension letters: B rows, S view slots, V views, P patches per view, T tokens, D decoder width.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uhd_jax.batch import Batch
from uhd_jax.config import ModelConfig
from uhd_jax.models.clip import ClipTower
from uhd_jax.models.compressor import reuse_init
from uhd_jax.models.decoder import Cache, Decoder
from uhd_jax.models.hiwin import Hiwin
from uhd_jax.models.merger import MergingMlp
from uhd_jax.models.patches import for_bytes, normalise_bytes, normalise_patches
from uhd_jax.models.projector import BilinearMlp, PlainMlp
from uhd_jax.models.resampler import Perceiver, SpatialResampler
from uhd_jax.models.vit import Tower
from uhd_jax.ops.losses import chunked_cross_entropy
from uhd_jax.ops.merge import place_visual_tokens
from uhd_jax.ops.precision import wide_dtype
from uhd_jax.sharding.activations import mesh_in_use, pad_tokens
from uhd_jax.sharding.gathering import GatherLayer
from uhd_jax.sharding.views import fold_views, on_every_chip, unfold_views
from uhd_jax.sharding.vocabulary import cross_entropy

Params = dict[str, Any]


_CONNECTORS = {
    "mlp": PlainMlp,
    "bilinear_mlp": BilinearMlp,
    "perceiver": Perceiver,
    "spatial_resampler": SpatialResampler,
    "hiwin": Hiwin,
}


def tower(config: ModelConfig, gather: GatherLayer | None = None) -> nn.Module:
    """The tower's module; `gather` as in `stacks.run_stack`."""
    computing = (jnp.dtype(config.dtype), config.scan_layers, config.tower_remat, config.attention, gather)
    if config.tower.kind == "clip":
        return ClipTower(config.tower, *computing)
    return Tower(config.tower, config.compressor, *computing)


def connector(config: ModelConfig) -> nn.Module:
    """The connector's module."""
    width, dtype = config.decoder.width, jnp.dtype(config.dtype)
    if config.connector.kind == "merging_mlp":
        return MergingMlp(config.connector, width, dtype)
    return _CONNECTORS[config.connector.kind](config.connector, width, config.connector_heads, dtype)


def decoder(config: ModelConfig) -> Decoder:
    """The decoder's module."""
    return Decoder(config.decoder, jnp.dtype(config.dtype), config.scan_layers, config.decoder_remat, config.attention)


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Random parameters, the compressor started from the layer it follows. Pure: jit it with `out_shardings`."""
    keys = dict(zip(("tower", "connector", "decoder"), jax.random.split(key, 3), strict=True))
    patches = jnp.zeros((1, 16, config.tower.patch_dim))
    grids = jnp.full((1, 2), 4, jnp.int32)
    compress = config.compressor.kind != "none"
    tokens = jnp.zeros((1, 16, config.tower.width))
    embeddings = jnp.zeros((1, 1, config.decoder.width))
    position = jnp.zeros((1, 1), jnp.int32)
    params = {
        "tower": tower(config).init(keys["tower"], patches, grids, levels=2, compress=compress)["params"],
        "connector": connector(config).init(keys["connector"], tokens, grids, patches).get("params", {}),
        "decoder": decoder(config).init(keys["decoder"], embeddings, position)["params"],
    }
    return start_compressor(params, config)


def start_compressor(params: Params, config: ModelConfig) -> Params:
    """Reuse initialisation: the compressor's weights from the tower layer it follows (spec v4 section 2.5)."""
    if "compressor" not in params["tower"]:
        return params
    layer = jax.tree.map(lambda leaf: leaf[config.compressor.after_layer], params["tower"]["layers"])
    start = reuse_init(config.compressor.kind, layer, params["tower"]["compressor"])
    return {**params, "tower": {**params["tower"], "compressor": start}}


def encode_views(
    params: Params, patches: jax.Array, grids: jax.Array, config: ModelConfig, mode: str | None = None
) -> jax.Array:
    """Visual tokens of views.

    Args:
      params: the model's parameters.
      patches: uint8[V, P, patch_bytes] in merge order, P a multiple of 4**levels.
      grids: int32[V, 2] patch rows and columns, each a multiple of 2**levels; (0, 0) for an empty slot.
      config: the model.
      mode: "16x" or "4x"; None for the config's.

    Returns:
      float[V, `config.visual_tokens(P)`, D] in raster order; what lies behind a view's own tokens is meaningless.
    """
    mode = mode or config.mode
    levels = config.merge_levels(mode)
    if patches.shape[1] % 4**levels:
        raise ValueError(f"room for {patches.shape[1]} patches per view is not a multiple of {4**levels}")
    compress = mode == "16x"
    inside = config.compressor.kind != "none" and compress

    def encode(params, gather, patches, grids):
        module, weights = tower(config, gather), for_bytes(params["tower"], config.tower)
        pixels = normalise_bytes(patches, config.tower)
        features, _ = module.apply({"params": weights}, pixels, grids, levels=levels, compress=compress)
        guide = normalise_patches(patches, config.tower)  # of a pyramid; all else leaves it out of the program
        return connector(config).apply({"params": params["connector"]}, features, grids // 2**inside, guide)

    vision = {name: params[name] for name in ("tower", "connector")}
    return on_every_chip(encode, jnp.dtype(config.dtype), vision, patches, grids)


def embed(params: Params, batch: Batch, config: ModelConfig, mode: str | None = None) -> jax.Array:
    """float[B, T, D]: token embeddings with the visual tokens in their places."""
    rows, slots = batch.patches.shape[:2]
    words = decoder(config).apply({"params": params["decoder"]}, batch.tokens, method="embed")
    if slots == 0:
        return words
    views = encode_views(params, fold_views(batch.patches), fold_views(batch.patch_grids), config, mode)
    features = unfold_views(views, rows, slots)
    features = features.reshape(rows, -1, features.shape[-1])
    return place_visual_tokens(words, features, batch.visual_index)


def hidden_states(params: Params, batch: Batch, config: ModelConfig, mode: str | None = None) -> jax.Array:
    """float[B, T, D]: the decoder's output before the head."""
    x = embed(params, batch, config, mode)
    return decoder(config).apply({"params": params["decoder"]}, x, batch.positions, batch.segments)[0]


def head_kernel(params: Params, config: ModelConfig) -> jax.Array:
    """float32[D, V]."""
    return decoder(config).apply({"params": params["decoder"]}, method="head_kernel")


def _project(hidden: jax.Array, params: Params, config: ModelConfig) -> jax.Array:
    kernel = head_kernel(params, config).astype(hidden.dtype)
    return jnp.matmul(hidden, kernel, preferred_element_type=wide_dtype(hidden))


def logits(params: Params, batch: Batch, config: ModelConfig, mode: str | None = None) -> jax.Array:
    """float32[B, T, V] at every position: whole, so for short inputs; training uses `loss_sums`."""
    return _project(hidden_states(params, batch, config, mode), params, config)


def loss_sums(
    params: Params, batch: Batch, config: ModelConfig, mode: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sum of weighted token losses and sum of weights, float32[] each; their quotient is the loss.

    The weight at t belongs to predicting tokens[t] from what stands before it, so a sample's first token must weigh 0.
    """
    targets, weights = batch.tokens[:, 1:], batch.loss_weights[:, 1:]
    if mesh_in_use() is None:
        hidden = hidden_states(params, batch, config, mode)
        total = chunked_cross_entropy(hidden[:, :-1], head_kernel(params, config), targets, weights, config.loss_chunk)
        return total, jnp.sum(weights)
    padded = {name: pad_tokens(getattr(batch, name)) for name in ("tokens", "positions", "segments")}
    padded["visual_index"] = pad_tokens(batch.visual_index, -1)
    hidden = hidden_states(params, dataclasses.replace(batch, **padded), config, mode)
    # As many targets as tokens, so that both lie alike: the last token of a row predicts nothing.
    targets, weights = (pad_tokens(jnp.pad(array, ((0, 0), (0, 1)))) for array in (targets, weights))
    tied = config.decoder.tied_head
    head = params["decoder"]["embedding" if tied else "head"]
    return cross_entropy(hidden, head, targets, weights, tied, config.loss_chunk), jnp.sum(weights)


@functools.partial(jax.jit, static_argnames=("config", "cache_length", "mode"))
def prefill(
    params: Params, batch: Batch, config: ModelConfig, cache_length: int, mode: str | None = None
) -> tuple[jax.Array, Cache]:
    """Reads prompts, one per row from its left end, and starts the cache.

    Args:
      params: the model's parameters.
      batch: rows with one sample each; segments are 1 on the prompt and 0 behind it.
      config: the model.
      cache_length: S, room for prompt and answer.
      mode: "16x" or "4x"; None for the config's.

    Returns:
      float32[B, V] logits after each prompt's last token, and the cache (`models.decoder.Cache`).
    """
    logits, cache = read_prompts(params, embed(params, batch, config, mode), batch.segments, config)
    room = cache_length - batch.tokens.shape[1]
    cache |= {name: jnp.pad(cache[name], [(0, 0), (0, 0), (0, room), (0, 0), (0, 0)]) for name in ("key", "value")}
    return logits, cache


def read_prompts(params: Params, x: jax.Array, segments: jax.Array, config: ModelConfig) -> tuple[jax.Array, Cache]:
    """Runs the decoder over embedded prompts.

    Args:
      params: the model's parameters.
      x: float[B, T, D]: a prompt from the left end of each row, visual tokens in place.
      segments: int32[B, T], 1 on the prompt and 0 behind it.
      config: the model.

    Returns:
      float32[B, V] logits after each prompt's last token, and a cache of length T.
    """
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), segments.shape)
    hidden, cache = decoder(config).apply({"params": params["decoder"]}, x, positions, segments, keep=True)
    last = jnp.maximum(jnp.sum(segments > 0, axis=1) - 1, 0)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    return _project(hidden, params, config)[:, 0], cache


@functools.partial(jax.jit, static_argnames=("config", "window"), donate_argnames=("cache",))
def decode_step(
    params: Params, tokens: jax.Array, index: jax.Array, cache: Cache, config: ModelConfig, window: int | None = None
) -> tuple[jax.Array, Cache]:
    """One token per row.

    Args:
      params: the model's parameters.
      tokens: int32[B], the token just chosen in each row.
      index: int32[B], its position, which is also its place in the cache; prompt padding that lay there is overwritten.
      cache: of `prefill` or the step before; donated.
      config: the model.
      window: so much of the cache, from its beginning, is attended to: above every `index`; None for all of it.

    Returns:
      float32[B, V] logits of the next token, and the cache with this token in it.
    """
    module = decoder(config)
    x = module.apply({"params": params["decoder"]}, tokens[:, None], method="embed")
    hidden, cache = module.apply(
        {"params": params["decoder"]}, x, index[:, None], cache=cache, index=index, window=window
    )
    return _project(hidden, params, config)[:, 0], cache
