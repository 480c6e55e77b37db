"""One sample as the model will see it: its views, and its text with the trained tokens apart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from uhd_jax.config import BucketConfig
from uhd_jax.data.augment import Alteration
from uhd_jax.data.chat import EncodedSample
from uhd_jax.data.prepare import Prepared, Preparer
from uhd_jax.data.tokenizer import StreamDecoder, Tokenizer
from uhd_jax.data.windows import EMPTY_ANSWER, NO_ANSWER, says_something
from uhd_jax.slicing.viewer import PAGE_WIDTH, draw_slices

SpanKind = Literal["text", "trained", "mark", "visual"]

_ANSI = {"text": "", "trained": "\x1b[30;42m", "mark": "\x1b[2m", "visual": "\x1b[34m"}
_COLUMNS = 72  # of a picture in a terminal
_PAPER, _INK, _MUTED = "#ffffff", "#1f2933", "#616e7c"
_INKS = {"text": _INK, "trained": "#14532d", "mark": "#9aa5b1", "visual": "#1f5fa8"}
_GROUNDS = {"trained": "#bbf7d0", "visual": "#e0edfb"}
_MARGIN, _POINTS = 40, 17
_DRAWN_IMAGES, _DRAWN_LINES = 6, 200  # more are only counted


class Span(NamedTuple):
    """Text that belongs together: of tokens that are all trained, or all not, or a mark, or the place of a view."""

    text: str
    kind: SpanKind
    tokens: int


@dataclasses.dataclass(frozen=True)
class SampleView:
    """A sample as encoded for a stage."""

    where: str
    fits: bool  # into a row; else it is dropped, and this is it with one view per image
    prepared: Prepared
    images: list[np.ndarray]  # uint8[H, W, 3], altered
    spans: tuple[Span, ...]
    dropped: str = ""  # why it is not trained on although it fits; empty: it is
    limited: bool = True  # rows have an end of views: buckets that are planned, or the slots of the stage

    @property
    def encoded(self) -> EncodedSample:
        """The sample as ids."""
        return self.prepared.sample

    def to_json(self) -> dict[str, Any]:
        """JSON types only. `max_slices` is 0 for a sample that is dropped."""
        tokens, views, patches = self.encoded.needs
        limit, rounds = self.prepared.reduction
        return {
            "where": self.where,
            "max_slices": limit if self.fits else 0,
            "dropped": self.dropped,
            "views_limited": self.limited,
            "rounds_cut": rounds,
            "images_cut": self.prepared.first_image,
            "tokens": tokens,
            "trained_tokens": int(self.encoded.trained.sum()),
            "visual_tokens": int((self.encoded.view >= 0).sum()),
            "views": views,
            "largest_view_patches": patches,
            "images": [plan.to_json() for plan in self.encoded.plans],
            "alterations": [alteration.to_json() for alteration in self.prepared.alterations],
            "spans": [span._asdict() for span in self.spans],
        }


def view_sample(preparer: Preparer, sample: int, epoch: int, tokenizer: Tokenizer) -> SampleView:
    """Encodes a sample as it is trained on in an epoch of a stage.

    Args:
      preparer: of the stage.
      sample: number of one, from 0.
      epoch: from 0; decides what chance does to the images.
      tokenizer: of the model.

    Raises:
      SourceError, ImageRefused, ChatError: the sample cannot be used.
    """
    source, stage = preparer.source, preparer.stage
    messages, sizes = source.messages(sample), source.sizes(sample)
    unlimited = 2**31
    own_row = BucketConfig(stage.slots or unlimited, stage.packed_length, unlimited)
    fitted = preparer.prepare(sample, epoch, messages, sizes, stage.buckets or (own_row,))
    prepared = fitted or preparer.smallest(sample, epoch, messages, sizes)
    spans = tuple(_spans(prepared.sample, tokenizer))
    images, limited = preparer.images(prepared), bool(stage.buckets or stage.slots)
    dropped = "" if prepared.sample.trained.any() else NO_ANSWER
    if stage.objective == "language" and not all(map(says_something, messages)):
        dropped = EMPTY_ANSWER
    return SampleView(source.where(sample), fitted is not None, prepared, images, spans, dropped, limited)


def to_text(view: SampleView, colours: bool) -> str:
    """For a terminal. Control characters of the sample come out as escapes.

    Args:
      view: the sample.
      colours: trained tokens stand on green, and the images are drawn in blocks; else [[trained]] stands in brackets.
    """
    lines = [_headline(view), *(f"image {k}: {text}" for k, text in enumerate(_descriptions(view), 1)), ""]
    if colours:
        lines += [_blocks(image) for image in view.images[:_DRAWN_IMAGES]]
    if not colours:
        return "\n".join([*lines, "".join(_bracketed(span) for span in view.spans)])
    painted = (f"{_ANSI[span.kind]}{_printable(span.text)}\x1b[0m" for span in view.spans)
    legend = f"{_ANSI['trained']}trained\x1b[0m, {_ANSI['mark']}mark\x1b[0m, {_ANSI['visual']}visual tokens\x1b[0m"
    return "\n".join([*lines, legend, "", "".join(painted)])


def draw(view: SampleView) -> Image.Image:
    """An RGB picture: image by image with its views, then the text, trained tokens on green."""
    plans = view.encoded.plans
    pages = [_title(view)]
    pairs = list(zip(view.images, plans, strict=True))
    for number, (image, plan) in enumerate(pairs[:_DRAWN_IMAGES], 1):
        altered = _alteration_text(view.prepared.alterations[number - 1])
        pages.append(draw_slices(image, plan, f"Image {number} of {len(plans)}{altered}"))
    if len(pairs) > _DRAWN_IMAGES:
        pages.append(_text_page([[(f"and {len(pairs) - _DRAWN_IMAGES} more images", "mark")]]))
    pages.append(_text_page([_LEGEND, *_wrapped(view.spans, _line_length())]))
    canvas = Image.new("RGB", (PAGE_WIDTH, sum(page.height for page in pages)), _PAPER)
    top = 0
    for page in pages:
        canvas.paste(page, (0, top))
        top += page.height
    return canvas


def _spans(encoded: EncodedSample, tokenizer: Tokenizer) -> Iterator[Span]:
    names = {}
    for image, plan in enumerate(encoded.plans, 1):
        for index in range(len(plan.views)):
            number = index + 1 - (plan.thumbnail is not None)
            overview = "thumbnail" if plan.slices else "whole"
            names[len(names)] = f"image {image} {f'slice {number}' if number else overview}"
    marks = {tokenizer.special(mark) for mark in tokenizer.marks}
    decoder = StreamDecoder(tokenizer, skip_special=False)
    pending: Span | None = None
    last_view = -1
    for token, trained, view in zip(
        encoded.tokens.tolist(), encoded.trained.tolist(), encoded.view.tolist(), strict=True
    ):
        if view >= 0:
            span = Span("" if view == last_view else f"[{names[view]}]", "visual", 1)
        else:
            span = Span(decoder.push(token), "trained" if trained else "mark" if token in marks else "text", 1)
        last_view = view
        if pending and pending.kind == span.kind and (span.kind != "visual" or not span.text):
            pending = Span(pending.text + span.text, span.kind, pending.tokens + 1)
        else:
            if pending:
                yield _finished(pending)
            pending = span
    if pending:
        yield _finished(pending._replace(text=pending.text + decoder.flush()))


def _finished(span: Span) -> Span:
    return span._replace(text=f"{span.text[:-1]}: {span.tokens}]") if span.kind == "visual" else span


def _headline(view: SampleView) -> str:
    numbers = view.to_json()
    fits = f"at most {numbers['max_slices']} slices per image" if view.fits else "DROPPED: too long for every row"
    if rounds := numbers["rounds_cut"]:
        fits += f"; the oldest {f'{rounds} rounds' if rounds > 1 else 'round'} of question and answer cut"
    if view.dropped:
        fits = f"DROPPED: {view.dropped}"
    if not view.limited:
        fits += "\nbuckets are not planned: views unlimited here (uhd-jax data plan)"
    return (
        f"{view.where}\n{numbers['tokens']} tokens, {numbers['visual_tokens']} of them visual and "
        f"{numbers['trained_tokens']} trained; {numbers['views']} view{'s' * (numbers['views'] != 1)}; {fits}"
    )


def _descriptions(view: SampleView) -> Iterator[str]:
    """Of each image: its size, what was done to it, and its slices."""
    for plan, alteration in zip(view.encoded.plans, view.prepared.alterations, strict=True):
        grid = f"{plan.grid} slices (rows x cols)" if plan.slices else "not sliced"
        described = f"{alteration.image} (height x width){_alteration_text(alteration)}"
        yield f"{described}, {grid}, {plan.visual_tokens} visual tokens"


def _alteration_text(alteration: Alteration) -> str:
    resized = f" resized to {alteration.size}" if alteration.size != alteration.image else ""
    compressed = f", JPEG of quality {alteration.jpeg_quality}" if alteration.jpeg_quality else ""
    return f"{resized}{compressed}{', worn as a scan' if alteration.ocr_seed >= 0 else ''}"


def _printable(text: str) -> str:
    """Control characters as escapes: a sample must not steer the terminal."""
    return "".join(c if c == "\n" or c.isprintable() else ascii(c)[1:-1] for c in text)


def _bracketed(span: Span) -> str:
    text = _printable(span.text)
    return f"[[{text}]]" if span.kind == "trained" else text


def _blocks(image: np.ndarray) -> str:
    """An image in half blocks of 24-bit colours, two rows of pixels per line."""
    height, width = image.shape[:2]
    columns = min(_COLUMNS, max(1, round(_COLUMNS * width / height)))
    rows = max(1, round(columns * height / width / 2))
    pixels = np.asarray(Image.fromarray(image).resize((columns, 2 * rows), Image.Resampling.BOX))
    lines = []
    for upper, lower in zip(pixels[::2].tolist(), pixels[1::2].tolist(), strict=True):
        cells = (
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m\u2580"
            for a, b in zip(upper, lower, strict=True)
        )
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines) + "\n"


_Line = list[tuple[str, SpanKind]]
_LEGEND: _Line = [("trained", "trained"), (" ", "text"), ("visual tokens", "visual"), (" mark", "mark")]
_LEGEND += [("   a box is a character that the font of this picture lacks", "mark")]


def _font(points: int) -> ImageFont.FreeTypeFont:
    """Of equal widths; it comes with matplotlib and knows Latin, Greek and Cyrillic letters, not Chinese ones."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSansMono.ttf"), points)


