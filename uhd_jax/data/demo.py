"""The embedded dataset: pages of real handwritten digits that must be sliced to be read.

The digits are the 1,797 images of scikit-learn's `load_digits`, split by image, so that no digit image is both in
training and held out. A page is a grid of cells of 56 px with one digit each, at a random place and size on noisy
grey. With views of 112 px a slice holds 2 x 2 cells, and with 16x compression a view becomes four visual tokens: one
per cell in a slice, while the thumbnail's four would have to carry the whole page.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from uhd_jax.config import ConfigError, from_config_dict
from uhd_jax.data.chat import ImagePart, Message
from uhd_jax.slicing import image_io
from uhd_jax.slicing.plan import Grid, Size

CELL = 56  # pixels; a slice of 112 px holds 2 x 2 cells
TRAINING_DIGITS = 1400  # of 1,797; the other 397 are held out
DIGIT_SIDES = (28.0, 40.0)  # pixels

_SPLIT_SEED = 1797
_UPSCALE = 8  # digits are enlarged this much once, and pages are sampled from the enlargements
_GLYPH = 8 * _UPSCALE
_CANVAS = 96  # a glyph with empty margins, into which every sample outside the glyph is clipped

_ROTATION = 0.2  # radians; this and the next two are the bounds of the training pages' augmentation
_SHEAR = 0.2
_STRETCH = 0.12  # of log aspect ratio

TRANSCRIBE = "Transcribe."


@dataclasses.dataclass(frozen=True)
class DigitPagesOptions:
    """Options of the source "digit_pages" (`DataConfig.options`)."""

    task: Literal["cell", "same", "view", "page", "questions", "mixed"] = "page"
    split: Literal["train", "held_out"] = "train"
    shapes: tuple[tuple[int, ...], ...] = (
        (1, 2),
        (2, 1),
        (2, 2),
        (2, 3),
        (3, 2),
    )  # (rows, cols) of slices, evenly drawn
    samples: int = 100_000
    seed: int = 0
    spread: tuple[float, ...] = (1.0, 1.0)  # a page's is drawn from between these; less is easier to read (`_render`)
    layout: Literal["v4", "A", "B"] = "v4"  # of the visual block, which transcriptions mirror (`ChatConfig.layout`)
    questions_per_page: int = 1
    questions_fraction: float = 0.5  # of the samples of task "mixed"; the others transcribe

    def __post_init__(self):
        if not self.shapes or any(len(shape) != 2 or min(shape) < 1 for shape in self.shapes):
            raise ConfigError(f"shapes: {self.shapes} must be pairs (rows, cols) of slices, at least one")
        if self.samples < 1 or self.questions_per_page < 1:
            raise ConfigError("samples, questions_per_page: must be at least 1")
        if not 0 <= self.questions_fraction <= 1:
            raise ConfigError(f"questions_fraction: {self.questions_fraction} is not between 0 and 1")
        if len(self.spread) != 2 or not 0 <= self.spread[0] <= self.spread[1] <= 1:
            raise ConfigError(f"spread: {self.spread} must be two numbers from 0 to 1, the smaller one first")


class _Page(NamedTuple):
    """What stands on a page and what is asked about it."""

    cells: np.ndarray  # int64[rows, cols]: index of the digit image
    turns: tuple[tuple[str, str], ...]  # questions and answers


class DigitPages:
    """Pages of digits with questions and answers; page i is the same in every process and every run.

    Tasks: "cell" a page of one cell, answered by its digit; "same" one view of 2 x 2 images of one digit, answered by
    it; "view" one view of 2 x 2 digits, transcribed; "page" a sliced page, transcribed; "questions" short questions
    about a sliced page; "mixed" both of these.
    """

    def __init__(self, options: DigitPagesOptions | Mapping[str, Any] | None = None):
        self.options = from_config_dict(options or {}, DigitPagesOptions, "data.options")
        self._last: tuple[int, _Page] | None = None  # messages and sizes of a page are asked for one after the other

    def __len__(self) -> int:
        return self.options.samples

    def sizes(self, index: int) -> list[Size]:
        """The size of the one image of a sample; nothing is rendered."""
        rows, cols = self._page(index).cells.shape
        return [Size(rows * CELL, cols * CELL)]

    def messages(self, index: int) -> tuple[Message, ...]:
        """Questions about the page and their answers; the page comes with the first question."""
        messages = []
        for question, answer in self._page(index).turns:
            parts = (question,) if messages else (ImagePart(0), question)
            messages += [Message("user", parts), Message("assistant", (answer,))]
        return tuple(messages)

    def images(self, index: int) -> list[np.ndarray]:
        """The rendered page: uint8[rows * 56, cols * 56, 3]."""
        rng, (least, most) = self._rng(index, 1), self.options.spread
        spread = rng.uniform(least, most) if least < most else most
        return [_render(self._page(index).cells, rng, augment=self.options.split == "train", spread=spread)]

    def files(self, index: int) -> list[bytes]:
        """The page as a PNG file."""
        return [image_io.read_bytes(image) for image in self.images(index)]

    def where(self, index: int) -> str:
        """The sample's number."""
        return f"digit_pages sample {index}"

    def _rng(self, index: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng((self.options.seed, self.options.split == "train", index, purpose))

    def _page(self, index: int) -> _Page:
        last = self._last
        if not last or last[0] != index:
            last = self._last = index, self._draw(index)
        return last[1]

    def _draw(self, index: int) -> _Page:
        options, rng = self.options, self._rng(index, 0)
        images, labels = split_digits(options.split), _digits()[1]

        def choose(among: np.ndarray, *shape: int) -> np.ndarray:
            return among[rng.integers(len(among), size=shape)]

        if options.task == "cell":
            cells = choose(images, 1, 1)
            return _Page(cells, ((TRANSCRIBE, str(labels[cells.item()])),))
        if options.task == "same":
            digit = labels[choose(images).item()]
            return _Page(choose(images[labels[images] == digit], 2, 2), ((TRANSCRIBE, str(digit)),))
        if options.task == "view":
            grid = Grid(1, 1)
        else:
            grid = Grid(*options.shapes[rng.integers(len(options.shapes))])
        cells = choose(images, 2 * grid.rows, 2 * grid.cols)
        digits = labels[cells]
        asks = options.task == "questions" or (options.task == "mixed" and rng.random() < options.questions_fraction)
        if asks:
            return _Page(cells, tuple(_question(digits, rng) for _ in range(options.questions_per_page)))
        return _Page(cells, ((TRANSCRIBE, transcription(digits, options.layout)),))


@functools.cache
def split_digits(split: Literal["train", "held_out"]) -> np.ndarray:
    """Indices of the digit images of a split: int64[1400] or int64[397], read-only; the two never share an image."""
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(_digits()[1]))
    order.setflags(write=False)
    return order[:TRAINING_DIGITS] if split == "train" else order[TRAINING_DIGITS:]


