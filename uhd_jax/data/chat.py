"""Messages and plans to token ids: a prompt form around the visual blocks (spec: v4 section 2.8, v1-v2 section 4).

    chatml     <|im_start|>user\\n{image}\\n{question}<|im_end|>\\n<|im_start|>assistant\\n{answer}<|im_end|>
    vicuna_v1  {system} USER: {image}\\n{question} ASSISTANT: {answer}</s>USER: {question} ASSISTANT: {answer}</s>
    plain      {image}{caption}\\n
    jinja      what the tokenizer's own chat template makes of the turns (`data.chat_template`)

Everything here follows from texts and image sizes; no pixels are read, so the length of a sample and its number of
views are known before an image is decoded.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from uhd_jax.config import ChatConfig
from uhd_jax.data import chat_template
from uhd_jax.data.tokenizer import THINK_END, THINK_START, Tokenizer, TokenizerError
from uhd_jax.slicing.layout import COMMA, Separator, ViewRun, visual_block
from uhd_jax.slicing.plan import Plan

ROLES = ("system", "user", "assistant")
_THOUGHT = re.compile(f"{THINK_START}(.*?){THINK_END}(.*)", re.DOTALL)


class ChatError(ValueError):
    """The messages cannot be encoded: an unknown role, images or turns that do not match, or nothing to answer."""


class ImagePart(NamedTuple):
    """An image in a message, by its index in the sample's list of images."""

    index: int


class VideoPart(NamedTuple):
    """A video in a message: its pictures are so many consecutive ones of the sample's list of images."""

    first: int
    pictures: int


class Message(NamedTuple):
    """One turn: a role of `ROLES` and its parts in order."""

    role: str
    parts: tuple[str | ImagePart | VideoPart, ...]


class Needs(NamedTuple):
    """What a sample asks of a row: tokens, views, and the patches of its largest view."""

    tokens: int
    views: int
    patches: int


def needs_of(tokens: int, plans: Sequence[Plan]) -> Needs:
    """What a sample of so many tokens asks of a row, with images that are seen so."""
    views = [view.patch_grid.area for plan in plans for view in plan.views]
    return Needs(tokens, len(views), max(views, default=0))


@dataclasses.dataclass(frozen=True)
class EncodedSample:
    """A sample as ids, before it has a place in a row. T is its own length."""

    tokens: np.ndarray  # int32[T]: text ids; the placeholder id where visual tokens go
    trained: np.ndarray  # bool[T]: predicting this token is trained
    view: np.ndarray  # int32[T]: -1 for text, else number of the view over all images of the sample
    view_token: np.ndarray  # int32[T]: token inside that view; 0 for text
    plans: tuple[Plan, ...]  # one per image

    @functools.cached_property
    def needs(self) -> Needs:
        """What this sample asks of a row."""
        return needs_of(len(self.tokens), self.plans)


class _Mark(NamedTuple):
    """One token that steers the model, never made from text."""

    name: str


class _Block(NamedTuple):
    """A visual block as ids. N is its length."""

    tokens: np.ndarray  # int32[N]
    view: np.ndarray  # int32[N]: -1 for marks, else number of the view
    view_token: np.ndarray  # int32[N]: token inside that view; 0 for marks

    def of_view(self, first: int) -> _Block:
        """The block of an image whose first view has this number."""
        return self._replace(view=np.where(self.view >= 0, self.view + first, -1)) if first else self


_Item = str | _Mark | _Block
_Piece = tuple[_Item, bool]  # and whether it is trained
_Blocks = dict[ImagePart | VideoPart, list[_Item]]