def _line_length() -> int:
    return int((PAGE_WIDTH - 2 * _MARGIN) // _font(_POINTS).getlength("m"))


def _title(view: SampleView) -> Image.Image:
    length = _line_length()
    lines = _headline(view).split("\n")
    lines = [line[start : start + length] for line in lines for start in range(0, len(line), length)]
    return _text_page([[(line, "text")] for line in lines])


def _wrapped(spans: Sequence[Span], length: int) -> list[_Line]:
    """Lines of at most so many characters; a newline is shown as a sign, because it is a token too."""
    lines: list[_Line] = [[]]
    used = 0
    for span in spans:
        for piece in _printable(span.text).replace("\n", "\u21b5\n").splitlines(keepends=True):
            text = piece.rstrip("\n")
            while text:
                if used == length:
                    lines.append([])
                    used = 0
                taken, text = text[: length - used], text[length - used :]
                lines[-1].append((taken, span.kind))
                used += len(taken)
            if piece.endswith("\n"):
                lines.append([])
                used = 0
    if len(lines) > _DRAWN_LINES:
        lines = [*lines[:_DRAWN_LINES], [(f"and {len(lines) - _DRAWN_LINES} more lines", "mark")]]
    return [line for line in lines if line]


def _text_page(lines: Sequence[_Line]) -> Image.Image:
    font = _font(_POINTS)
    step, advance = math.ceil(1.5 * _POINTS), font.getlength("m")
    page = Image.new("RGB", (PAGE_WIDTH, len(lines) * step + _MARGIN), _PAPER)
    canvas = ImageDraw.Draw(page)
    for row, line in enumerate(lines):
        left, top = float(_MARGIN), _MARGIN // 2 + row * step
        for text, kind in line:
            right = left + advance * len(text)
            if kind in _GROUNDS:
                canvas.rectangle((left, top, right - 1, top + step - 3), _GROUNDS[kind])
            for column, character in enumerate(text):  # one by one: every character on its own column
                canvas.text((left + column * advance, top + step / 2 - 2), character, _INKS[kind], font, anchor="lm")
            left = right
    return page
