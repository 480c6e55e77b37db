"""Messages and plans to token ids: a prompt form around the visual blocks (spec: v4 section 2.8, v1-v2 section 4).

    chatml     <|im_start|>user\\n{image}\\n{question}<|im_end|>\\n<|im_start|>assistant\\n{answer}<|im_end|>
    vicuna_v1  {system} USER: {image}\\n{question} ASSISTANT: {answer}</s>USER: {question} ASSISTANT: {answer}</s>
    plain      {image}{caption}\\n

Everything here follows from texts and image sizes; no pixels are read, so the length of a sample and its number of
views are known before an image is decoded.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from uhd_jax.config import ChatConfig
from uhd_jax.data.tokenizer import THINK_END, THINK_START, Tokenizer, TokenizerError
from uhd_jax.slicing.layout import COMMA, Separator, ViewRun, visual_block
from uhd_jax.slicing.plan import Plan

ROLES = ("system", "user", "assistant")


class ChatError(ValueError):
    """The messages cannot be encoded: an unknown role, images or turns that do not match, or nothing to answer."""


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


_Item = str | _Mark | ViewRun | Separator
_Piece = tuple[_Item, bool]  # and whether it is trained


def encode_chat(
    messages: Sequence[Message], plans: Sequence[Plan], tokenizer: Tokenizer, chat: ChatConfig, generate: bool = False
) -> EncodedSample:
    """Encodes a conversation in the prompt form `chat.template`.

    In a turn, visual blocks and stripped texts are joined by newlines. Trained are the answers with the mark of their
    end, `chat.turn_end`. The first token of a sample is never trained: nothing predicts it.

    "chatml": the empty think block that `chat.empty_think` puts before the last answer is not trained. With
    `chat.train_turn_marks` also trained are the headings of answers and, everywhere outside visual blocks, turn marks
    and newlines; and the sample ends with a newline. So does the released v2 code for Qwen2.
    "plain", for stages of captions: one turn with images and one answer, of which caption and newline are trained. The
    user's texts and `chat.system` are left out.

    Args:
      messages: the turns. `chat.system` becomes a first turn unless they begin with a system turn.
      plans: one per image, in the order in which the messages show them.
      tokenizer: must have every mark of `chat` that is needed.
      chat: the strings around text and images.
      generate: the sequence ends where the next answer begins.

    Raises:
      ChatError: an unknown role, an image shown not exactly once, in order, and outside answers, turns for which the
        prompt form has no place, or `generate` after an answer.
      ConfigError: as of `visual_block`.
      TokenizerError: the tokenizer lacks a mark, or a separator is not one id.
    """
    _check(messages, plans, generate)
    if chat.system and messages[0].role != "system" and chat.template != "plain":
        messages = (Message("system", (chat.system,)), *messages)
    return _to_ids(_TEMPLATES[chat.template](messages, plans, chat, generate), plans, tokenizer, chat)


def visual_places(plans: Sequence[Plan], chat: ChatConfig) -> tuple[np.ndarray, np.ndarray]:
    """Which visual token stands at which placeholder, for the images of a sample in the order of its text.

    Returns:
      int32[N] number of the view over all images, and int32[N] token inside that view.
    """
    runs = [item for index in range(len(plans)) for item in _block(plans, chat, index) if isinstance(item, ViewRun)]
    places = [(run.view, run.start + token) for run in runs for token in range(run.tokens)]
    view, view_token = np.array(places, np.int32).reshape(-1, 2).T
    return view, view_token


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


def _chatml(messages: Sequence[Message], plans: Sequence[Plan], chat: ChatConfig, generate: bool) -> Iterator[_Piece]:
    think = (_Mark(THINK_START), "\n\n", _Mark(THINK_END), "\n\n") if chat.empty_think else ()
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    for number, message in enumerate(messages):
        trained = message.role == "assistant"
        if number > 0:
            yield "\n", False
        yield from _all((_Mark(chat.turn_start), f"{message.role}\n"), trained and chat.train_turn_marks)
        if [number] == answers[-1:] and not generate:
            yield from _all(think, False)
        yield from _all((*_content(message, plans, chat), _Mark(chat.turn_end)), trained)
    if generate:
        yield from _all(("\n", _Mark(chat.turn_start), "assistant\n", *think), False)
    elif chat.train_turn_marks:
        yield "\n", True


def _vicuna(messages: Sequence[Message], plans: Sequence[Plan], chat: ChatConfig, generate: bool) -> Iterator[_Piece]:
    for number, message in enumerate(messages):
        content = _content(message, plans, chat)
        if message.role == "assistant":
            yield "ASSISTANT:", False
            yield from _all((" ", *content) if content else (), True)
            yield _Mark(chat.turn_end), True
        elif message.role == "user":
            yield from _all(("USER: ", *content, " "), False)
        elif number == 0:
            yield from _all((*content, " "), False)
        else:
            raise ChatError("the template 'vicuna_v1' has no place for a system message after the first message")
    if generate:
        yield "ASSISTANT:", False


def _plain(messages: Sequence[Message], plans: Sequence[Plan], chat: ChatConfig, generate: bool) -> Iterator[_Piece]:
    roles, needed = [message.role for message in messages], ["user"] if generate else ["user", "assistant"]
    if roles != needed or not plans:
        raise ChatError(
            f"the template 'plain' needs the turns {needed} and at least one image, not {roles} and {len(plans)} images"
        )
    images = [part for part in messages[0].parts if isinstance(part, ImagePart)]
    if generate and any(part.strip() for part in messages[0].parts if isinstance(part, str)):
        raise ChatError("the template 'plain' has no place for a question; ask with an empty text")
    yield from _all(_content(Message("user", tuple(images)), plans, chat), False)
    if not generate:
        yield from _all((*_content(messages[1], plans, chat), "\n"), True)


_TEMPLATES = {"chatml": _chatml, "vicuna_v1": _vicuna, "plain": _plain}


def _all(items: Iterable[_Item], trained: bool) -> Iterator[_Piece]:
    return ((item, trained) for item in items)


def _content(message: Message, plans: Sequence[Plan], chat: ChatConfig) -> list[_Item]:
    """What a turn says: its visual blocks and stripped texts, joined by newlines."""
    parts = message.parts
    if chat.images_first:
        parts = sorted(parts, key=lambda part: isinstance(part, str))
    items: list[_Item] = []
    for part in parts:
        said = [part.strip()] if isinstance(part, str) else _block(plans, chat, part.index)
        if said != [""]:
            items += ["\n", *said] if items else said
    return items


def _block(plans: Sequence[Plan], chat: ChatConfig, number: int) -> list[_Item]:
    """The visual block of an image, its views numbered over all images."""
    names = (chat.image_start, chat.image_end, chat.slice_start, chat.slice_end, chat.image_id_start, chat.image_id_end)
    marks = re.compile("(" + "|".join(map(re.escape, names)) + ")")
    first_view = sum(len(plan.views) for plan in plans[:number])
    items: list[_Item] = []
    for part in visual_block(plans[number], chat, number):
        if isinstance(part, ViewRun):
            items.append(part._replace(view=part.view + first_view))
        elif isinstance(part, Separator):
            items.append(part)
        else:
            items += [_Mark(text) if text in names else text for text in marks.split(part) if text]
    return items


def _to_ids(pieces: Iterable[_Piece], plans: Sequence[Plan], tokenizer: Tokenizer, chat: ChatConfig) -> EncodedSample:
    tokens, trained, view, view_token = [], [], [], []
    always: set[int] = set()  # trained in every turn
    if chat.template == "chatml" and chat.train_turn_marks:
        newline = _single_id("\n", tokenizer, "switch config.model.chat.train_turn_marks off")
        always = {newline, tokenizer.special(chat.turn_start), tokenizer.special(chat.turn_end)}

    def add(ids: Sequence[int], is_trained: Iterable[bool], of_view: int = -1, first: int = 0) -> None:
        tokens.extend(ids)
        trained.extend(is_trained)
        view.extend([of_view] * len(ids))
        view_token.extend(range(first, first + len(ids)) if of_view >= 0 else [0] * len(ids))

    if chat.bos:
        add([tokenizer.special(chat.bos)], [False])
    for kind, group in itertools.groupby(pieces, lambda piece: type(piece[0])):
        if kind is str:
            for ids, is_trained in _text_ids(group, tokenizer, joined=chat.template == "vicuna_v1"):
                add(ids, [is_trained or i in always for i in ids])
            continue
        for item, is_trained in group:
            if isinstance(item, ViewRun):
                add([tokenizer.special(chat.placeholder)] * item.tokens, [False] * item.tokens, item.view, item.start)
            elif isinstance(item, Separator):
                add([_separator_id(item, tokenizer, chat)], [False])
            else:
                mark = tokenizer.special(item.name)
                add([mark], [is_trained or mark in always])
    return EncodedSample(
        tokens=np.array(tokens, np.int32),
        trained=np.array([False, *trained[1:]], bool),
        view=np.array(view, np.int32),
        view_token=np.array(view_token, np.int32),
        plans=tuple(plans),
    )


def _text_ids(
    pieces: Iterable[tuple[str, bool]], tokenizer: Tokenizer, joined: bool
) -> Iterator[tuple[list[int], bool]]:
    """Ids of texts that follow each other, apart by whether they are trained.

    Those alike are encoded as one, as a tokenizer that reads the whole prompt would. With `joined` all are: a
    sentencepiece vocabulary has the space before an answer in the answer's first token. What two encodings have in
    common at their beginning then belongs to the shorter text.
    """
    texts = [("".join(text for text, _ in group), flag) for flag, group in itertools.groupby(pieces, lambda p: p[1])]
    if not joined:
        yield from ((tokenizer.encode(text), flag) for text, flag in texts)
        return
    whole, start, so_far = tokenizer.encode("".join(text for text, _ in texts)), 0, ""
    for text, flag in texts:
        so_far += text
        pairs = zip(tokenizer.encode(so_far), whole, strict=False)
        end = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        yield whole[start:end], flag
        start = end


def _separator_id(separator: Separator, tokenizer: Tokenizer, chat: ChatConfig) -> int:
    if chat.separator_ids:
        comma, newline = chat.separator_ids
        return comma if separator.text == COMMA else newline
    return _single_id(separator.text, tokenizer, "set config.model.chat.separator_ids to the ids of comma and newline")


def _single_id(text: str, tokenizer: Tokenizer, remedy: str) -> int:
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        raise TokenizerError(f"tokenizer {tokenizer.name}: {text!r} is {len(ids)} ids, not one; {remedy}")
    return ids[0]