def digit_frequencies(split: Literal["train", "held_out"]) -> np.ndarray:
    """How often each digit occurs in a split: float64[10], summing to 1."""
    labels = _digits()[1][split_digits(split)]
    return np.bincount(labels, minlength=10) / len(labels)


_BETWEEN = {"v4": r"\[", "A": "[,\n]", "B": "\n"}  # what stands between the groups of a transcription


def transcription(digits: np.ndarray, layout: str = "v4") -> str:
    """The answer that mirrors the visual block, digit by digit and mark by mark.

    Layouts "v4" and "A": slices of 2 x 2 digits in raster order, a newline per row of slices; "B": the lines of the
    page.

    Args:
      digits: int[2 * rows, 2 * cols].
      layout: as `ChatConfig.layout`.
    """
    if layout == "B":
        return "\n".join("".join(map(str, line)) for line in digits)
    rows, cols = digits.shape[0] // 2, digits.shape[1] // 2
    slices = digits.reshape(rows, 2, cols, 2).transpose(0, 2, 1, 3).reshape(rows, cols, 4)
    texts = [["".join(map(str, cell)) for cell in row] for row in slices]
    if layout == "A":
        return "\n".join(",".join(row) for row in texts)
    return "\n".join("".join(f"[{text}]" for text in row) for row in texts)


def digit_accuracy(answer: str, expected: str, layout: str = "v4") -> tuple[int, int]:
    """Digits of `expected` that `answer` has at the same place, and digits of `expected`.

    A place is the number of the group (a slice; in layout "B" a line) and the number of the digit in it, so a digit
    that is missing shifts only its own group. Digits too many do not count.
    """

    def places(text: str) -> dict[tuple[int, int], str]:
        groups = enumerate(re.findall(r"\d", part) for part in re.split(_BETWEEN[layout], text))
        return {(number, place): digit for number, found in groups for place, digit in enumerate(found)}

    wanted, found = places(expected), places(answer)
    return sum(found.get(place) == digit for place, digit in wanted.items()), len(wanted)


