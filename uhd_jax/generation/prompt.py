"""What a user asks, checked: a question with images and videos, a conversation, or a list of either."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from uhd_jax.data.chat import ImagePart, Message, VideoPart

Image = Any  # whatever `slicing.image_io.open_image` takes: path, bytes, PIL image, uint8 array
Video = Any  # whatever `slicing.video.open_video` takes: path, Video, list of frames
Conversation = Sequence[Mapping[str, Any]]


class PromptError(ValueError):
    """What is asked cannot be answered: no text, too long, or images, ids or limits that do not fit it."""


class Shown(NamedTuple):
    """An image or a video of a prompt, opened: its pictures, uint8[H, W, 3] each."""

    pictures: list[np.ndarray]
    is_video: bool


def is_single(prompt: Any) -> bool:
    """Whether this is one question or one conversation rather than a list of them."""
    return isinstance(prompt, str) or _is_conversation(prompt)


def requests(prompt: Any, images: Any, videos: Any) -> list[tuple[Any, Any, Any]]:
    """Each prompt with its images and videos.

    Raises:
      PromptError: the lists do not fit each other.
    """
    if is_single(prompt):
        return [(prompt, images, videos)]
    if not isinstance(prompt, list | tuple):
        raise PromptError(f"prompt must be text (str) or a list of texts, not {type(prompt).__name__}")
    own = [_of_each(prompt, images, "image"), _of_each(prompt, videos, "video")]
    return list(zip(prompt, *own, strict=True))


def parse(
    prompt: str | Conversation,
    images: Sequence[Image],
    videos: Sequence[Video],
    open_shown: Callable[[Any, bool], list[np.ndarray]],
) -> tuple[list[Message], list[Shown]]:
    """One prompt as messages, and what they show in the order in which they show it.

    Args:
      prompt: a question, before which the images and then the videos stand, or a conversation.
      images: of a question.
      videos: of a question.
      open_shown: opens an image, or a video where its second argument is true.

    Raises:
      PromptError: no text, no conversation, or images given beside one.
    """
    if _is_conversation(prompt):
        if len(images) or len(videos):
            raise PromptError("a conversation has its images and videos in its messages; leave images and videos out")
        turns = [_turn(message, f"message[{index}]") for index, message in enumerate(prompt)]
    else:
        check_text(prompt)
        visuals = [("image", image) for image in as_list(images, "image")]
        visuals += [("video", video) for video in as_list(videos, "video")]
        turns = [("user", [*visuals, ("text", prompt)])]
    messages, shown, count = [], [], 0
    for role, parts in turns:
        placed: list[str | ImagePart | VideoPart] = []
        for kind, value in parts:
            if kind == "text":
                placed.append(value)
                continue
            pictures = open_shown(value, kind == "video")
            shown.append(Shown(pictures, kind == "video"))
            placed.append(VideoPart(count, len(pictures)) if kind == "video" else ImagePart(count))
            count += len(pictures)
        messages.append(Message(role, tuple(placed)))
    return messages, shown


def as_list(sources: Any, kind: str) -> Sequence[Any]:
    """The images or videos of a prompt, which must be a list.

    Raises:
      PromptError: one image is iterable too: an array would be read as a list of its rows, a path as its letters.
    """
    if isinstance(sources, list | tuple):
        return sources
    raise PromptError(f"{kind}s must be a list, not {type(sources).__name__}; for one {kind} write {kind}s=[{kind}]")


def check_text(prompt: Any) -> None:
    """Raises PromptError unless it is text that can be written as UTF-8."""
    if not isinstance(prompt, str):
        raise PromptError(f"a prompt must be text (str), not {type(prompt).__name__}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # what Python makes of a command line's bytes that are not UTF-8
        raise PromptError(
            f"the prompt is not valid Unicode: its character {error.start} is the lone surrogate "
            f"{ascii(prompt[error.start])}; give the prompt in UTF-8"
        ) from None


def _is_conversation(prompt: Any) -> bool:
    return isinstance(prompt, list | tuple) and bool(prompt) and all(isinstance(one, Mapping) for one in prompt)


def _of_each(prompt: Sequence[Any], sources: Any, kind: str) -> Sequence[Any]:
    if not isinstance(sources, list | tuple) or not all(isinstance(own, list | tuple) for own in sources):
        raise PromptError(f"a list of prompts needs a list of {kind}s for each: {kind}s=[[first, second], [], [third]]")
    if sources and len(sources) != len(prompt):
        raise PromptError(f"{len(prompt)} prompts, but {len(sources)} lists of {kind}s")
    return sources or [()] * len(prompt)


def _turn(message: Mapping[str, Any], where: str) -> tuple[str, list[tuple[str, Any]]]:
    """A message as its role and (kind, value) of its parts."""
    if not isinstance(message.get("role"), str) or "content" not in message:
        raise PromptError(f"{where}: needs a role and a content, as in {{'role': 'user', 'content': 'Hello'}}")
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise PromptError(f"{where}.content: a text or a list of parts, not {type(content).__name__}")
    return message["role"], [_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]


def _part(part: Any, where: str) -> tuple[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in ("text", "image", "video"):
        raise PromptError(f"{where}: its type must be text, image or video, not {kind!r}")
    for key in (kind, "path"):
        if part.get(key) is not None and (kind != "text" or key == "text"):
            if kind == "text":
                check_text(part[key])
            return kind, part[key]
    raise PromptError(f"{where}: has no {kind!r}; write {{'type': {kind!r}, {kind!r}: ..}}")
