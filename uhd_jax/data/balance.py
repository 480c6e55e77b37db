"""The order of a batch's rows, such that devices that share them have about the same number of patches.

Packing fills tokens and slots, but rows of text or small views lie beside rows of large ones. Which device gets which
rows follows from their order alone, so ordering them is enough. The order must not depend on how many devices or hosts
there are: it is balanced for halves, and inside each half for quarters, and so on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from uhd_jax.data.chat import Needs


def patches_of(row: Iterable[Needs]) -> int:
    """Patches of a row, as if all views of a sample were as large as its largest."""
    return sum(needs.views * needs.patches for needs in row)


def balanced_order(weights: Sequence[int]) -> list[int]:
    """Indices in an order whose equal contiguous parts have about the same sum of weights.

    Balanced for the smallest prime factor of the number of weights as the number of parts, and inside each part again:
    for 24 weights that is 2, 4, 8 and 24 parts. The heaviest come first to the part that is lightest so far.
    """
    return _ordered(weights, list(range(len(weights))))


def _ordered(weights, members):
    count = len(members)
    if count < 2:
        return members
    parts = next(number for number in range(2, count + 1) if count % number == 0)
    groups: list[list[int]] = [[] for _ in range(parts)]
    sums = [0] * parts
    for member in sorted(members, key=lambda index: (-weights[index], index)):
        group = min((g for g in range(parts) if len(groups[g]) < count // parts), key=lambda g: (sums[g], g))
        groups[group].append(member)
        sums[group] += weights[member]
    return [index for group in groups for index in _ordered(weights, group)]


def imbalance(weights: Sequence[int], parts: int) -> float:
    """Largest sum of `parts` equal contiguous parts over their mean, less one: 0.25 is a quarter more than fair.

    What it says of a device holds for all: they wait for the one with the most work. 0 where there is no weight at all.
    Of fewer weights than parts, each is a part and the others are empty.
    """
    share = -(-len(weights) // parts)
    sums = [sum(weights[start : start + share]) for start in range(0, parts * share, share)]
    return max(sums) * parts / sum(sums) - 1 if sum(sums) else 0.0
