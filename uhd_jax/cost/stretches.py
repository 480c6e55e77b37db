"""What the other files of this folder share: conventions of counting, and pieces of the forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Convention:
    """How multiply-accumulates become FLOPs. Only products count: with weights, in attention, and VDIM's sums."""

    flops_per_mac: int = 2
    causal: bool = True  # the decoder's attention counts the pairs that its mask leaves; False: all pairs of a sample
    published: bool = False  # the models as published: see `__str__`

    def __str__(self) -> str:
        flops = "1 FLOP" if self.flops_per_mac == 1 else f"{self.flops_per_mac} FLOPs"
        pairs = "the causal pairs of a sample (half)" if self.causal else "all pairs of a sample (full)"
        text = (
            f"{flops} per multiply-accumulate of products with weights, in attention and in VDIM's sums over "
            f"neighbours; the decoder's attention counts {pairs}, its head every token; no padding, norms, "
            "activations, resizing or pooling, and in training no recomputation"
        )
        if self.published:
            text += (
                "; as v1's paper, a CLIP tower counts all its layers, learned queries are projected for each view, and "
                "features before they are pooled"
            )
        return text


DEFAULT = Convention()


@dataclasses.dataclass(frozen=True)
class Stretch:
    """A piece of the forward pass whose weights belong to one part, in multiply-accumulates."""

    part: str
    weight_macs: float = 0.0  # products of an activation with weights (or with weights made from the image, as VDIM's)
    pair_macs: float = 0.0  # products of two activations: attention
    # Executed and never counted: resizing and pooling as dense products, and what stands in padded RoI bins.
    overhead_macs: float = 0.0
    upstream: tuple[str, ...] = ()  # parts that its input depends on: a gradient must pass where one of them is trained
    other: tuple[str, ...] | None = None  # the same of the other activation of `pair_macs`, where it differs

    def training_macs(self, trainable: Sequence[str]) -> float:
        """With the backward pass of a stage that trains these parts.

        One more product for the gradient of an input that depends on something trained, and for that of a trained
        weight.
        """
        needed = [any(part in trainable for part in parts) for parts in (self.upstream, self.other or self.upstream)]
        return self.weight_macs * (1 + (self.part in trainable) + needed[0]) + self.pair_macs * (1 + sum(needed))
