"""Multiply-accumulates of the connectors and of the pyramid below them.

Dimension letters: C tower width, D decoder width, Q queries of a view.
"""

from __future__ import annotations

from uhd_jax.config import ConfigError, ModelConfig, TowerConfig
from uhd_jax.cost.stretches import Stretch
from uhd_jax.cost.work import Work
from uhd_jax.ops.roi_align import MAX_BINS

KEY_WIDTH, NEIGHBOURS = 32, 49  # of VDIM, whose kernel is 7x7 (spec v1-v2 section 3.3)
FIXED_BINS, PYRAMID_BINS = 9, (4, 9, 12, 12)  # of a window in hiwin's ablations, by level


def connector_stretches(
    config: ModelConfig, work: Work, cells: float, upstream: tuple[str, ...], published: bool
) -> list[Stretch]:
    """From the features to the visual tokens, in data order.

    Args:
      config: the model.
      work: of the views.
      cells: of all views' features.
      upstream: parts before the connector.
      published: as the papers define them; learned queries, the same for all views, are then projected for each of
        them, and hiwin's features before they are pooled.

    Raises:
      ConfigError: a kind that is not known here.
    """
    connector, c, d = config.connector, config.tower.width, config.decoder.width
    if connector.kind == "merging_mlp":
        stretches, own = [], (*upstream, "connector")
        for number in range(connector.rounds):
            cells /= 4
            out = d if number == connector.rounds - 1 else c
            stretches.append(Stretch("connector", cells * 4 * c * (4 * c + out), upstream=own))
        return stretches
    if connector.kind == "mlp":
        return _mlp(cells, c, d, upstream)

    stretches = _pyramid(config, cells, upstream)
    levels, queries = connector.pyramid.levels, connector.queries
    maps = {level: 4**level * cells for level in levels}
    # Level 0 is the tower's; what stands behind the last level changes that one alone.
    below = {level: (*upstream, "upsampler") if level else upstream for level in levels}
    below[max(levels)] += ("upsampler_fixup",)
    upstream = below[max(levels)]
    if connector.kind == "bilinear_mlp":
        reduced = Stretch("connector", overhead_macs=queries * sum(maps.values()) * c)
        return [*stretches, reduced, *_mlp(work.views * queries, len(levels) * c, d, upstream)]
    if connector.kind == "perceiver":
        total = sum(maps.values())
        stretches += [
            Stretch("connector", cells * c * d, overhead_macs=cells * queries * d, upstream=below[level])
            for level, cells in maps.items()
        ]
        return stretches + _attention(config, work, total, queries * total, 1, upstream, published)
    if connector.kind not in ("spatial_resampler", "hiwin"):
        raise ConfigError(f"connector.kind: the cost of a connector of kind {connector.kind!r} is not known")
    for level, total in maps.items():
        stretches += _pooled(config, work, level, total, below[level], published)
    bins = sum(_bins(config, work, level) for level in levels)
    sets = connector.query_sets if connector.kind == "hiwin" else 1
    padding = queries * (MAX_BINS * work.views * len(levels) - bins)
    stretches.append(Stretch("connector", overhead_macs=padding * d * (2 * d + 2 * sets)))
    return stretches + _attention(config, work, queries * bins, sets * queries * bins, sets, upstream, published)


def _pooled(
    config: ModelConfig, work: Work, level: int, total: float, upstream: tuple[str, ...], published: bool
) -> list[Stretch]:
    """A level's features made as wide as the decoder and pooled to the bins of windows, and the positions with them.

    Hiwin as implemented pools first; its norm then needs the variance of the wide features, a quadratic form of the
    narrow ones (`models.hiwin.pool_projected`).
    """
    c, d, queries = config.tower.width, config.decoder.width, config.connector.queries
    room = queries * MAX_BINS
    positions = Stretch("connector", overhead_macs=room * work.views * queries * d)
    if config.connector.kind == "spatial_resampler" or published:
        return [Stretch("connector", total * c * d, overhead_macs=room * total * d, upstream=upstream), positions]
    pooled = queries * _bins(config, work, level)
    wide = (c + 2) * d  # the biases of the projection and of the norm are rows
    form = (c + 1) ** 2
    return [
        Stretch("connector", pair_macs=form * d * min(work.views, 1), upstream=("connector",)),
        Stretch("connector", total * form, overhead_macs=room * total * (c + 2), upstream=upstream),
        Stretch(
            "connector",
            pooled * wide,
            overhead_macs=(room * work.views - pooled) * wide,
            upstream=(*upstream, "connector"),
        ),
        positions,
    ]


