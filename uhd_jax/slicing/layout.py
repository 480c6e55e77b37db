"""The visual block: how an image's visual tokens and their marks stand in the text (spec v4 section 2.8).

    <image_id>0</image_id><image>{thumbnail}</image><slice>{..}</slice><slice>{..}</slice>
    <slice>{..}</slice><slice>{..}</slice>

Rows of slices are joined by a newline; there is none before the first row and none after the last.
"""

from __future__ import annotations

from typing import NamedTuple

from uhd_jax.config import ChatConfig
from uhd_jax.slicing.plan import Plan


class ViewRun(NamedTuple):
    """Where the visual tokens of one view stand: its index in `Plan.views` and their number."""

    view: int
    tokens: int


def visual_block(plan: Plan, chat: ChatConfig, image_number: int) -> tuple[str | ViewRun, ...]:
    """The visual block of one image: text and view runs, alternating.

    Args:
      plan: what becomes of the image.
      chat: the marks, and whether an image id stands in front.
      image_number: number of the image within its sample, from 0.
    """
    image_id = f"{chat.image_id_start}{image_number}{chat.image_id_end}" if chat.use_image_id else ""
    block: list[str | ViewRun] = [image_id + chat.image_start, ViewRun(0, plan.thumbnail.visual_tokens)]
    text = chat.image_end
    for index in range(plan.grid.area):
        starts_row = index and index % plan.grid.cols == 0
        text += ("\n" if starts_row else "") + chat.slice_start
        block += [text, ViewRun(index + 1, plan.slice.visual_tokens)]
        text = chat.slice_end
    return (*block, text)


def block_text(block: tuple[str | ViewRun, ...], placeholder: str) -> str:
    """The block as one string, with the placeholder in place of every visual token."""
    return "".join(placeholder * part.tokens if isinstance(part, ViewRun) else part for part in block)