def encode_chat(
    messages: Sequence[Message],
    plans: Sequence[Plan],
    tokenizer: Tokenizer,
    chat: ChatConfig,
    generate: bool = False,
    thinking: bool | None = None,
) -> EncodedSample:
    """Encodes a conversation in the prompt form `chat.template`.

    In a turn, visual blocks and stripped texts are joined by newlines. Trained are the answers with the mark of their
    end, `chat.turn_end`. The first token of a sample is never trained: nothing predicts it.

    "chatml": the empty think block that `chat.empty_think` puts before the last answer is not trained, and left out
    where that answer begins with a thought of its own; tags around such a thought are marks if the tokenizer has them.
    With `chat.train_turn_marks` also trained are the headings of answers and, everywhere outside visual blocks, turn
    marks and newlines; and the sample ends with a newline. So does the released v2 code for Qwen2.
    "plain", for stages of captions: one turn with images and one answer, of which caption and newline are trained. The
    user's texts and `chat.system` are left out.
    "jinja": trained are the answers' texts and the mark of their end that follows.

    Args:
      messages: the turns. `chat.system` becomes a first turn unless they begin with a system turn.
      plans: one per image or picture of a video, in the order in which the messages show them.
      tokenizer: must have every mark of `chat` that is needed.
      chat: the strings around text and images.
      generate: the sequence ends where the next answer begins; nothing is trained.
      thinking: with `generate` and the forms "chatml" and "jinja", whether the answer is to be thought about first;
        None: as the checkpoint has it.

    Raises:
      ChatError: an unknown role, an image shown not exactly once, in order, and outside answers, turns for which the
        prompt form has no place, or `generate` after an answer.
      ConfigError: as of `visual_block`.
      TokenizerError: the tokenizer lacks a mark, or a separator is not one id.
    """
    _check(messages, plans, generate)
    if chat.system and messages[0].role != "system" and chat.template != "plain":
        messages = (Message("system", (chat.system,)), *messages)
    blocks = _blocks(messages, plans, tokenizer, chat)
    if chat.template == "jinja":
        pieces = _templated(messages, blocks, tokenizer, chat, generate, thinking)
    else:
        if thinking is not None:
            chat = dataclasses.replace(chat, empty_think=not thinking)
        pieces = _TEMPLATES[chat.template](messages, blocks, chat, generate)
        if chat.template == "chatml" and tokenizer.has(THINK_START) and tokenizer.has(THINK_END):
            pieces = _with_thoughts(pieces)
    if generate:
        pieces = ((item, False) for item, _ in pieces)
    return _to_ids(pieces, plans, tokenizer, chat)


def visual_places(plans: Sequence[Plan], chat: ChatConfig) -> tuple[np.ndarray, np.ndarray]:
    """Which visual token stands at which placeholder, for the images of a sample in the order of its text.

    Returns:
      int32[N] number of the view over all images, and int32[N] token inside that view.
    """
    places = []
    for number, plan in enumerate(plans):
        runs = [part for part in visual_block(plan, chat, number) if isinstance(part, ViewRun)]
        first = sum(len(before.views) for before in plans[:number])
        places += [(first + run.view, run.start + token) for run in runs for token in range(run.tokens)]
    view, view_token = np.array(places, np.int32).reshape(-1, 2).T
    return view, view_token


def _check(messages: Sequence[Message], plans: Sequence[Plan], generate: bool) -> None:
    if not messages:
        raise ChatError("a conversation without messages")
    for message in messages:
        if message.role not in ROLES:
            raise ChatError(f"role {message.role!r} is not one of {ROLES}")
        if message.role != "user" and any(not isinstance(part, str) for part in message.parts):
            raise ChatError(f"only user messages can hold images, not the role {message.role!r}")
    shown = [index for message in messages for part in message.parts for index in shown_images(part)]
    if shown != list(range(len(plans))):
        raise ChatError(
            f"messages show the images {shown}, but there are {len(plans)} images; each must be shown once, in order"
        )
    if generate and messages[-1].role == "assistant":
        raise ChatError("the last message is an answer already; nothing to generate")


def shown_images(part: str | ImagePart | VideoPart) -> Sequence[int]:
    """The images of a sample, by index, that a part of a message shows."""
    if isinstance(part, str):
        return ()
    return (part.index,) if isinstance(part, ImagePart) else range(part.first, part.first + part.pictures)


def _chatml(messages: Sequence[Message], blocks: _Blocks, chat: ChatConfig, generate: bool) -> Iterator[_Piece]:
    think = (_Mark(THINK_START), "\n\n", _Mark(THINK_END), "\n\n") if chat.empty_think else ()
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    for number, message in enumerate(messages):
        trained = message.role == "assistant"
        if number > 0:
            yield "\n", False
        yield from _all((_Mark(chat.turn_start), f"{message.role}\n"), trained and chat.train_turn_marks)
        content = _content(message, blocks, chat)
        thinks = trained and content and _THOUGHT.match(content[0])
        if [number] == answers[-1:] and not generate and not thinks:
            yield from _all(think, False)
        yield from _all((*content, _Mark(chat.turn_end)), trained)
    if generate:
        opening = (_Mark(THINK_START), "\n") if chat.open_think else ()
        yield from _all(("\n", _Mark(chat.turn_start), "assistant\n", *(think or opening)), False)
    elif chat.train_turn_marks:
        yield "\n", True


def _with_thoughts(pieces: Iterable[_Piece]) -> Iterator[_Piece]:
    """The tags around the thought that an answer begins with, as marks."""
    for item, trained in pieces:
        found = _THOUGHT.match(item) if trained and isinstance(item, str) else None
        if found:
            thought, rest = found.groups()
            yield from _all((_Mark(THINK_START), thought, _Mark(THINK_END), rest), True)
        else:
            yield item, trained


