"""Messages and plans to token ids: ChatML around the visual blocks (spec: v4 section 2.8).

Everything here follows from texts and image sizes; no pixels are read, so the length of a sample and its number of
views are known before an image is decoded.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from uhd_jax.config import ChatConfig
from uhd_jax.data.tokenizer import THINK_END, THINK_START, Tokenizer
from uhd_jax.slicing.layout import ViewRun, visual_block
from uhd_jax.slicing.plan import Plan

ROLES = ("system", "user", "assistant")


class ChatError(ValueError):
    """The messages cannot be encoded: an unknown role, images that do not match, or nothing to answer."""


class ImagePart(NamedTuple):
    """An image in a message, by its index in the sample's list of images."""

    index: int


class Message(NamedTuple):
    """One turn: a role of `ROLES` and its parts in order."""

    role: str
    parts: tuple[str | ImagePart, ...]


class Needs(NamedTuple):
    """What a sample asks of a row: tokens, views, and the patches of its largest view."""

    tokens: int
    views: int
    patches: int


@dataclasses.dataclass(frozen=True)
class EncodedSample:
    """A sample as ids, before it has a place in a row. T is its own length."""

    tokens: np.ndarray  # int32[T]: text ids; the placeholder id where visual tokens go
    trained: np.ndarray  # bool[T]: predicting this token is trained
    view: np.ndarray  # int32[T]: -1 for text, else number of the view over all images of the sample
    view_token: np.ndarray  # int32[T]: token inside that view; 0 for text
    plans: tuple[Plan, ...]  # one per image

    @property
    def needs(self) -> Needs:
        """What this sample asks of a row."""
        views = [view.patch_grid.area for plan in self.plans for view in plan.views]
        return Needs(len(self.tokens), len(views), max(views, default=0))


class _Mark(NamedTuple):
    """One token that steers the model, never made from text."""

    name: str


_Item = str | _Mark | ViewRun


def encode_chat(
    messages: Sequence[Message], plans: Sequence[Plan], tokenizer: Tokenizer, chat: ChatConfig, generate: bool = False
) -> EncodedSample:
    """Encodes a conversation.

    In a turn, visual blocks and stripped texts are joined by newlines. Trained are the answers with their end-of-turn
    token; the empty think block that `chat.empty_think` puts before the last answer is not.

    Args:
      messages: the turns. `chat.system` becomes a first turn unless they begin with a system turn.
      plans: one per image, in the order in which the messages show them.
      tokenizer: must have every mark of `chat` that is needed.
      chat: the strings around text and images.
      generate: the sequence ends where the next answer begins.

    Raises:
      ChatError: an unknown role, an image shown not exactly once, in order, and outside answers, or `generate` after
        an answer.
      TokenizerError: the tokenizer lacks a mark.
    """
    _check(messages, plans, generate)
    if chat.system and messages[0].role != "system":
        messages = (Message("system", (chat.system,)), *messages)
    return _to_ids(_pieces(messages, plans, chat, generate), plans, tokenizer, chat)


def _check(messages: Sequence[Message], plans: Sequence[Plan], generate: bool) -> None:
    if not messages:
        raise ChatError("a conversation without messages")
    for message in messages:
        if message.role not in ROLES:
            raise ChatError(f"role {message.role!r} is not one of {ROLES}")
        if message.role != "user" and any(isinstance(part, ImagePart) for part in message.parts):
            raise ChatError(f"only user messages can hold images, not the role {message.role!r}")
    shown = [part.index for message in messages for part in message.parts if isinstance(part, ImagePart)]
    if shown != list(range(len(plans))):
        raise ChatError(
            f"messages show the images {shown}, but there are {len(plans)} images; each must be shown once, in order"
        )
    if generate and messages[-1].role == "assistant":
        raise ChatError("the last message is an answer already; nothing to generate")


def _pieces(
    messages: Sequence[Message], plans: Sequence[Plan], chat: ChatConfig, generate: bool
) -> list[tuple[_Item, bool]]:
    """Texts, marks and view runs in order, each with whether it is trained."""
    pieces: list[tuple[_Item, bool]] = []

    def add(trained: bool, *items: _Item) -> None:
        pieces.extend((item, trained) for item in items)

    think = (_Mark(THINK_START), "\n\n", _Mark(THINK_END), "\n\n") if chat.empty_think else ()
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    views = 0
    for number, message in enumerate(messages):
        if number > 0:
            add(False, "\n")
        add(False, _Mark(chat.turn_start), f"{message.role}\n")
        if [number] == answers[-1:] and not generate:
            add(False, *think)
        trained = message.role == "assistant"
        separator = ""
        for part in message.parts:
            if isinstance(part, ImagePart):
                add(trained, separator, *_block(plans[part.index], chat, part.index, views))
                views += len(plans[part.index].views)
            elif part.strip():
                add(trained, separator, part.strip())
            else:
                continue
            separator = "\n"
        add(trained, _Mark(chat.turn_end))
    if generate:
        add(False, "\n", _Mark(chat.turn_start), "assistant\n", *think)
    return pieces


def _block(plan: Plan, chat: ChatConfig, number: int, first_view: int) -> Iterator[_Item]:
    """The visual block of an image, its views numbered from `first_view`."""
    names = (chat.image_start, chat.image_end, chat.slice_start, chat.slice_end, chat.image_id_start, chat.image_id_end)
    marks = re.compile("(" + "|".join(map(re.escape, names)) + ")")
    for item in visual_block(plan, chat, number):
        if isinstance(item, ViewRun):
            yield item._replace(view=item.view + first_view)
        else:
            yield from (_Mark(text) if text in names else text for text in marks.split(item) if text)


def _to_ids(
    pieces: Sequence[tuple[_Item, bool]], plans: Sequence[Plan], tokenizer: Tokenizer, chat: ChatConfig
) -> EncodedSample:
    tokens, trained, view, view_token = [], [], [], []

    def add(ids: Sequence[int], is_trained: bool, of_view: int = -1) -> None:
        tokens.extend(ids)
        trained.extend([is_trained] * len(ids))
        view.extend([of_view] * len(ids))
        view_token.extend(range(len(ids)) if of_view >= 0 else [0] * len(ids))

    # Neighbouring texts are encoded as one, as a tokenizer that reads the whole prompt would.
    for (kind, is_trained), group in itertools.groupby(pieces, lambda piece: (type(piece[0]), piece[1])):
        items = [item for item, _ in group]
        if kind is str:
            add(tokenizer.encode("".join(items)), is_trained)
        elif kind is _Mark:
            add([tokenizer.special(mark.name) for mark in items], is_trained)
        else:
            for run in items:
                add([tokenizer.special(chat.placeholder)] * run.tokens, False, run.view)
    return EncodedSample(
        tokens=np.array(tokens, np.int32),
        trained=np.array(trained, bool),
        view=np.array(view, np.int32),
        view_token=np.array(view_token, np.int32),
        plans=tuple(plans),
    )
