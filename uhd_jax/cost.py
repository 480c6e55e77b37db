"""Parameters and floating-point operations from the config alone: analytic, by part, honest about padding.

Conventions (docs/metrics.md says the same at length):
- one multiply-accumulate is 2 FLOPs; only matrix products and attention products count, not norms, softmax or GELU;
- attention inside a view counts all pairs of its patches, the decoder's only the causal pairs inside a sample;
- window attention of the compressor counts its true 2x2 windows;
- training counts the forward pass, one more of each matrix product for its input's gradient where one is needed, and
  one more for its weight's gradient where the weight is trained; recomputation (remat) does not count.
`paper_gflops` has the paper's own, different, convention (spec v4 section 1.9).

Dimension letters: d tower width, f tower mlp width, D decoder width.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uhd_jax.batch import Batch, Bucket
from uhd_jax.config import PARTS, CompressorConfig, DecoderConfig, ModelConfig, TowerConfig
from uhd_jax.slicing.plan import Plan

# Dense bf16 FLOP/s of one device, without structured sparsity, as published; first match of the device kind.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    (r"TPU v4", 275e12),
    (r"TPU (v5 lite|v5e)", 197e12),
    (r"TPU (v5|v5p)", 459e12),
    (r"TPU (v6 lite|v6e)", 918e12),
    (r"NVIDIA H100 PCIe", 756e12),
    (r"NVIDIA (H100|H200|GH200)\b.*", 989e12),
    (r"NVIDIA A100\b.*", 312e12),
)


@dataclasses.dataclass(frozen=True)
class Work:
    """How much there is to compute, as sums over views and samples; adds up over rows, batches and images."""

    views: int = 0
    patches: int = 0
    patch_pairs: int = 0  # sum over views of patches**2
    tokens: int = 0  # of the decoder, visual tokens included
    token_pairs: int = 0  # sum over samples of tokens * (tokens + 1) / 2

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def work(view_patches: Iterable[int], sample_tokens: Iterable[int]) -> Work:
    """Work of views of so many patches and of samples of so many tokens."""
    views, samples = list(view_patches), list(sample_tokens)
    return Work(
        views=len(views),
        patches=sum(views),
        patch_pairs=sum(n * n for n in views),
        tokens=sum(samples),
        token_pairs=sum(n * (n + 1) // 2 for n in samples),
    )


def plan_work(plan: Plan, text_tokens: int = 0) -> Work:
    """Work of one image in one sample with `text_tokens` others."""
    return work((view.patch_grid.area for view in plan.views), [plan.visual_tokens + text_tokens])


def batch_work(batch: Batch) -> Work:
    """The real work in a batch (NumPy): padding patches, empty slots and padding tokens left out."""
    patches = np.prod(batch.patch_grids, axis=-1, dtype=np.int64)
    lengths = [np.bincount(row, minlength=1)[1:] for row in batch.segments]
    return work(patches[patches > 0].tolist(), np.concatenate(lengths).tolist())


def bucket_work(bucket: Bucket) -> Work:
    """The work a full batch would hold: every slot a view of all its patches, every row one sample."""
    return work([bucket.patches] * bucket.rows * bucket.slots, [bucket.tokens] * bucket.rows)


@dataclasses.dataclass(frozen=True)
class Stretch:
    """A stretch of the forward pass, in data order, whose weights belong to one part."""

    part: str
    weight_macs: float  # products with weights
    attention_macs: float = 0.0  # products between activations


def forward_stretches(config: ModelConfig, work: Work, mode: str | None = None) -> list[Stretch]:
    """Multiply-accumulates of one forward pass, from the pixels to the logits of every token."""
    tower, width = config.tower, config.tower.width
    mode = mode or config.mode
    compressed = config.compressor.kind != "none" and mode == "16x"
    before = config.compressor.after_layer + 1 if compressed else tower.layers
    stretches = [
        Stretch("patch_embedding", work.patches * tower.patch_dim * width),
        _tower_layers(tower, before, work.patches, work.patch_pairs),
    ]
    tokens = work.patches
    if compressed:
        tokens //= 4
        stretches.append(_compressor(config.compressor, tower, work.patches))
        stretches.append(_tower_layers(tower, tower.layers - before, tokens, work.patch_pairs / 16))
    for round_number in range(config.connector.rounds):
        tokens //= 4
        last = round_number == config.connector.rounds - 1
        out = config.decoder.width if last else width
        stretches.append(Stretch("connector", tokens * 4 * width * (4 * width + out)))
    decoder = config.decoder
    per_token = decoder.layers * _decoder_layer_weights(decoder) + decoder.width * decoder.vocab_size
    pairs = 2 * decoder.heads * decoder.head_dim * work.token_pairs
    stretches.append(Stretch("decoder", work.tokens * per_token, decoder.layers * pairs))
    return stretches


def _tower_layers(tower: TowerConfig, layers: int, tokens: float, pairs: float) -> Stretch:
    width = tower.width
    return Stretch("tower", layers * tokens * _tower_layer_weights(tower), layers * 2 * width * pairs)


def _tower_layer_weights(tower: TowerConfig) -> int:
    return 4 * tower.width**2 + 2 * tower.width * tower.mlp_width


def _decoder_layer_weights(decoder: DecoderConfig) -> int:
    attention = 2 * decoder.head_dim * (decoder.heads + decoder.kv_heads)
    return decoder.width * (attention + 3 * decoder.mlp_width)


def _compressor(compressor: CompressorConfig, tower: TowerConfig, patches: int) -> Stretch:
    d, f, merged = tower.width, tower.mlp_width, patches // 4
    plain_mlp = merged * (16 * d * d + 4 * d * d)
    reused_mlp = merged * (16 * d * f + 4 * d * f)
    windows = Stretch("compressor", patches * 4 * d * d, 2 * d * 4 * patches)
    # One query per window, keys and values of all four tokens, then a layer's mlp on the merged token.
    cross = Stretch("compressor", merged * (2 * d * d + 2 * d * f) + patches * 2 * d * d, 2 * d * 4 * merged)
    return {
        "average_pool": Stretch("compressor", 0),
        "unshuffle_mlp": Stretch("compressor", plain_mlp),
        "reused_mlp": Stretch("compressor", reused_mlp),
        "cross_attention_top_left": cross,
        "cross_attention_mean": cross,
        "window_attention_mlp": dataclasses.replace(windows, weight_macs=windows.weight_macs + plain_mlp),
        "window_attention_reused_mlp": dataclasses.replace(windows, weight_macs=windows.weight_macs + reused_mlp),
    }[compressor.kind]


def forward_flops(config: ModelConfig, work: Work, mode: str | None = None) -> dict[str, float]:
    """FLOPs of one forward pass by part."""
    flops = dict.fromkeys(PARTS, 0.0)
    for stretch in forward_stretches(config, work, mode):
        flops[stretch.part] += 2.0 * (stretch.weight_macs + stretch.attention_macs)
    return flops


def train_flops(config: ModelConfig, work: Work, trainable: Sequence[str], mode: str | None = None) -> float:
    """FLOPs of forward and backward pass of a stage that trains the given parts.

    A stretch whose weights are trained costs three times its forward pass; a frozen one that a gradient must cross, on
    its way to a trained parameter nearer to the pixels, twice; a frozen one with nothing trained before it, once.
    """
    total, crossed = 0.0, False
    for stretch in forward_stretches(config, work, mode):
        trained = stretch.part in trainable
        # The pixels need no gradient; inside a stack of layers, all but the first do.
        to_input = crossed or (trained and stretch.part != "patch_embedding")
        total += 2.0 * stretch.weight_macs * (1 + trained + to_input)
        total += 2.0 * stretch.attention_macs * (3 if trained or crossed else 1)
        crossed = crossed or trained or (stretch.part == "patch_embedding" and "position_table" in trainable)
    return total


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Number of parameters by part."""
    tower, decoder, d = config.tower, config.decoder, config.tower.width
    norm = 2 * d
    attention_biases = (decoder.heads + 2 * decoder.kv_heads) * decoder.head_dim if decoder.qkv_bias else 0
    head_norms = 2 * decoder.head_dim if decoder.qk_norm else 0
    decoder_layer = _decoder_layer_weights(decoder) + 2 * decoder.width + attention_biases + head_norms
    tables = decoder.vocab_size * decoder.width * (1 if decoder.tied_head else 2)
    outs = [d] * (config.connector.rounds - 1) + [decoder.width]
    return dict.fromkeys(PARTS, 0) | {
        "tower": tower.layers * (_tower_layer_weights(tower) + 4 * d + tower.mlp_width + d + 2 * norm) + norm,
        "patch_embedding": (tower.patch_dim + 1) * d,
        "position_table": tower.table_side**2 * d,
        "compressor": _compressor_parameters(config.compressor, tower),
        "connector": sum(2 * 4 * d + (4 * d + 1) * 4 * d + (4 * d + 1) * out for out in outs),
        "decoder": decoder.layers * decoder_layer + tables + decoder.width,
    }