def _vicuna(messages: Sequence[Message], blocks: _Blocks, chat: ChatConfig, generate: bool) -> Iterator[_Piece]:
    for number, message in enumerate(messages):
        content = _content(message, blocks, chat)
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


def _plain(messages: Sequence[Message], blocks: _Blocks, chat: ChatConfig, generate: bool) -> Iterator[_Piece]:
    roles, needed = [message.role for message in messages], ["user"] if generate else ["user", "assistant"]
    if roles != needed or not blocks:
        raise ChatError(
            f"the template 'plain' needs the turns {needed} and at least one image, "
            f"not {roles} and {len(blocks)} images"
        )
    images = [part for part in messages[0].parts if not isinstance(part, str)]
    if generate and any(part.strip() for part in messages[0].parts if isinstance(part, str)):
        raise ChatError("the template 'plain' has no place for a question; ask with an empty text")
    yield from _all(_content(Message("user", tuple(images)), blocks, chat), False)
    if not generate:
        yield from _all((*_content(messages[1], blocks, chat), "\n"), True)


def _templated(
    messages: Sequence[Message],
    blocks: _Blocks,
    tokenizer: Tokenizer,
    chat: ChatConfig,
    generate: bool,
    thinking: bool | None,
) -> Iterator[_Piece]:
    """The tokenizer's own template; its marks for images and videos stand for them one after the other."""
    if not tokenizer.chat_template:
        raise TokenizerError(
            f"tokenizer {tokenizer.name}: has no chat_template.jinja; add it or set config.model.chat.template"
        )
    kinds = {ImagePart: chat_template.Visual("image"), VideoPart: chat_template.Visual("video")}
    turns = [
        chat_template.Turn(message.role, tuple(kinds.get(type(part), part) for part in message.parts))
        for message in messages
    ]
    variables = {} if thinking is None else {"enable_thinking": thinking}
    try:
        rendered = chat_template.render(tokenizer.chat_template, turns, generate, variables)
    except chat_template.TemplateError as error:
        raise ChatError(str(error)) from error
    marks = re.compile("(" + "|".join(map(re.escape, tokenizer.marks)) + ")")
    places = {chat.placeholder: ImagePart, chat.video_placeholder: VideoPart}
    waiting = {kind: [part for part in blocks if isinstance(part, kind)] for kind in places.values()}
    answered = False
    for piece in rendered:
        if isinstance(piece, chat_template.Said):
            answered = piece.role == "assistant"
            yield piece.text, answered
            continue
        for index, text in enumerate(marks.split(piece)):
            if index % 2 == 0:
                if text:
                    yield text, False
            elif text in places:
                if not waiting[places[text]]:
                    raise ChatError(f"the tokenizer's chat template has more {text!r} than the messages have images")
                yield from _all(blocks[waiting[places[text]].pop(0)], False)
            else:
                yield _Mark(text), answered and text == chat.turn_end
                answered = False
    if left := sum(map(len, waiting.values())):
        raise ChatError(f"the tokenizer's chat template leaves out {left} images or videos of the messages")


_TEMPLATES = {"chatml": _chatml, "vicuna_v1": _vicuna, "plain": _plain}


def _all(items: Iterable[_Item], trained: bool) -> Iterator[_Piece]:
    return ((item, trained) for item in items)


def _content(message: Message, blocks: _Blocks, chat: ChatConfig) -> list[_Item]:
    """What a turn says: its visual blocks and stripped texts, joined by newlines."""
    parts = message.parts
    if chat.images_first:
        parts = sorted(parts, key=lambda part: isinstance(part, str))
    items: list[_Item] = []
    for part in parts:
        said = [part.strip()] if isinstance(part, str) else blocks[part]
        if said != [""]:
            items += ["\n", *said] if items else said
    return items


def _blocks(messages: Sequence[Message], plans: Sequence[Plan], tokenizer: Tokenizer, chat: ChatConfig) -> _Blocks:
    """The visual blocks of all images and videos, each kind numbered from 0 in the order of the messages."""
    parts = [part for message in messages for part in message.parts if not isinstance(part, str)]
    first_views = tuple(itertools.accumulate((len(plan.views) for plan in plans), initial=0))
    blocks: _Blocks = {}
    counts = {ImagePart: itertools.count(), VideoPart: itertools.count()}
    for part in parts:
        number = next(counts[type(part)])
        if isinstance(part, ImagePart):
            block = _block(plans[part.index], chat, number, chat.placeholder, tokenizer)
            blocks[part] = [block.of_view(first_views[part.index])]
            continue
        # The pictures of a video follow each other with nothing between, behind one id (spec v4 section 5).
        with_id = chat.layout == "v4" and chat.use_image_id
        start = [_Mark(chat.image_id_start), str(number), _Mark(chat.image_id_end)] if with_id else []
        plain = dataclasses.replace(chat, use_image_id=False)
        pictures = [
            _block(plans[index], plain, number, chat.video_placeholder, tokenizer).of_view(first_views[index])
            for index in shown_images(part)
        ]
        blocks[part] = [*start, *pictures]
    return blocks


