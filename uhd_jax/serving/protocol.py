"""Requests for chat completions: which fields there are, what they may hold, and what they mean here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import pydantic

from uhd_jax.config import MODES
from uhd_jax.generation.request import MAX_BEAMS
from uhd_jax.serving.errors import ApiError

Number = Annotated[float, pydantic.Field(allow_inf_nan=False)]
Count = Annotated[int, pydantic.Field(ge=1, le=2**31 - 1)]


_SURROGATE = re.compile("[\ud800-\udfff]")


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class TextPart(_Model):
    """A text."""

    type: Literal["text"]
    text: str


class ImageUrl(_Model):
    """Where an image is: a data URL, or http(s) where the server allows its host. "low" shows the thumbnail alone."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Model):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, pydantic.Field(discriminator="type")]


class Message(_Model):
    """A turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None
    name: str | None = None  # ignored
    # Clients send back what they were answered.
    refusal: str | None = None
    annotations: Annotated[list[Any], pydantic.Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], pydantic.Field(max_length=0)] | None = None


class StreamOptions(_Model):
    """Options of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # ignored


class ProcessorOptions(_Model):
    """The same as `max_slices` and `mode`, as clients of vLLM and SGLang give them for this family."""

    max_slice_nums: Count | None = None
    downsample_mode: Literal[MODES] | None = None


class TemplateOptions(_Model):
    """The same as `thinking`, as clients of vLLM and SGLang give it."""

    enable_thinking: bool | None = None


class ResponseFormat(_Model):
    """Only text can be asked for."""

    type: Literal["text"]


class ChatRequest(_Model):
    """The body of a request. Fields beyond OpenAI's stand at the end."""

    model: str
    messages: Annotated[list[Message], pydantic.Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[Number, pydantic.Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, pydantic.Field(gt=0, le=1)] | None = None
    n: Count | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, pydantic.Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, pydantic.Field(ge=0, le=20)] | None = None
    # Accepted where they ask for nothing.
    frequency_penalty: Annotated[Number, pydantic.Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[Number, pydantic.Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], pydantic.Field(max_length=0)] | None = None
    tools: Annotated[list[Any], pydantic.Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    response_format: ResponseFormat | None = None
    # Ignored: they do not touch the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Beyond OpenAI's.
    top_k: Annotated[int, pydantic.Field(ge=0, le=2**31 - 1)] | None = None
    repetition_penalty: Annotated[Number, pydantic.Field(gt=0, le=100)] | None = None
    max_slices: Count | None = None
    mode: Literal[MODES] | None = None
    thinking: bool | None = None
    beams: Annotated[int, pydantic.Field(ge=1, le=MAX_BEAMS)] | None = None
    length_penalty: Annotated[Number, pydantic.Field(ge=-10, le=10)] | None = None
    early_stopping: bool | None = None
    mm_processor_kwargs: ProcessorOptions | None = None
    chat_template_kwargs: TemplateOptions | None = None

    def either(self, *values: Any, name: str) -> Any:
        """The one of several spellings of an option that is given."""
        given = [value for value in values if value is not None]
        if len(set(given)) > 1:
            raise ApiError(400, f"{name} is given twice, as {given[0]!r} and {given[1]!r}", param=name)
        return given[0] if given else None


def parse_request(body: bytes) -> ChatRequest:
    """The request of a body.

    Raises:
      ApiError: it is no JSON, or a field is unknown, missing, or holds what it may not.
    """
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}", "invalid_json") from None
    try:
        request = ChatRequest.model_validate(value)
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        param = _place(problem["loc"])
        raise ApiError(400, f"{param or 'the body'}: {_words(problem)}", problem["type"], param or None) from None
    if (place := _broken_text(value)) is not None:
        raise ApiError(400, f"{place}: is not valid Unicode: it has a lone surrogate", "invalid_unicode", place)
    if request.stream_options and not request.stream:
        raise ApiError(400, "stream_options: only with stream=true", param="stream_options")
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs: only with logprobs=true", param="top_logprobs")
    return request


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _broken_text(value: Any) -> str | None:
    """Where a text, or a field's name, has half a character. Without recursion, which a body could exhaust."""
    path: list[int | str] = []
    levels = [_items(value)]
    while levels:
        for key, inner in levels[-1]:
            path[len(levels) - 1 :] = [key]
            if any(isinstance(text, str) and _SURROGATE.search(text) for text in (key, inner)):
                return _place(path)
            if isinstance(inner, (dict, list)):
                levels.append(_items(inner))
                break
        else:
            levels.pop()
    return None


def _items(value: dict[str, Any] | list[Any]) -> Iterator[tuple[int | str, Any]]:
    return iter(value.items()) if isinstance(value, dict) else enumerate(value)


def _place(location: Sequence[int | str]) -> str:
    text = ""
    for step in location:
        if isinstance(step, int):
            text += f"[{step}]"
        elif not (text.endswith("]") and step in ("text", "image_url")) and not step.startswith(("list[", "str")):
            text += f".{step}" if text else step
        if len(text) > 200:
            break
    return text[:200].encode("unicode_escape").decode()


def _words(problem: dict[str, Any]) -> str:
    if problem["type"] == "extra_forbidden":
        return "there is no such field here"
    text = problem["msg"][:300].encode("unicode_escape").decode()  # it may quote what was sent
    return text[0].lower() + text[1:]


def finite(value: float) -> float | None:
    """A number as JSON can hold it."""
    return value if math.isfinite(value) else None
