"""Numbers of parameters by part, and the bytes they take."""

from __future__ import annotations

import math
from collections.abc import Sequence

from uhd_jax.config import PARTS, CompressorConfig, ConfigError, ModelConfig, TowerConfig
from uhd_jax.cost.connectors import KEY_WIDTH, NEIGHBOURS
from uhd_jax.cost.decoder import decoder_parameters
from uhd_jax.cost.tower import KINDS, layer_weights


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Number of parameters by part. Raises ConfigError: a kind of tower or connector that is not known here."""
    tower, d = config.tower, config.tower.width
    if tower.kind not in KINDS:
        raise ConfigError(f"tower.kind: the parameters of a tower of kind {tower.kind!r} are not known")
    clip = tower.kind == "clip"
    norm = 2 * d
    layer = layer_weights(tower) + 4 * d + tower.mlp_width + d + 2 * norm
    counts = {
        "tower": tower.layers * layer + norm + (norm + d if clip else 0),  # CLIP: a norm before, and the class token
        "patch_embedding": (tower.patch_dim + (not clip)) * d,
        "position_table": (math.prod(tower.table_shape) + clip) * d,
        "compressor": _compressor(config.compressor, tower),
        "decoder": decoder_parameters(config.decoder),
    }
    return dict.fromkeys(PARTS, 0) | counts | _connector(config)


def _compressor(compressor: CompressorConfig, tower: TowerConfig) -> int:
    d, f = tower.width, tower.mlp_width
    attention = 4 * _dense(d, d) + 2 * d  # with its norm
    plain_mlp = 8 * d + _dense(4 * d, 4 * d) + _dense(4 * d, d)
    reused_mlp = 8 * d + _dense(4 * d, 4 * f) + _dense(4 * f, d)
    cross = attention + 2 * d + _dense(d, f) + _dense(f, d)
    return {
        "none": 0,
        "average_pool": 0,
        "unshuffle_mlp": plain_mlp,
        "reused_mlp": reused_mlp,
        "cross_attention_top_left": cross,
        "cross_attention_mean": cross,
        "window_attention_mlp": attention + plain_mlp,
        "window_attention_reused_mlp": attention + reused_mlp,
    }[compressor.kind]


def _connector(config: ModelConfig) -> dict[str, int]:
    connector, c, d = config.connector, config.tower.width, config.decoder.width
    if connector.kind == "merging_mlp":
        outs = [c] * (connector.rounds - 1) + [d]
        return {"connector": sum(2 * 4 * c + _dense(4 * c, 4 * c) + _dense(4 * c, out) for out in outs)}
    levels, queries = connector.pyramid.levels, connector.queries
    if connector.kind in ("mlp", "bilinear_mlp"):
        return {"connector": _dense(len(levels) * c, d) + _dense(d, d)} | _pyramid(config)
    # Attention, the output matrix, and the norms of queries, of keys and values, and of what is found.
    shared = 4 * _dense(d, d) + d * d + 3 * 2 * d
    if connector.kind == "hiwin":
        sets = connector.query_sets
        joining = 2 * d + _dense(sets * d, d) if sets > 1 else 0
        own = sets * queries * d + len(levels) * (_dense(c, d) + d) + joining
    elif connector.kind in ("perceiver", "spatial_resampler"):
        own = queries * d + c * d
    else:
        raise ConfigError(f"connector.kind: the parameters of a connector of kind {connector.kind!r} are not known")
    return {"connector": shared + own, "connector_positions": queries * d} | _pyramid(config)


def _pyramid(config: ModelConfig) -> dict[str, int]:
    pyramid, c = config.connector.pyramid, config.tower.width
    top = max(pyramid.levels)
    if top == 0 or pyramid.upsampling == "bilinear":
        return {}
    if pyramid.upsampling == "deconvolution":
        return {"upsampler": top * (4 * c * c + c)}
    keys = _dense(3, KEY_WIDTH) + _dense(KEY_WIDTH, KEY_WIDTH)
    kernel = _dense(NEIGHBOURS + 3, NEIGHBOURS) + _dense(NEIGHBOURS, NEIGHBOURS)
    return {"upsampler": top * (keys + kernel + 2), "upsampler_fixup": _dense(c, c)}


def _dense(features: int, out: int) -> int:
    return (features + 1) * out


def weight_bytes(config: ModelConfig) -> dict[str, int]:
    """Bytes of all parameters, by dtype."""
    count = sum(parameter_counts(config).values())
    return {"float32": 4 * count, "bfloat16": 2 * count}


def state_bytes(config: ModelConfig, trainable: Sequence[str]) -> dict[str, int]:
    """Bytes of a training state over all devices: float32 parameters, gradients and two moments of the trained ones."""
    counts = parameter_counts(config)
    trained = sum(counts[part] for part in trainable)
    return {"parameters": 4 * sum(counts.values()), "gradients": 4 * trained, "moments": 8 * trained}
