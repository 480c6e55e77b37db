"""Pre-training of VDIM: the levels of the pyramid, taken down again, shall be the tower's features (v2 Eq. 2 and 9).

Each level is enlarged to the size of the image, and a *down-sampler* takes a weighted sum of the 14x14 pixels under a
patch, its weights a softmax over what a linear layer sees there. The loss comes in two forms (spec v1-v2 section 3.4):

- "paper": half the squared error, summed over the levels. Mean over channels and patches instead of the paper's bare
  norm; for views of any patch grid.
- "released": the published code's. Features and image are shifted, zoomed and flipped alike; errors are compared in a
  random projection and weighted by a learned uncertainty; the down-sampler blurs first, and in one patch of five does
  without its layer; a term like that of a conditional random field draws similar pixels together; level 2 sends no
  gradient to level 1. For views that fill a square.

Everything on the way from a level to the loss is linear but for the softmax, so no level is ever enlarged with all its
channels: logits are enlarged instead of what they are made from, and the weights are carried back to the small map.

The down-samplers and uncertainties, the *scaffold*, are trained beside the pyramid and are no part of the model. Of the
pyramid, whole channels are dropped at random in both forms.
Dimension letters: V views, P patches per view, C tower width, S pixels per side of a view, G patches per side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uhd_jax import cost
from uhd_jax.batch import Batch
from uhd_jax.config import ConfigError, ModelConfig, ReconstructionConfig
from uhd_jax.models import uhd
from uhd_jax.models.layers import torch_linear_init
from uhd_jax.models.patches import normalise_patches
from uhd_jax.models.pyramid import Pyramid
from uhd_jax.ops import neighbourhood as nb
from uhd_jax.ops.image_axes import bilinear_axis, blur_axis, jitter_axis
from uhd_jax.sharding.gathering import whole
from uhd_jax.sharding.views import fold_views, on_every_chip

KEPT = 0.8  # of the patches whose logits come from the down-sampler's layer; and of the channels that this layer sees
SCALE_START, SCALE_SHIFT, SCALE_FLOOR = 0.1, 0.1, 1e-4
CRF_COLOUR, CRF_NEAR = (10.0, 0.1, 0.15), (3.0, 0.005)  # weight, variance of positions, and of colours

HIGHEST = jax.lax.Precision.HIGHEST

Encode = Callable[[jax.Array], jax.Array]  # float32[V, P, patch_dim] normalised -> float[V, P, C]


def loss_sums(
    params: dict[str, Any], batch: Batch, key: jax.Array, config: ModelConfig, reconstruction: ReconstructionConfig
) -> tuple[jax.Array, jax.Array]:
    """Sum of the losses of a batch's views and sum of their weights, float32[] each; texts are ignored.

    The tower must be frozen: no gradient goes through it.

    Args:
      params: the model's parameters, and the scaffold as "scaffold".
      batch: views; in the released form of one square shape, see `check_views`.
      key: for everything left to chance.
      config: the model; its connector has a pyramid.
      reconstruction: form of the loss, and its numbers.
    """
    grids = fold_views(batch.patch_grids)
    patches = normalise_patches(fold_views(batch.patches), config.tower)
    dtype = jnp.dtype(config.dtype)

    def run_tower(params, gather, patches, grids):
        module = uhd.tower(config, gather)
        return module.apply({"params": params["tower"]}, patches, grids, levels=0, compress=False)[0]

    def encode(patches):
        return jax.lax.stop_gradient(on_every_chip(run_tower, dtype, {"tower": params["tower"]}, patches, grids))

    released = reconstruction.form == "released"
    keys = jax.random.split(key, 1 + reconstruction.jitters)
    cells = Pyramid(config.connector.pyramid, dtype).apply(
        {"params": whole(params["connector"]["upsampler"], "connector/upsampler/")},
        encode(patches),
        grids,
        patches,
        method="cells",
        dropout=True,
        detach=released,
        rngs={"dropout": keys[0]},
    )
    if not released:
        return paper_loss(params["scaffold"], cells, grids)
    grid = math.isqrt(patches.shape[1])
    shape = (len(patches), config.tower.width, grid, grid * config.tower.patch_size, len(cells) - 1)
    jitters = [draw_jitter(key, reconstruction, *shape) for key in keys[1:]]
    terms = released_terms(params["scaffold"], cells, patches, encode, jitters, reconstruction.pad)
    return released_loss(terms, grids, reconstruction.crf_weight)


def step_flops(config: ModelConfig, work: cost.Work, reconstruction: ReconstructionConfig) -> float:
    """FLOPs of a step: the tower's forward pass, again for every jitter, and three times the pyramid's.

    The scaffold's are left out, as small as they are; so is the language model, which does not run.
    """
    passes = 1 + (reconstruction.jitters if reconstruction.form == "released" else 0)
    total = 0.0
    for stretch in cost.forward_stretches(config, work):
        times = {"tower": passes, "patch_embedding": passes, "upsampler": 3, "upsampler_fixup": 3}.get(stretch.part, 0)
        total += 2.0 * times * (stretch.weight_macs + stretch.pair_macs)
    return total


def check_views(batch: Batch, reconstruction: ReconstructionConfig) -> None:
    """Refuses views for which the released form is not defined.

    Raises:
      ConfigError: one does not fill its slot as a square.
    """
    if reconstruction.form != "released":
        return
    room = batch.patches.shape[2]
    grids = batch.patch_grids.reshape(-1, 2)
    for rows, cols in grids[grids[:, 0] > 0]:
        if rows != cols or rows * cols != room:
            raise ConfigError(
                f"reconstruction.form: 'released' needs square views that fill their slots of {room} patches, but one "
                f"has {rows}x{cols}; give the source 'images' a crop of the view's side, or use form 'paper'"
            )


def init_scaffold(config: ModelConfig, form: str, key: jax.Array) -> dict[str, Any]:
    """Random parameters of the down-sampler, and of the uncertainty in the released form, of every level above 0."""
    side, width = config.tower.patch_size, config.tower.width
    scaffold = {}
    for level in range(1, max(config.connector.pyramid.levels) + 1):
        keys = jax.random.split(jax.random.fold_in(key, level), 6)
        scaffold[f"level_{level}"] = {
            "attention": _linear(keys[0], keys[1], width),
            "weight": 1 + 0.01 * jax.random.normal(keys[2], (side, side)),
            "bias": 0.01 * jax.random.normal(keys[3], (side, side)),
        }
        if form == "released":
            scale = jax.tree.map(lambda leaf: SCALE_START * leaf, _linear(keys[4], keys[5], width))
            scaffold[f"level_{level}"]["scale"] = scale
    return scaffold


def _linear(kernel: jax.Array, bias: jax.Array, width: int) -> dict[str, jax.Array]:
    """torch's start of a layer with one output."""
    bound = width**-0.5
    return {
        "kernel": torch_linear_init(kernel, (width, 1), jnp.float32),
        "bias": jax.random.uniform(bias, (1,), jnp.float32, -bound, bound),
    }


