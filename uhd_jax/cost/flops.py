"""FLOPs of a forward pass and of training, by part: analytic, from the config and the work alone.

Training costs the forward pass, one more of each product for its input's gradient where one is needed, and one more for
its weight's gradient where the weight is trained; recomputation (remat) does not count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from uhd_jax.config import PARTS, ModelConfig
from uhd_jax.cost.connectors import connector_stretches
from uhd_jax.cost.decoder import decoder_stretches
from uhd_jax.cost.stretches import DEFAULT, Convention, Stretch
from uhd_jax.cost.tower import tower_stretches
from uhd_jax.cost.work import Work

# The three that are told apart beside the parts of training.
GROUPS = {
    "tower": ("tower", "patch_embedding", "position_table", "compressor"),
    "connector": ("connector", "connector_positions", "upsampler", "upsampler_fixup"),
    "decoder": ("decoder",),
}


def forward_stretches(
    config: ModelConfig, work: Work, mode: str | None = None, convention: Convention = DEFAULT
) -> list[Stretch]:
    """Multiply-accumulates of one forward pass, from the pixels to the logits of every token, in data order.

    Of the convention, how many FLOPs a multiply-accumulate has does not matter here, and `causal` only to gated delta
    layers: the pairs of tokens in full attention are those of `work`.

    Raises:
      ConfigError: a kind of tower or connector that is not known here.
    """
    compress = config.compressor.kind != "none" and (mode or config.mode) == "16x"
    upstream = GROUPS["tower"]
    cells = work.patches / 4 if compress else work.patches
    return [
        *tower_stretches(config, work, compress, all_layers=convention.published),
        *connector_stretches(config, work, cells, upstream, published=convention.published),
        *decoder_stretches(config.decoder, work, convention.causal),
    ]


def forward_flops(
    config: ModelConfig, work: Work, mode: str | None = None, convention: Convention = DEFAULT
) -> dict[str, float]:
    """FLOPs of one forward pass by part. Raises as `forward_stretches`."""
    flops = dict.fromkeys(PARTS, 0.0)
    for stretch in forward_stretches(config, _counted(work, convention), mode, convention):
        flops[stretch.part] += convention.flops_per_mac * (stretch.weight_macs + stretch.pair_macs)
    return flops


def groups(flops: Mapping[str, float]) -> dict[str, float]:
    """FLOPs by part added up to tower, connector and decoder."""
    return {group: sum(flops[part] for part in parts) for group, parts in GROUPS.items()}


def overhead_flops(config: ModelConfig, work: Work, mode: str | None = None, convention: Convention = DEFAULT) -> float:
    """FLOPs that the forward pass executes and that never count: resizing and pooling written as dense products.

    The zeros in the patch embedding's kernel (`models.patches`), a third more of that one product, are left out.

    Raises as `forward_stretches`.
    """
    stretches = forward_stretches(config, work, mode, convention)
    return convention.flops_per_mac * sum(stretch.overhead_macs for stretch in stretches)


def train_flops(
    config: ModelConfig,
    work: Work,
    trainable: Sequence[str],
    mode: str | None = None,
    convention: Convention = DEFAULT,
) -> float:
    """FLOPs of forward and backward pass of a stage that trains the given parts.

    A product with trained weights costs three times its forward pass, or twice where it is the first that depends on
    something trained; one with frozen weights that a gradient must cross, on its way to a trained parameter nearer to
    the pixels, twice; a frozen one with nothing trained before it, once. Raises as `forward_stretches`.
    """
    stretches = forward_stretches(config, _counted(work, convention), mode, convention)
    return convention.flops_per_mac * sum(stretch.training_macs(trainable) for stretch in stretches)


def _counted(work: Work, convention: Convention) -> Work:
    """The work with the pairs of tokens that the convention counts."""
    if convention.causal:
        return work
    return dataclasses.replace(work, token_pairs=2 * work.token_pairs - work.tokens)
