"""From the messages of a request to a conversation with opened images."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import re
from typing import Any

from uhd_jax.config import ImageLimits
from uhd_jax.serving.errors import ApiError
from uhd_jax.serving.fetch import fetch
from uhd_jax.serving.protocol import ChatRequest, Message, TextPart
from uhd_jax.serving.settings import Settings
from uhd_jax.slicing.image_io import open_image
from uhd_jax.slicing.plan import ImageRefused

_DATA = re.compile(r"data:[a-z0-9.+/-]{0,100}(?:;[a-z0-9=.-]{1,100}){0,4};base64,", re.IGNORECASE)


def conversation(request: ChatRequest, settings: Settings, limits: ImageLimits) -> tuple[list[dict[str, Any]], bool]:
    """The messages as `Assistant.prepare` takes them, and whether all images are to be shown as thumbnails alone.

    Raises:
      ApiError: too many images, or one that cannot be used; `param` says which.
    """
    images = [
        (f"messages[{number}].content[{place}].image_url", part.image_url)
        for number, message in enumerate(request.messages)
        if isinstance(message.content, list)
        for place, part in enumerate(message.content)
        if not isinstance(part, TextPart)
    ]
    if len(images) > settings.max_images:
        message = f"{len(images)} images in a request, but at most {settings.max_images} are allowed"
        raise ApiError(400, message, "too_many_images", "messages")
    opened, left = [], settings.max_pixels
    for param, source in images:
        pixels = _open(
            source.url, param, settings, dataclasses.replace(limits, max_pixels=min(limits.max_pixels, left))
        )
        left -= pixels.shape[0] * pixels.shape[1]
        opened.append(pixels)
    low = {source.detail == "low" for _, source in images}
    if len(low) > 1:
        raise ApiError(400, "detail: 'low' for all images or for none", param="messages")
    opened = iter(opened)
    return [_turn(message, opened) for message in request.messages], low == {True}


def _turn(message: Message, opened: Any) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    if not isinstance(message.content, list):
        return {"role": role, "content": message.content or ""}
    parts = [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image", "image": next(opened)}
        for part in message.content
    ]
    return {"role": role, "content": parts}


def _open(url: str, param: str, settings: Settings, limits: ImageLimits) -> Any:
    try:
        return open_image(_read(url, settings), limits)
    except ImageRefused as error:
        raise ApiError(400, f"{param}: {str(error).removeprefix('<bytes>: ')}", "invalid_image", param) from None
    except ApiError as error:
        raise ApiError(error.status, f"{param}: {error.message}", error.code, param) from None


def _read(url: str, settings: Settings) -> bytes:
    match = _DATA.match(url)
    if match:
        try:
            return base64.b64decode(url[match.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise ApiError(400, f"the data URL is not base64 ({error})", "invalid_image_url") from None
    if url[:5].lower() == "data:":
        raise ApiError(400, "a data URL must be base64, as in data:image/png;base64,...", "invalid_image_url")
    if url[:4].lower() == "http" and settings.fetch_hosts:
        return fetch(url, settings)
    raise ApiError(400, "images are taken as data URLs only, as in data:image/png;base64,...", "invalid_image_url")