def _question(digits: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    rows, cols = digits.shape
    row, col, digit = rng.integers(rows), rng.integers(cols), rng.integers(10)
    return (
        (f"What is in row {row + 1}?", "".join(map(str, digits[row]))),
        (f"What is in column {col + 1}?", "".join(map(str, digits[:, col]))),
        (f"What is in row {row + 1}, column {col + 1}?", str(digits[row, col])),
        (f"How many {digit}s?", str((digits == digit).sum())),
    )[rng.integers(4)]


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """float32[1797, 8, 8] in 0..1 and int64[1797] labels; scikit-learn ships the file, nothing is downloaded."""
    from sklearn.datasets import load_digits  # a second to import, and only the demo needs it

    digits = load_digits()
    return (digits.images / 16).astype(np.float32), digits.target


@functools.cache
def _glyphs() -> np.ndarray:
    """uint8[1797, 96, 96]: the digits enlarged to 64 px by cubic interpolation, with empty margins."""
    images, _ = _digits()
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    weights = _cubic_weights(padded.shape[1])
    enlarged = np.einsum("ij,njk,lk->nil", weights, padded, weights, optimize=True)
    return (enlarged.clip(0, 1) * 255).round().astype(np.uint8, order="C")


def _cubic_weights(side: int) -> np.ndarray:
    """float32[side * 8, side]: Catmull-Rom interpolation by the upscaling factor, pixel centres aligned."""
    position = (np.arange(side * _UPSCALE) + 0.5) / _UPSCALE - 0.5
    distance = np.abs(position[:, None] - np.arange(side))
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    return np.where(distance < 1, near, np.where(distance < 2, far, 0)).astype(np.float32)


def _render(cells: np.ndarray, rng: np.random.Generator, augment: bool, spread: float = 1.0) -> np.ndarray:
    """Draws a page: uint8[rows * 56, cols * 56, 3]. Every cell is sampled from its glyph through an affine map.

    With `spread` 1 digits have any size and stand anywhere in their cells; with less they differ less in both and are
    distorted less, until with 0 all are of middle size in the middles of their cells.
    """
    rows, cols = cells.shape
    count = cells.size
    side, place = rng.uniform(*DIGIT_SIDES, count), rng.uniform(0, 1, (2, count))
    side += (1 - spread) * (sum(DIGIT_SIDES) / 2 - side)
    place += (1 - spread) * (0.5 - place)
    centre = side / 2 + place * (CELL - side)
    bound = spread if augment else 0.0
    angle, shear, stretch = rng.uniform(-bound, bound, (3, count)) * np.array([[_ROTATION], [_SHEAR], [_STRETCH]])
    zoom = _GLYPH / side
    (y, x) = (np.arange(CELL) + 0.5 - centre[:, :, None]).astype(np.float32)  # float32[count, 56] each
    # glyph coordinates: rotate, then shear, then stretch
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    tall, wide = np.exp(stretch), np.exp(-stretch)

    def glyph_pixel(of_y: np.ndarray, of_x: np.ndarray) -> np.ndarray:
        part_y = of_y.astype(np.float32)[:, None] * y + _CANVAS / 2
        part_x = of_x.astype(np.float32)[:, None] * x
        pixel = part_y[:, :, None] + part_x[:, None, :]
        return np.clip(pixel, 0, _CANVAS - 1, out=pixel).astype(np.int32)

    source_y = glyph_pixel(cos * tall, -sin * tall)
    source_x = glyph_pixel((sin + shear * cos) * wide, (cos - shear * sin) * wide)
    source_y *= _CANVAS
    source_y += source_x
    source_y += (cells.reshape(-1, 1, 1) * _CANVAS**2).astype(np.int32)
    ink = _glyphs().reshape(-1).take(source_y)
    contrast = rng.uniform(80, 110) * rng.uniform(1 - 0.25 * bound, 1, count)
    ink = ink * (-contrast / 255).astype(np.float32)[:, None, None]
    page = ink.reshape(rows, cols, CELL, CELL).transpose(0, 2, 1, 3).reshape(rows * CELL, cols * CELL)
    page += np.float32(rng.uniform(125, 150))
    page += rng.integers(-12, 13, page.shape, np.int8)
    return np.repeat(page.astype(np.uint8)[:, :, None], 3, axis=2)
