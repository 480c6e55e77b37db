"""The published FLOPs of the family, each in the convention of its paper, and what is published to compare with.

v1 (arXiv 2403.11703 version 1) and v4 (2605.08985) are reproduced. v2's column (2412.13871 Table 1) is not: no single
rule gives its numbers for all three language models (spec v1-v2 section 7.3), so it only stands beside ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from uhd_jax.config import CompressorConfig, ConfigError, ModelConfig, TowerConfig
from uhd_jax.cost.flops import forward_flops, groups
from uhd_jax.cost.stretches import Convention
from uhd_jax.cost.work import work
from uhd_jax.slicing.plan import Grid

V1 = Convention(causal=False, published=True)
V4 = (
    "1 FLOP per multiply-accumulate, and 5 per element of a norm, 1 of a GELU or a residual, 4 per pair and head of a "
    "softmax; the tower alone; window attention billed as attention among all patches of a view (LLaVA-UHD v4's paper)"
)


class Published(NamedTuple):
    """A figure of a paper, for the configuration and views that it stands for."""

    system: str
    gflops: float
    counted: str  # "tower", or "total"
    source: str
    note: str = ""


_V1, _V2 = "arXiv 2403.11703v1, ablation table", "arXiv 2412.13871, Table 1"
_CAUSAL = "fits attention counted half, as the other figures of its table do not"
_CAVEAT = "informative only: no single rule gives this column for all three language models"
_VIEW, _SLICED, _FIXED = 576, 6 * 576 + 551, 5 * 551  # 336x336; 672x1008 with its thumbnail, and as 2x2
# (connector, queries of a view, patches of all views, decoder's width and layers) -> figures, in TFLOPs.
_TOTALS: dict[tuple[str, int, int, tuple[int, int]], tuple[tuple[str, float, str, str], ...]] = {
    ("mlp", 0, _VIEW, (5120, 40)): (("LLaVA-1.5 13B", 15.50, _V1, ""), ("LLaVA-1.5 13B", 15.1, _V2, _CAVEAT)),
    ("mlp", 0, _VIEW, (4096, 32)): (("LLaVA-1.5 7B", 8.0, _V2, _CAVEAT),),
    ("mlp", 0, _VIEW, (3584, 28)): (("LLaVA-1.5 Qwen2-7B", 8.2, _V2, _CAVEAT),),
    ("perceiver", 64, _SLICED, (5120, 40)): (("LLaVA-UHD 13B", 14.63, _V1, ""),),
    ("mlp", 0, _SLICED, (5120, 40)): (("LLaVA-UHD 13B with MLP", 113.65, _V1, _CAUSAL),),
    ("mlp", 0, _FIXED, (5120, 40)): (("LLaVA-UHD 13B with MLP and fixed 2x2", 80.10, _V1, _CAUSAL),),
    ("hiwin", 144, _SLICED, (4096, 32)): (("LLaVA-UHD v2 7B", 17.5, _V2, _CAVEAT),),
    ("hiwin", 144, _SLICED, (5120, 40)): (("LLaVA-UHD v2 13B", 26.4, _V2, _CAVEAT),),
    ("hiwin", 144, _SLICED, (3584, 28)): (("LLaVA-UHD v2 Qwen2-7B", 14.3, _V2, _CAVEAT),),
}
_V4_VIEW = 4900  # patches
_V4_TOWERS = {  # (compressor, its after_layer) -> GFLOPs
    ("none", 0): 3555.1,
    ("average_pool", 6): 1368.7,
    ("unshuffle_mlp", 6): 1401.2,
    ("reused_mlp", 6): 1490.2,
    ("cross_attention_top_left", 6): 1402.0,
    ("cross_attention_mean", 6): 1402.0,
    ("window_attention_mlp", 6): 1484.1,
    ("window_attention_reused_mlp", 6): 1573.1,
    ("window_attention_reused_mlp", 3): 1245.1,
    ("window_attention_reused_mlp", 9): 1901.1,
    ("window_attention_reused_mlp", 15): 2557.0,
}


def published(config: ModelConfig, grids: Sequence[Grid], mode: str | None = None) -> list[Published]:
    """The papers' figures for a configuration and views of such patch grids; mostly there are none."""
    compressor = _running(config, mode)
    if config.tower == TowerConfig() and [grid.area for grid in grids] == [_V4_VIEW]:
        key = (compressor.kind, compressor.after_layer if compressor.kind != "none" else 0)
        source = "arXiv 2605.08985, Tables 4, 5 and A3"
        return [Published("LLaVA-UHD v4", _V4_TOWERS[key], "tower", source)] if key in _V4_TOWERS else []
    patches = sum(grid.area for grid in grids)
    key = (config.connector.kind, config.connector.queries, patches, (config.decoder.width, config.decoder.layers))
    figures = _TOTALS.get(key, ()) if config.tower.kind == "clip" else ()
    return [Published(system, 1e3 * tflops, "total", source, note) for system, tflops, source, note in figures]


def paper_groups(
    config: ModelConfig, grids: Sequence[Grid], tokens: int, mode: str | None = None
) -> tuple[dict[str, float | None], str]:
    """FLOPs of tower, connector and decoder in the convention of the paper that the model's tower belongs to.

    Args:
      config: the model; a SigLIP 2 tower is counted as in v4's paper, a CLIP tower as in v1's.
      grids: patch grids of the views.
      tokens: of the sample; the papers have no text in it.
      mode: "16x" or "4x"; None for the config's.

    Returns:
      FLOPs, None for what the paper leaves out; and the convention in words.

    Raises:
      ConfigError: a tower for which no paper of the family has FLOPs.
    """
    if config.tower.kind == "siglip2":
        compressor = _running(config, mode)
        gflops = sum(paper_gflops(config.tower, compressor, grid.area) for grid in grids)
        return {"tower": 1e9 * gflops, "connector": None, "decoder": None}, V4
    if config.tower.kind == "clip":
        return groups(forward_flops(config, work(grids, [tokens]), mode, V1)), str(V1)
    raise ConfigError(
        f"tower.kind: no paper of the family has FLOPs of a {config.tower.kind!r} tower; count without its convention"
    )


def _running(config: ModelConfig, mode: str | None) -> CompressorConfig:
    return config.compressor if (mode or config.mode) == "16x" else CompressorConfig("none")


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