def _apply(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """float[..., C] -> float32[...]."""
    return jnp.matmul(x.astype(jnp.float32), layer["kernel"], precision=HIGHEST)[..., 0] + layer["bias"]


def down_sample(scaffold: dict[str, Any], cells: jax.Array, grids: jax.Array, level: int) -> jax.Array:
    """A level taken down to the patches, without blur and chance; for any patch grid.

    Args:
      scaffold: of the level.
      cells: float[V, 4**level * P, C] in patch order.
      grids: int32[V, 2] patch rows and columns.
      level: its number.

    Returns:
      float[V, P, C].
    """
    side, window = scaffold["weight"].shape[0], 2**level + 2
    position = (np.arange(side) + 0.5) * 2**level / side + 0.5  # of a pixel; the window's first cell is at 0
    line = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(window))).astype(np.float32)
    numbers = nb.window_cells(grids, cells.shape[1] // 4**level, level, 1)
    views, patches, _ = numbers.shape
    seen = _apply(scaffold["attention"], cells)[..., None]
    seen = nb.take_cells(seen, numbers.reshape(views, -1)).reshape(views, patches, window, window)
    logits = jnp.einsum("vpij,yi,xj->vpyx", seen, line, line, precision=HIGHEST)
    weights = _softmax(logits * scaffold["weight"] + scaffold["bias"])
    weights = jnp.einsum("vpyx,yi,xj->vpij", weights, line, line, precision=HIGHEST)
    return nb.combine_windows(cells, numbers, weights.reshape(views, patches, 1, -1))[:, :, 0]


def _softmax(logits: jax.Array) -> jax.Array:
    """Over the last two axes."""
    return jax.nn.softmax(logits, axis=(-2, -1))


def paper_loss(scaffold: dict[str, Any], cells: Sequence[jax.Array], grids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The paper's loss.

    Args:
      scaffold: of all levels.
      cells: the levels from 0 on, float[V, 4**l * P, C] in patch order.
      grids: int32[V, 2] patch rows and columns; (0, 0) for an empty slot.

    Returns:
      float32[]: the sum over patches of the loss, and the number of patches.
    """
    patches = cells[0].shape[1]
    own = jnp.arange(patches) < (grids[:, 0] * grids[:, 1])[:, None]
    target = jax.lax.stop_gradient(cells[0].astype(jnp.float32))
    total = jnp.zeros(())
    for level in range(1, len(cells)):
        error = down_sample(scaffold[f"level_{level}"], cells[level], grids, level).astype(jnp.float32) - target
        total += 0.5 * jnp.sum(jnp.where(own, jnp.mean(jnp.square(error), axis=-1), 0))
    return total, jnp.sum(own).astype(jnp.float32)


class LevelDraws(NamedTuple):
    """What the released form leaves to chance in one level of one jitter."""

    kept: Any  # bool[V, G, G]: patches whose logits come from the layer
    channels: Any  # float32[V, C]: dropout of what the layer sees, 0 or 1 / KEPT
    pixel_rows: Any  # int32[N] of the pixels compared with each other
    pixel_cols: Any  # int32[N]


class JitterDraws(NamedTuple):
    """What the released form leaves to chance in one jitter."""

    row: Any  # int32[]: first row cut out of the padded and enlarged image
    col: Any  # int32[]
    zoom: Any  # float32[]
    flip: Any  # bool[]: left for right
    projection: Any  # float32[V, C, K]: Gaussian, not normalised
    levels: tuple[LevelDraws, ...]  # of the levels from 1 on


def draw_jitter(
    key: jax.Array, config: ReconstructionConfig, views: int, width: int, grid: int, size: int, levels: int
) -> JitterDraws:
    """Draws a jitter.

    The released code drops single values of every pixel before the layer of the down-sampler. Here whole channels of a
    view are dropped there, as everywhere else in VDIM: what the layer sees then stays linear in the level's cells.
    """
    keys = iter(jax.random.split(key, 6 + 4 * levels))
    zoomed = jax.random.bernoulli(next(keys))
    zoom = jnp.where(zoomed, jax.random.uniform(next(keys), minval=1.0, maxval=config.zoom), 1.0)
    room = jnp.floor((size + 2 * config.pad) * zoom).astype(jnp.int32) - size + 1
    return JitterDraws(
        row=jax.random.randint(next(keys), (), 0, room),
        col=jax.random.randint(next(keys), (), 0, room),
        zoom=zoom,
        flip=jax.random.bernoulli(next(keys)),
        projection=jax.random.normal(next(keys), (views, width, config.projections)),
        levels=tuple(
            LevelDraws(
                kept=jax.random.bernoulli(next(keys), KEPT, (views, grid, grid)),
                channels=jax.random.bernoulli(next(keys), KEPT, (views, width)) / KEPT,
                pixel_rows=jax.random.randint(next(keys), (config.crf_pixels,), 0, size),
                pixel_cols=jax.random.randint(next(keys), (config.crf_pixels,), 0, size),
            )
            for _ in range(levels)
        ),
    )


def released_terms(
    scaffold: dict[str, Any],
    cells: Sequence[jax.Array],
    patches: jax.Array,
    encode: Encode,
    jitters: Sequence[JitterDraws],
    pad: int,
) -> dict[str, jax.Array]:
    """The terms of the released loss; it is the sum of the "reconstruction" ones and `crf_weight` times the others.

    Args:
      scaffold: of all levels.
      cells: the levels from 0 on, float[V, 4**l * P, C] in patch order, of views of G x G = P patches.
      patches: float32[V, P, patch_dim] normalised pixels.
      encode: the tower.
      jitters: at least one.
      pad: pixels of the jitter's padding.

    Returns:
      float32[V] each: "reconstruction_l" and "crf_l" for l from 1 on.
    """
    views, count, _ = patches.shape
    grid, side = round(count**0.5), scaffold["level_1"]["weight"].shape[0]
    size = grid * side
    image = patches.astype(jnp.float32).reshape(views, grid, grid, 3, side, side).transpose(0, 1, 4, 2, 5, 3)
    image = image.reshape(views, size, size, 3)
    blur = blur_axis(size)
    terms: dict[str, jax.Array] = {}
    for number, draws in enumerate(jitters):
        down, across = (
            jitter_axis(size, pad, draws.zoom, offset, flip)
            for offset, flip in ((draws.row, jnp.zeros((), bool)), (draws.col, draws.flip))
        )
        jittered = _both_axes(image, down, across).reshape(views, grid, side, grid, side, 3)
        target = encode(jittered.transpose(0, 1, 3, 5, 2, 4).reshape(patches.shape)).astype(jnp.float32)
        target = jax.lax.stop_gradient(target).reshape(views, grid, grid, -1)
        projection = draws.projection / jnp.linalg.norm(draws.projection, axis=1, keepdims=True)
        projected_target = _project(target, projection)
        for level, chance in enumerate(draws.levels, 1):
            parameters, height = scaffold[f"level_{level}"], 2**level * grid
            raster = _square_raster(cells[level].astype(jnp.float32), grid, level)
            projected = _project(raster, projection)
            enlarge = bilinear_axis(size, height)
            moved = [jnp.matmul(axis, enlarge, precision=HIGHEST) for axis in (down, across)]
            blurred = [jnp.matmul(blur, axis, precision=HIGHEST) for axis in moved]
            kernel = chance.channels * parameters["attention"]["kernel"][:, 0]
            logits = _both_axes(jnp.einsum("vhwc,vc->vhw", raster, kernel, precision=HIGHEST)[..., None], *blurred)
            logits = logits[..., 0] + parameters["attention"]["bias"]
            logits = logits.reshape(views, grid, side, grid, side).transpose(0, 1, 3, 2, 4)
            logits = logits * chance.kept[..., None, None] * parameters["weight"] + parameters["bias"]
            pixels = _both_axes(projected, *blurred).reshape(views, grid, side, grid, side, -1)
            made = jnp.einsum("vijyx,viyjxk->vijk", _softmax(logits), pixels, precision=HIGHEST)
            scale = jnp.maximum(jnp.exp(_apply(parameters["scale"], target) + SCALE_SHIFT), SCALE_FLOOR)[..., None]
            error = jnp.square(made - projected_target) / (2 * scale**2) + jnp.log(scale)
            name = f"reconstruction_{level}"
            terms[name] = terms.get(name, 0.0) + jnp.mean(error, axis=(1, 2, 3)) / len(jitters)
            if number == 0:
                at = chance.pixel_rows, chance.pixel_cols
                features = jnp.einsum(
                    "nh,nw,vhwk->vnk", moved[0][at[0]], moved[1][at[1]], projected, precision=HIGHEST, optimize=True
                )
                terms[f"crf_{level}"] = _crf(features, image[:, at[0], at[1]], jnp.stack(at, axis=-1) / size)
    return terms


def _both_axes(maps: jax.Array, down: jax.Array, across: jax.Array) -> jax.Array:
    """[V, h, w, C], [H, h] and [W, w] -> [V, H, W, C]."""
    return jnp.einsum("vhwc,yh,xw->vyxc", maps, down, across, precision=HIGHEST, optimize=True)


def _project(maps: jax.Array, projection: jax.Array) -> jax.Array:
    return jnp.einsum("vhwc,vck->vhwk", maps, projection, precision=HIGHEST)


def _square_raster(cells: jax.Array, grid: int, level: int) -> jax.Array:
    """[V, 4**level * P, C] in patch order -> [V, 2**level * G, 2**level * G, C]."""
    views, _, width = cells.shape
    split = cells.reshape(views, grid, grid, 2**level, 2**level, width).transpose(0, 1, 3, 2, 4, 5)
    return split.reshape(views, 2**level * grid, 2**level * grid, width)


def _crf(features: jax.Array, colours: jax.Array, positions: jax.Array) -> jax.Array:
    """float32[V]: mean over all pairs of pixels of the squared distance of their features times their likeness.

    Args:
      features: float32[V, N, K], of the jittered map.
      colours: float32[V, N, 3], of the image as it was before the jitter: so in the released code.
      positions: float32[N, 2], in sides of the image.
    """

    def distances(x):
        squares = jnp.sum(jnp.square(x), axis=-1)
        products = jnp.einsum("...ik,...jk->...ij", x, x, precision=HIGHEST)
        return squares[..., :, None] + squares[..., None, :] - 2 * products

    far = distances(positions)
    weight, place, colour = CRF_COLOUR
    likeness = weight * jnp.exp(-far / (2 * place) - distances(colours) / (2 * colour))
    likeness += CRF_NEAR[0] * jnp.exp(-far / (2 * CRF_NEAR[1]))
    return jnp.mean(distances(features) * likeness, axis=(1, 2))


def released_loss(terms: dict[str, jax.Array], grids: jax.Array, crf_weight: float) -> tuple[jax.Array, jax.Array]:
    """float32[]: the sum over views of the released loss, and the number of views; empty slots left out."""
    own = grids[:, 0] > 0
    total = sum(terms[name] * (crf_weight if name.startswith("crf") else 1.0) for name in terms)
    return jnp.sum(jnp.where(own, total, 0)), jnp.sum(own).astype(jnp.float32)
