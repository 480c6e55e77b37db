"""The visual block: how an image's visual tokens stand in the text.

Layout "v4" (spec v4 section 2.8) puts marks around every view; rows of slices are joined by a newline, with none before
the first row and none after the last:

    <image_id>0</image_id><image>{thumbnail}</image><slice>{..}</slice><slice>{..}</slice>
    <slice>{..}</slice><slice>{..}</slice>

Layouts "A" and "B" (spec v1-v2 section 4.3) have single tokens, comma and newline, between views, and the thumbnail
last. In "A" every slice is followed by its separator, a newline at the end of a row:

    {slice},{slice}\n{slice},{slice}\n{thumbnail}

In "B", spatially consistent, the token maps of the slices are tiled into one map, of which every row ends with a
newline; one more token stands before the thumbnail, the separator that the first slice would have in "A".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from uhd_jax.config import ChatConfig, ConfigError
from uhd_jax.slicing.plan import Plan

COMMA, NEWLINE = ",", "\n"


class ViewRun(NamedTuple):
    """Where visual tokens of one view stand: its index in `Plan.views`, their number, and the first of them."""

    view: int
    tokens: int
    start: int = 0


class Separator(NamedTuple):
    """A single token of layouts A and B: `COMMA` or `NEWLINE`. Its id need not be what the text encodes to."""

    text: str


Part = str | ViewRun | Separator


def visual_block(plan: Plan, chat: ChatConfig, image_number: int) -> tuple[Part, ...]:
    """The visual block of one image. Every visual token of every view stands in it once.

    Args:
      plan: what becomes of the image.
      chat: layout and marks, and whether an image id stands in front.
      image_number: number of the image within its sample, from 0; for the image id.

    Raises:
      ConfigError: layout "B" where the visual tokens of a slice are no square map.
    """
    first = len(plan.views) - len(plan.slices)  # slice
    thumbnail = [ViewRun(0, plan.thumbnail.visual_tokens)] if plan.thumbnail else []
    if chat.layout == "v4":
        return tuple(_marked(plan, chat, image_number, thumbnail))
    slices = _slice_by_slice(plan, first) if chat.layout == "A" else _row_by_row(plan, first)
    return tuple(part for part in (*slices, *thumbnail) if chat.schema or isinstance(part, ViewRun))


def block_text(block: tuple[Part, ...], placeholder: str) -> str:
    """The block as one string, with the placeholder in place of every visual token."""
    return "".join(_text(part, placeholder) for part in block)


def _text(part: Part, placeholder: str) -> str:
    if isinstance(part, ViewRun):
        return placeholder * part.tokens
    return part.text if isinstance(part, Separator) else part


def _marked(plan: Plan, chat: ChatConfig, image_number: int, thumbnail: list[ViewRun]) -> Iterator[Part]:
    text = f"{chat.image_id_start}{image_number}{chat.image_id_end}" if chat.use_image_id else ""
    for run in thumbnail:
        yield text + chat.image_start
        yield run
        text = chat.image_end
    for index, view in enumerate(plan.slices):
        starts_row = index and index % plan.grid.cols == 0
        yield text + (NEWLINE if starts_row else "") + chat.slice_start
        yield ViewRun(len(thumbnail) + index, view.visual_tokens)
        text = chat.slice_end
    yield text


def _slice_by_slice(plan: Plan, first: int) -> Iterator[Part]:
    for index, view in enumerate(plan.slices):
        yield ViewRun(first + index, view.visual_tokens)
        yield Separator(COMMA if (index + 1) % plan.grid.cols else NEWLINE)


def _row_by_row(plan: Plan, first: int) -> Iterator[Part]:
    if not plan.slices:
        return
    rows, cols = plan.grid
    side = math.isqrt(plan.slices[0].visual_tokens)
    if {view.visual_tokens for view in plan.slices} != {side**2}:
        raise ConfigError(
            "chat.layout: 'B' tiles the token maps of slices, which must be squares of one size; "
            "choose a connector with query_side, or layout 'A'"
        )
    for row in range(rows):
        for line in range(side):
            for col in range(cols):
                yield ViewRun(first + row * cols + col, side, line * side)
            yield Separator(NEWLINE)
    if plan.thumbnail:
        yield Separator(COMMA if cols > 1 else NEWLINE)
