"""A checkpoint's own chat template: conversations to prompts as transformers renders them, with Jinja in a sandbox.

What users and models have said does not go through the template: it sees a stand-in for every text. So a mark written
in a text stays text, and which part of the prompt is an answer is known.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

_STAND_IN = re.compile("\ue000(\\d+)\ue001")


class TemplateError(ValueError):
    """The template is no Jinja, or refuses the conversation."""


class Turn(NamedTuple):
    """A role and its parts: texts, or for an image or a video its kind alone."""

    role: str
    parts: tuple[str | Visual, ...]


class Visual(NamedTuple):
    """An image or a video in a turn."""

    kind: str  # "image" or "video"


class Said(NamedTuple):
    """A text of a turn, as it was given."""

    text: str
    role: str


def render(
    template: str, turns: Sequence[Turn], generate: bool, variables: Mapping[str, Any] | None = None
) -> list[str | Said]:
    """What a template makes of a conversation.

    Args:
      template: the Jinja source.
      turns: the conversation.
      generate: the prompt ends where the next answer begins (`add_generation_prompt`).
      variables: further ones of the template, e.g. enable_thinking.

    Returns:
      The prompt in order: pieces that the template wrote, which may hold marks, and texts of the turns.

    Raises:
      TemplateError: see there.
    """
    texts: list[Said] = []
    messages = [{"role": turn.role, "content": _content(turn, texts)} for turn in turns]
    try:
        prompt = compiled(template).render(messages=messages, add_generation_prompt=generate, **(variables or {}))
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise TemplateError(f"the tokenizer's chat template refuses the conversation ({error})") from error
    pieces = _STAND_IN.split(prompt)  # template, number, template, number, .. template
    found = (texts[int(piece)] if index % 2 else piece for index, piece in enumerate(pieces))
    return [piece for piece in found if piece]


def _content(turn: Turn, texts: list[Said]) -> str | list[dict[str, str]]:
    """The parts as the template sees them; the texts are added to `texts`."""
    if all(isinstance(part, str) for part in turn.parts):
        return "".join(_stand_ins(part, turn.role, texts) for part in turn.parts)
    return [
        {"type": "text", "text": _stand_ins(part, turn.role, texts)} if isinstance(part, str) else {"type": part.kind}
        for part in turn.parts
    ]


def _stand_ins(text: str, role: str, texts: list[Said]) -> str:
    """The text behind a stand-in. Blanks at its ends stay, since templates strip them.

    So do the think tags of an answer, since templates leave out what was thought in earlier turns.
    """
    return "".join(_stand_in(piece, role, texts) for piece in _thought_apart(text, role))


def _thought_apart(text: str, role: str) -> Iterator[str]:
    yield from re.split("(</?think>)", text) if role == "assistant" else [text]


def _stand_in(text: str, role: str, texts: list[Said]) -> str:
    core = text.strip()
    if not core or (role == "assistant" and core in ("<think>", "</think>")):
        return text
    texts.append(Said(core, role))
    start = text.index(core)
    return f"{text[:start]}\ue000{len(texts) - 1}\ue001{text[start + len(core) :]}"


@functools.lru_cache(maxsize=8)
def compiled(template: str) -> jinja2.Template:
    """A chat template, ready to be rendered in a sandbox.

    Raises:
      TemplateError: it is no Jinja; names the line.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise TemplateError(f"the tokenizer's chat template is no Jinja: line {error.lineno}: {error}") from None


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks answers for training in transformers; here it only shows what it holds."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> Any:
        """The block's body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False} | options)