def _compressor_parameters(compressor: CompressorConfig, tower: TowerConfig) -> int:
    d, f = tower.width, tower.mlp_width
    attention = 4 * (d + 1) * d + 2 * d  # with its norm
    plain_mlp = 8 * d + (4 * d + 1) * 4 * d + (4 * d + 1) * d
    reused_mlp = 8 * d + (4 * d + 1) * 4 * f + (4 * f + 1) * d
    cross = attention + 2 * d + (d + 1) * f + (f + 1) * d
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


def state_bytes(config: ModelConfig, trainable: Sequence[str]) -> dict[str, int]:
    """Bytes of a training state over all devices: float32 parameters, gradients and two moments of the trained ones."""
    counts = parameter_counts(config)
    trained = sum(counts[part] for part in trainable)
    return {"parameters": 4 * sum(counts.values()), "gradients": 4 * trained, "moments": 8 * trained}


def paper_gflops(tower: TowerConfig, compressor: CompressorConfig, patches: int) -> float:
    """Tower GFLOPs of one view in the paper's convention (Tables 4, 5 and A3 with 4900 patches).

    One multiply-accumulate is one FLOP; LayerNorms count 5, GELU 1 and residuals 1 per element, the softmax with its
    scale 4 per pair and head; the 2x2 window attention is billed as global attention; the connector is left out.
    """
    d, f, heads, n = tower.width, tower.mlp_width, tower.heads, patches
    merged = n / 4
    projections = 4 * d * d

    def core(tokens):
        return (2 * d + 4 * heads) * tokens**2

    def layer(tokens):
        return tokens * (projections + 2 * d * f) + core(tokens) + tokens * (10 * d + f + 2 * d)

    embed = n * tower.patch_dim * d
    if compressor.kind == "none":
        return (tower.layers * layer(n) + embed + 5 * d * n) / 1e9
    norm_joined = 5 * 4 * d
    plain_mlp = merged * (20 * d * d + norm_joined + 4 * d)
    reused_mlp = merged * (20 * d * f + norm_joined + 4 * f + d)
    windows = n * (projections + 5 * d + d) + core(n)
    cross = n * (3 * d * d + 5 * d) + merged * (d * d + 2 * d * f + 5 * d + f + 2 * d)
    extra = {
        "average_pool": 0,
        "unshuffle_mlp": plain_mlp,
        "reused_mlp": reused_mlp,
        "cross_attention_top_left": cross,
        "cross_attention_mean": cross,
        "window_attention_mlp": windows + plain_mlp,
        "window_attention_reused_mlp": windows + reused_mlp,
    }[compressor.kind]
    before = compressor.after_layer + 1
    return (before * layer(n) + (tower.layers - before) * layer(merged) + embed + 5 * d * merged + extra) / 1e9


def peak_flops(devices: Sequence[Any], override: float = 0.0) -> float:
    """FLOP/s that `devices` could reach together.

    Args:
      devices: of a mesh.
      override: per device; 0 to look it up in `PEAK_FLOPS` by device kind. A kind that is not there (a CPU) is
        measured: the rate of a float32 matrix product on one device. Host devices of one process share its cores, so
        they count as one.
    """
    if override:
        return override * len(devices)
    kind = devices[0].device_kind
    for pattern, peak in PEAK_FLOPS:
        if re.fullmatch(pattern, kind):
            return peak * len(devices)
    count = len({device.process_index for device in devices}) if devices[0].platform == "cpu" else len(devices)
    return measured_matmul_flops(jax.local_devices(backend=devices[0].platform)[0]) * count


@functools.cache
def measured_matmul_flops(device: Any, size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of the fastest of a few [size, size] float32 products on one device."""
    matrix = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