@functools.lru_cache(maxsize=512)  # most images of a data set share a few plans
def _block(plan: Plan, chat: ChatConfig, number: int, placeholder: str, tokenizer: Tokenizer) -> _Block:
    """The visual block of an image, its views numbered from 0."""
    names = (chat.image_start, chat.image_end, chat.slice_start, chat.slice_end, chat.image_id_start, chat.image_id_end)
    marks = re.compile("(" + "|".join(map(re.escape, names)) + ")")
    columns: list[tuple[int, int, int]] = []
    for part in visual_block(plan, chat, number):
        if isinstance(part, ViewRun):
            filler = tokenizer.special(placeholder)
            columns += [(filler, part.view, part.start + token) for token in range(part.tokens)]
        elif isinstance(part, Separator):
            columns.append((_separator_id(part, tokenizer, chat), -1, 0))
        else:
            for text in filter(None, marks.split(part)):
                ids = [tokenizer.special(text)] if text in names else tokenizer.encode(text)
                columns += [(i, -1, 0) for i in ids]
    return _Block(*np.array(columns, np.int32).reshape(-1, 3).T.copy())


def _to_ids(pieces: Iterable[_Piece], plans: Sequence[Plan], tokenizer: Tokenizer, chat: ChatConfig) -> EncodedSample:
    always: list[int] = []  # trained in every turn
    if chat.template == "chatml" and chat.train_turn_marks:
        newline = _single_id("\n", tokenizer, "switch config.model.chat.train_turn_marks off")
        always = [newline, tokenizer.special(chat.turn_start), tokenizer.special(chat.turn_end)]
    encoded: list[tuple[Sequence[int], bool]] = [([tokenizer.special(chat.bos)], False)] if chat.bos else []
    blocks: dict[int, _Block] = {}  # by their place in `encoded`
    texts: list[tuple[str, bool]] = []  # that follow each other
    joined = chat.template == "vicuna_v1"
    for item, is_trained in pieces:
        if isinstance(item, str):
            texts.append((item, is_trained))
            continue
        if texts:
            encoded += _text_ids(texts, tokenizer, joined)
            texts = []
        if isinstance(item, _Mark):
            encoded.append(([tokenizer.special(item.name)], is_trained))
        else:
            blocks[len(encoded)] = item
            encoded.append((item.tokens, False))
    encoded += _text_ids(texts, tokenizer, joined)
    ids, flags = [one for one, _ in encoded], [is_trained for _, is_trained in encoded]
    lengths = [len(one) for one in ids]
    tokens = np.concatenate(ids, dtype=np.int32, casting="unsafe") if ids else np.zeros(0, np.int32)
    trained = np.repeat(np.array(flags, bool), lengths)
    view, view_token = np.full(len(tokens), -1, np.int32), np.zeros(len(tokens), np.int32)
    starts = list(itertools.accumulate(lengths, initial=0))
    for number, block in blocks.items():
        place = slice(starts[number], starts[number + 1])
        view[place], view_token[place] = block.view, block.view_token
    if always:
        outside = np.repeat([number not in blocks for number in range(len(ids))], lengths)
        trained |= outside & np.isin(tokens, always)
    trained[:1] = False
    return EncodedSample(tokens, trained, view, view_token, tuple(plans))


def _text_ids(
    pieces: Sequence[tuple[str, bool]], tokenizer: Tokenizer, joined: bool
) -> Iterator[tuple[Sequence[int], bool]]:
    """Ids of texts that follow each other, apart by whether they are trained.

    Those alike are encoded as one, as a tokenizer that reads the whole prompt would. With `joined` all are: a
    sentencepiece vocabulary has the space before an answer in the answer's first token. What two encodings have in
    common at their beginning then belongs to the shorter text.
    """
    if len(pieces) > 1:
        groups = itertools.groupby(pieces, lambda piece: piece[1])
        pieces = [("".join(text for text, _ in group), flag) for flag, group in groups]
    if not joined or not pieces:
        yield from ((tokenizer.encode(text), flag) for text, flag in pieces)
        return
    texts = pieces
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
