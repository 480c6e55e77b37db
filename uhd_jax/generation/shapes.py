"""Static shapes of generation: the few sizes to which prompts, caches and views are rounded up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from uhd_jax.config import ModelConfig
from uhd_jax.slicing.plan import ImageRefused, Size, plan_image

WINDOW = 2048  # tokens from which on a decode step of a short beginning need not attend to the room of a long answer
TOGETHER = 2**15  # tokens of the prompts, and patches of the views, that one program reads at most


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Every program of a runner has one of these shapes, so there are few, and `Runner.warm_up` compiles all of them.

    A prompt is read in the smallest of `lengths` that holds it; a decode step attends to the smallest that holds the
    longest sequence at the time. The last one is the length of the cache.
    """

    rows: int  # sequences that are continued together
    prefill_rows: int  # prompts that are read together
    lengths: tuple[int, ...]  # tokens, ascending
    views: tuple[int, ...]  # views that the tower reads together, ascending
    patches: tuple[int, ...]  # room for patches per view, ascending

    @property
    def length(self) -> int:
        """Prompt and answer together have at most so many tokens."""
        return self.lengths[-1]


def fit(count: int, sizes: Sequence[int]) -> int:
    """The smallest of ascending sizes that holds `count`.

    Raises:
      ValueError: none does.
    """
    for size in sizes:
        if count <= size:
            return size
    raise ValueError(f"{count} is above the largest size, {sizes[-1]}")


def room(count: int, smallest: int = 1) -> int:
    """`count` rounded up to one of 8 sizes per power of two: few programs, at most 1/8 of padding."""
    if count <= smallest:
        return smallest if count else 0
    step = max(smallest, 2 ** (count.bit_length() - 1) // 8)
    return -(-count // step) * step


def shapes_for(rows: int, prompts: Sequence[int], max_new_tokens: int, views: int, patches: int) -> Shapes:
    """Shapes of one batch of prompts, of which similar ones share a program.

    Args:
      rows: sequences to continue.
      prompts: tokens of each prompt.
      max_new_tokens: of an answer.
      views: of all prompts.
      patches: of the largest view.
    """
    longest, patch_room = room(max(prompts), 32), room(max(patches, 16), 16)
    length = room(max(longest, max(prompts) + max_new_tokens))
    between, window = [], WINDOW
    while window < length:
        between += [window] if window > longest else []
        window *= 2
    return Shapes(
        rows=room(rows),
        prefill_rows=min(room(len(prompts)), max(1, TOGETHER // longest)),
        lengths=tuple(sorted({longest, *between, length})),
        views=(min(room(max(views, 1)), max(1, TOGETHER // patch_room)),),
        patches=(patch_room,),
    )


def serving_shapes(config: ModelConfig, rows: int, length: int, shards: int = 1) -> Shapes:
    """Shapes for prompts that are not known yet.

    Lengths are powers of two from 128 up to `length`; views are read one or four at a time, in a room for those of
    usual images or in one for the largest that the model takes. Where rows lie on several devices, `shards`, numbers of
    rows, prompts and views are multiples of it.
    """
    lengths = [length]
    while lengths[0] > 128:
        lengths.insert(0, 2 ** math.ceil(math.log2(lengths[0]) - 1))
    rows = -(-rows // shards) * shards
    return Shapes(rows, shards, tuple(lengths), (shards, 4 * shards), patch_rooms(config))


def patch_rooms(config: ModelConfig) -> tuple[int, ...]:
    """Room for the patches of a view: of images between 1:3 and 3:1, and of any image the model takes."""
    usual, largest = 16, config.slicing.max_view_patches
    if config.slicing.encoding == "global":
        largest *= config.slicing.max_slices
    side = config.slicing.scale_resolution
    for area in (0.5, 1, 2, 3.5, 6, 9, 14):
        for ratio in (1, 4 / 3, 1.5, 16 / 9, 2, 3):
            short = max(1, round(side * (area / ratio) ** 0.5))
            long = round(short * ratio)
            for size in (Size(short, long), Size(long, short)):
                try:
                    plan = plan_image(size, config)
                except ImageRefused:
                    continue
                usual = max(usual, *(view.patch_grid.area for view in plan.views))
    return tuple(sorted({-(-min(usual, largest) // 16) * 16, -(-largest // 16) * 16}))