def _mlp(tokens: float, features: int, width: int, upstream: tuple[str, ...]) -> list[Stretch]:
    return [
        Stretch("connector", tokens * features * width, upstream=upstream),
        Stretch("connector", tokens * width**2, upstream=(*upstream, "connector")),
    ]


def _attention(
    config: ModelConfig, work: Work, keys: float, pairs: float, sets: int, upstream: tuple[str, ...], published: bool
) -> list[Stretch]:
    """Cross-attention of `sets` sets of queries to so many keys, what joins the sets, and the output projection."""
    square, queries = config.decoder.width**2, config.connector.queries
    placed = ("connector", "connector_positions")
    values, keys_upstream = (*upstream, "connector"), (*upstream, *placed)  # values have no positions
    found = work.views * sets * queries
    joined = found if sets > 1 else 0
    projected = work.views if published else min(work.views, 1)
    pair_macs = config.decoder.width * pairs
    return [
        Stretch("connector", keys * square, upstream=values),
        Stretch("connector", keys * square, upstream=keys_upstream),
        Stretch("connector", projected * sets * queries * square, upstream=placed),
        Stretch("connector", pair_macs=pair_macs, upstream=keys_upstream, other=placed),
        Stretch("connector", pair_macs=pair_macs, upstream=keys_upstream, other=values),
        Stretch("connector", (found + joined + work.views * queries) * square, upstream=keys_upstream),
    ]


def _bins(config: ModelConfig, work: Work, level: int) -> int:
    """Bins of a window on a level, summed over views."""
    if config.connector.kind == "spatial_resampler" or config.connector.bins == "selective":
        return work.bins
    return work.views * (FIXED_BINS if config.connector.bins == "fixed" else PYRAMID_BINS[level])


def _pyramid(config: ModelConfig, cells: float, upstream: tuple[str, ...]) -> list[Stretch]:
    """The levels above 0; all up to the highest are made, but bilinear ones each for itself."""
    pyramid, c = config.connector.pyramid, config.tower.width
    stretches = []
    for level in range(1, max(pyramid.levels) + 1):
        made = 4**level * cells
        below = upstream if level == 1 else (*upstream, "upsampler")
        if pyramid.upsampling == "bilinear":
            if level in pyramid.levels:
                stretches.append(Stretch("upsampler", overhead_macs=9 * made * c))
        elif pyramid.upsampling == "deconvolution":
            stretches.append(Stretch("upsampler", made * c * c, upstream=below))
        else:
            stretches += _vdim(level, made, config.tower, below)
    if pyramid.upsampling == "vdim" and max(pyramid.levels) > 0:
        stretches.append(Stretch("upsampler_fixup", made * c * c, upstream=(*upstream, "upsampler")))
    return stretches


def _vdim(level: int, made: float, tower: TowerConfig, below: tuple[str, ...]) -> list[Stretch]:
    """The weights of a cell's neighbours from the image, and their sum.

    Executed as products per patch: what all cells of a patch need is one square window, and the kernel is carried over
    to the map of the level below (`models.pyramid.Vdim`).
    """
    c, patch, side = tower.width, tower.patch_size, 2**level
    window, below_side = (side + 6) ** 2, side // 2 + 6
    pooled = made / side**2 * 3 * side * patch * (patch + side)  # the image, to one value per cell and colour
    carried = made * (NEIGHBOURS * below_side + 7 * below_side**2)
    kernel = KEY_WIDTH**2 + (NEIGHBOURS + 3) * NEIGHBOURS + NEIGHBOURS**2
    return [
        Stretch("upsampler", made * 3 * KEY_WIDTH, overhead_macs=pooled),
        Stretch(
            "upsampler",
            made * kernel,
            made * NEIGHBOURS * KEY_WIDTH,
            overhead_macs=made * (window - NEIGHBOURS) * KEY_WIDTH + carried,
            upstream=("upsampler",),
        ),
        Stretch(
            "upsampler", made * NEIGHBOURS * c, overhead_macs=made * (below_side**2 - NEIGHBOURS) * c, upstream=below
        ),
    ]
