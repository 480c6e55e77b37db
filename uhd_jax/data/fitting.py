"""What is given up of a sample that is too large for a row: slices first, then its oldest turns.

A visual block is never cut, nor a turn: whole rounds of question and answer go, with their images. The decision follows
from sizes and texts alone and is the same wherever it is taken, in training as in the statistics made before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from uhd_jax.data.chat import ImagePart, Message, VideoPart, shown_images

Policy = Literal["cut_turns", "fewer_slices", "drop"]


class Reduction(NamedTuple):
    """What a sample is trained on with."""

    max_slices: int  # per image
    rounds: int = 0  # that are cut, the oldest ones


def reduce_to_fit(
    fits: Callable[[Reduction], bool], policy: Policy, max_slices: int, cuttable: int
) -> Reduction | None:
    """The least reduction with which a sample fits: the fewest rounds cut, and then the most slices per image.

    Args:
      fits: whether it fits after a reduction. With more rounds cut it must fit if it does with fewer.
      policy: what may be given up: slices and rounds, slices, or nothing.
      max_slices: the limit without a reduction.
      cuttable: rounds that may be cut (`cuttable`).

    Returns:
      The reduction; None when nothing that may be given up is enough.
    """

    def most_slices(rounds: int) -> Reduction | None:
        limits = range(max_slices, 0, -1) if policy != "drop" else (max_slices,)
        options = (Reduction(limit, rounds) for limit in limits)
        return next(filter(fits, options), None)

    found = most_slices(0)
    if found or policy != "cut_turns" or not cuttable or not (found := most_slices(cuttable)):
        return found
    too_few, enough = 0, cuttable
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if fewer := most_slices(middle):
            enough, found = middle, fewer
        else:
            too_few = middle
    return found


def cuttable(messages: Sequence[Message]) -> int:
    """How many rounds may be cut so that one with an answer stays."""
    starts = _rounds(messages)
    ends = [*starts[1:], len(messages)]
    answered = [
        number
        for number, (start, end) in enumerate(zip(starts, ends, strict=True))
        if any(message.role == "assistant" for message in messages[start:end])
    ]
    return max(answered, default=0)


def without_oldest(messages: Sequence[Message], rounds: int) -> tuple[tuple[Message, ...], int]:
    """A conversation without its oldest rounds, and how many of its first images are gone with them.

    A round is what users say up to the answers, and the answers. System turns at the beginning stay.
    """
    if not rounds:
        return tuple(messages), 0
    starts = _rounds(messages)
    gone = messages[starts[0] : starts[rounds]]
    images = sum(len(shown_images(part)) for message in gone for part in message.parts)

    def moved(part: str | ImagePart | VideoPart) -> str | ImagePart | VideoPart:
        if isinstance(part, ImagePart):
            return ImagePart(part.index - images)
        return part._replace(first=part.first - images) if isinstance(part, VideoPart) else part

    kept = (Message(role, tuple(map(moved, parts))) for role, parts in messages[starts[rounds] :])
    return (*messages[: starts[0]], *kept), images


def _rounds(messages: Sequence[Message]) -> list[int]:
    """Where rounds begin: the first turn that is no system turn, and every one that follows an answer and is none."""
    head = next((number for number, message in enumerate(messages) if message.role != "system"), len(messages))
    pairs = zip(range(head + 1, len(messages)), itertools.pairwise(messages[head:]), strict=True)
    return [head] + [n for n, (before, turn) in pairs if before.role == "assistant" and turn.role != "assistant"]
