"""Where a model looks when it answers: weights of its attentions, brought onto the image.

Each map tells of every place of a view how much more it is attended to than on average (1: as all others).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from uhd_jax.batch import Bucket
from uhd_jax.config import ModelConfig
from uhd_jax.data.chat import EncodedSample, ImagePart, Message, encode_chat
from uhd_jax.data.packing import fill_batch
from uhd_jax.generation.assistant import Assistant
from uhd_jax.models.attention_maps import AttentionMaps, attention_maps
from uhd_jax.models.hiwin import level_bins
from uhd_jax.ops.merge import patch_coordinates
from uhd_jax.slicing.image_io import open_image
from uhd_jax.slicing.pixels import cut_views
from uhd_jax.slicing.plan import Plan, Size, ViewPlan, plan_image

Maps = list[np.ndarray]  # float32[rows, cols] of each view, in the order of `Plan.views`


@dataclasses.dataclass(frozen=True)
class Looked:
    """What a model looked at in one image."""

    image: np.ndarray  # uint8[H, W, 3]
    plan: Plan
    answer: str
    inside: dict[str, Maps]  # by name: of the compressor and the connector
    answering: Maps  # mean over the answer's tokens, layers and heads
    tokens: tuple[tuple[str, Maps], ...]  # of each token of the answer
    visual_share: float  # of the answer's attention that goes to the image at all


def look(model: Assistant, image: Any, prompt: str, *, answer: str | None = None, **options: Any) -> Looked:
    """Asks a model about an image, and sees where it looks.

    Args:
      model: who is asked.
      image: as `Assistant.generate` takes it.
      prompt: the question.
      answer: looked at instead of the model's own answer.
      options: max_new_tokens, max_slices and mode, as of `Assistant.generate`.
    """
    config, mode = model.config, options.get("mode")
    pixels = open_image(image, config.slicing.limits)
    if answer is None:
        answer = model.generate(prompt, [pixels], **options)
    plan = plan_image(Size(*pixels.shape[:2]), config, mode, options.get("max_slices"))
    messages = (Message("user", (ImagePart(0), prompt)), Message("assistant", (answer,)))
    sample = encode_chat(messages, [plan], model.tokenizer, config.chat)
    found, said = _attend(model, pixels, plan, sample, mode)
    text = [model.tokenizer.decode([int(sample.tokens[place])], skip_special=False) for place in said]
    places = np.flatnonzero(sample.view >= 0)
    to_image = np.asarray(found.decoder)[:, :, places].mean(axis=0)  # [A, visual tokens]
    own = sample.view[places], sample.view_token[places]
    each = [_token_maps(row, own, plan, config, mode) for row in to_image]
    share = float(to_image.sum(axis=1).mean())
    return Looked(
        image=pixels,
        plan=plan,
        answer=answer,
        inside=_inside(found, plan, config, mode),
        answering=_token_maps(to_image.mean(axis=0), own, plan, config, mode),
        tokens=tuple(zip(text, each, strict=True)),
        visual_share=share,
    )


def _attend(
    model: Assistant, image: np.ndarray, plan: Plan, sample: EncodedSample, mode: str | None
) -> tuple[AttentionMaps, np.ndarray]:
    """The weights, and the places of the answer's tokens. A token is chosen where the one before it stands."""
    config = model.config
    views = cut_views(image, plan, config.tower.patch_size)
    block = 4 ** max(2, plan.levels)
    patches = -(-max(len(view) for view in views) // block) * block
    bucket = Bucket(1, len(views), len(sample.tokens), patches, config.tower.patch_bytes)
    batch = fill_batch([[(sample, views)]], bucket, config.visual_tokens(patches, mode))
    said = np.flatnonzero(sample.trained)
    return attention_maps(model.params, batch, jnp.asarray(said - 1), config, mode), said


def _inside(found: AttentionMaps, plan: Plan, config: ModelConfig, mode: str | None) -> dict[str, Maps]:
    maps: dict[str, Maps] = {}
    if found.compressor is not None:
        of_view = zip(np.asarray(found.compressor), plan.views, strict=False)
        maps["compressor: weights inside each 2x2 window"] = [_in_patches(row, view, plan) for row, view in of_view]
    if found.connector is not None:
        read = {"perceiver": _of_perceiver, "spatial_resampler": _of_windows, "hiwin": _of_windows}
        name = {"perceiver": "resampler", "spatial_resampler": "resampler", "hiwin": "Hiwin attention"}
        kind = config.connector.kind
        of_view = zip(np.asarray(found.connector), plan.views, strict=False)
        maps[f"{name[kind]}: mean over its queries"] = [read[kind](row, view, config) for row, view in of_view]
    return maps


def _even(weights: np.ndarray) -> np.ndarray:
    """Relative to the mean."""
    return weights / weights.mean() if weights.mean() else weights


def _in_patches(weights: np.ndarray, view: ViewPlan, plan: Plan) -> np.ndarray:
    """Weights of patches in merge order, which sum to 1 in every window of four."""
    rows, cols = patch_coordinates(jnp.asarray([view.patch_grid]), len(weights), plan.levels)
    laid = np.zeros(view.patch_grid, np.float32)
    own = view.patch_grid.area
    laid[np.asarray(rows)[0, :own], np.asarray(cols)[0, :own]] = 4 * weights[:own]
    return laid


def _of_perceiver(weights: np.ndarray, view: ViewPlan, config: ModelConfig) -> np.ndarray:
    """All queries over all cells of all levels; a level's cell counts for the patch it lies in."""
    received = weights[0]
    laid = np.zeros(view.patch_grid, np.float32)
    levels = config.connector.pyramid.levels
    room = len(received) // sum(4**level for level in levels)
    start = 0
    for level in levels:
        rows, cols = view.patch_grid.rows << level, view.patch_grid.cols << level
        cells = received[start : start + rows * cols].reshape(rows, cols)
        laid += cells.reshape(view.patch_grid.rows, 1 << level, -1, 1 << level).sum(axis=(1, 3))
        start += room * 4**level
    return _even(laid)


def _of_windows(weights: np.ndarray, view: ViewPlan, config: ModelConfig) -> np.ndarray:
    """Every window's queries over its bins; the bins of all levels on one fine grid (12 divides by 1, 2, 3 and 4)."""
    side, fine = config.connector.query_side, 12
    hiwin = config.connector.kind == "hiwin"
    levels = config.connector.pyramid.levels if hiwin else (0,)
    laid = np.zeros((side, side, fine, fine), np.float32)
    grid = jnp.asarray([view.patch_grid], jnp.int32)
    for number, level in enumerate(levels):
        kind = config.connector.bins if hiwin else "selective"
        down, across = np.asarray(level_bins(kind, level, grid))[0].tolist()
        own = weights[:, number * 12 : number * 12 + down * across].reshape(side, side, down, across)
        spread = np.repeat(np.repeat(own, fine // down, axis=2), fine // across, axis=3)
        laid += spread * down * across
    return _even(laid.transpose(0, 2, 1, 3).reshape(side * fine, side * fine))


def _token_maps(
    weights: np.ndarray, own: tuple[np.ndarray, np.ndarray], plan: Plan, config: ModelConfig, mode: str | None
) -> Maps:
    """Weights of visual tokens, each laid where it comes from in its view; relative to the mean of the image's."""
    relative, (views, tokens) = _even(weights), own
    maps = []
    for number, view in enumerate(plan.views):
        shape = token_grid(view, config, mode)
        laid = np.zeros(shape[0] * shape[1], np.float32)
        here = views == number
        laid[tokens[here]] = relative[here]
        maps.append(laid.reshape(shape))
    return maps


def token_grid(view: ViewPlan, config: ModelConfig, mode: str | None = None) -> tuple[int, int]:
    """Rows and columns in which a view's visual tokens stand."""
    if config.connector.queries:
        return config.connector.query_side, config.connector.query_side
    scale = 2 ** config.merge_levels(mode)
    return view.patch_grid.rows // scale, view.patch_grid.cols // scale


def tiled(maps: Sequence[np.ndarray], plan: Plan, size: Size) -> np.ndarray:
    """The maps of the slices as one over the whole image, float32[size], each cell a rectangle of its colour."""
    rows = []
    for row in range(plan.grid.rows):
        top, bottom = (round(n * size.height / plan.grid.rows) for n in (row, row + 1))
        cells = []
        for col in range(plan.grid.cols):
            left, right = (round(n * size.width / plan.grid.cols) for n in (col, col + 1))
            cells.append(stretched(maps[row * plan.grid.cols + col], Size(bottom - top, right - left)))
        rows.append(np.concatenate(cells, axis=1))
    return np.concatenate(rows, axis=0)


def stretched(values: np.ndarray, size: Size) -> np.ndarray:
    """A map at another size, every cell a rectangle."""
    rows = np.arange(size.height) * values.shape[0] // size.height
    cols = np.arange(size.width) * values.shape[1] // size.width
    return values[rows[:, None], cols[None]]
