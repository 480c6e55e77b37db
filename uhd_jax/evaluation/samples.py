"""A question of a benchmark with its references, read from a row of whichever published form."""

from __future__ import annotations

import ast
import base64
import binascii
import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from uhd_jax.config import ImageLimits
from uhd_jax.data.sources.paths import ImageRoot
from uhd_jax.data.sources.protocol import SourceError
from uhd_jax.evaluation.tables import KEY, Row, Tables
from uhd_jax.slicing.plan import ImageRefused

LETTERS = "ABCDEFGHI"
IMAGE_MARK = re.compile(r"<image (\d)>")  # MMMU's, inside questions and options
_SHORTEST_PICTURE = 65  # characters of base64; VLMEvalKit's tables name another row's picture in fewer


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question.

    `images` are paths, bytes or arrays, opened by whoever asks the model. `answers` are the references, for a choice
    the letter; `letters` is how many options the text of the question itself lists. `max_slices` is for tasks that ask
    the same at several resolutions.
    """

    id: str
    question: str
    images: tuple[Any, ...]
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()
    letters: int = 0
    hint: str = ""
    category: str = ""
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    max_slices: int | None = None


# Names that fields have in the published files and in the harnesses' copies of them; the first that a row has counts.
IDS = ("question_id", "questionId", "id", "index", "qid", KEY)
QUESTIONS = ("question", "text", "query", "expression", "sent")
ANSWERS = ("answers", "answer", "label", "labels")
IMAGES = ("image", "image_path", "img_path", "imgname", "image_local_name", "file_name", "imageId", "image_id")
OPTIONS = ("options", "choices")
HINTS = ("hint", "context")
CATEGORIES = ("category", "question_type", "type", "topic", "subject")


class Fields:
    """A row whose fields are asked for by what they mean.

    Args:
      row: of a file.
      folder: of the images.
      limits: of images.
      picture: the base64 of another row, by its index.
      name: of the row where it has no id: its file and number.
    """

    def __init__(
        self, row: Row, folder: str | os.PathLike, limits: ImageLimits, picture: Callable[[str], Any], name: str
    ):
        self.row, self._limits, self._picture, self._name = row, limits, picture, name
        self._folder, self._root = folder, ImageRoot(folder)

    def find(self, names: Sequence[str], default: Any = None) -> Any:
        """The first of the fields that is there and not null."""
        return next((self.row[name] for name in names if self.row.get(name) is not None), default)

    def need(self, names: Sequence[str], what: str) -> Any:
        """As `find`. Raises `SourceError` where there is none."""
        if (found := self.find(names)) is None:
            have = ", ".join(map(str, self.row))
            raise SourceError(f"field {names[0]!r} ({what}) is missing; looked for {', '.join(names)}; has {have:.300}")
        return found

    def id(self) -> str:
        """Of the question; the row's name where the file gives none."""
        return str(self.find(IDS, self._name))

    def text(self, names: Sequence[str], what: str) -> str:
        """A text."""
        value = self.need(names, what)
        if not isinstance(value, str | int | float):
            raise SourceError(f"field {names[0]!r} ({what}): must be a text, not {type(value).__name__}")
        return str(value)

    def answers(self, names: Sequence[str] = ANSWERS) -> tuple[str, ...]:
        """References: a text, a list of texts or of {"answer": ..}, or one written in a cell; () where hidden."""
        value = literal_list(self.find(names))
        if value is None:
            return ()
        values = value if isinstance(value, list) else [value]
        found = [one.get("answer") if isinstance(one, Mapping) else one for one in values]
        if not all(isinstance(one, str | int | float) for one in found):
            raise SourceError(f"field {names[0]!r} (answers): must be texts, not {str(values):.100}")
        return tuple(str(one) for one in found)

    def options(self) -> tuple[str, ...]:
        """Of a choice: a list, a list written in a cell, or the columns A, B, C, .."""
        value = literal_list(self.find(OPTIONS))
        if isinstance(value, list):
            return tuple(str(one) for one in value)
        letters = [letter for letter in LETTERS if letter in self.row]
        return tuple(str(self.row[letter]) for letter in letters)

    def images(self, names: Sequence[str], patterns: Sequence[str]) -> tuple[Any, ...]:
        """The images of a row: of `image`, or `image_1` to `image_9`; a row may have none.

        Args:
          names: of the field.
          patterns: names of the file, with the fields of the row in braces.
        """
        several = [self.row[f"image_{n}"] for n in range(1, 10) if self.row.get(f"image_{n}") is not None]
        value = literal_list(several or self.find(names))
        if value is None or value == "":
            return ()
        values = value if isinstance(value, list) else [value]
        return tuple(self._image(one, patterns) for one in values)

    def _image(self, value: Any, patterns: Sequence[str]) -> Any:
        if isinstance(value, Mapping):  # of Hugging Face: {"bytes": .., "path": ..}
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        text = str(value)
        if len(text) >= _SHORTEST_PICTURE and (picture := _decoded(text)):
            return picture
        names = [text, *(_filled(pattern, self.row) for pattern in patterns)]
        for name in filter(None, names):
            path = self._root.open(name, self._limits.max_bytes)
            if isinstance(path, bytes) or os.path.exists(path):
                return path
        if picture := self._picture(text):
            return self._image(picture, ())
        tried = ", ".join(dict.fromkeys(name for name in names if name))
        raise SourceError(f"its image is not there; looked below {self._folder} for {tried:.300} (see --images)")


def letter(answer: str, options: Sequence[str]) -> str:
    """The letter of a right answer, which files give as letter, number from 0 or text. Raises `SourceError`."""
    letters = LETTERS[: len(options)]
    if len(answer) == 1 and answer.upper() in letters:
        return answer.upper()
    if answer.isdecimal() and int(answer) < len(options):
        return letters[int(answer)]
    if answer in options:
        return letters[list(options).index(answer)]
    raise SourceError(f"field 'answer': {answer!r:.80} is neither a letter of {letters}, nor a number, nor an option")


def literal_list(value: Any) -> Any:
    """A list where a cell of a table or a field of MMMU holds one as text, e.g. "['a', 'b']"; else the value."""
    if not isinstance(value, str) or not (value.startswith("[") and value.endswith("]")):
        return value
    try:
        found = ast.literal_eval(value)  # data only: nothing in it is run
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return value
    return found if isinstance(found, list) else value


def _decoded(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


def _filled(pattern: str, row: Row) -> str | None:
    try:
        return pattern.format_map({key: value for key, value in row.items() if isinstance(value, str | int)})
    except (KeyError, ValueError):
        return None


class Benchmarked:
    """The samples of a benchmark's files, read one by one.

    Args:
      tables: the rows.
      read: makes a sample of a row.
      images: folder that paths of images are relative to; None for that of each file.
      annotations: rows with the references, by question.
      limits: of images.
    """

    def __init__(
        self,
        tables: Tables,
        read: Callable[[Fields, str], Sample | None],
        images: str | os.PathLike | None = None,
        annotations: Mapping[str, Row] | None = None,
        limits: ImageLimits = ImageLimits(),
    ):
        self._tables, self._read, self._images, self._limits = tables, read, images, limits
        self._annotations = annotations
        self._index: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self._tables)

    def where(self, index: int) -> str:
        """The file and the row in it."""
        return self._tables.where(index)

    def sample(self, index: int) -> Sample | None:
        """One sample; None of a row that is not of the benchmark, such as another split's. Raises `SourceError`."""
        row, path = self._tables.row(index), self._tables.path(index)
        try:
            if self._annotations is not None:
                key = str(row.get("question_id"))
                if key not in self._annotations:
                    raise SourceError(f"question {key} has no annotation")
                row = self._annotations[key] | row
            folder = self._images or (path if os.path.isdir(path) else Path(path).parent)
            place = os.path.basename(self._tables.where(index))
            return self._read(Fields(row, folder, self._limits, self._picture, place), path)
        except (SourceError, ImageRefused) as error:
            raise SourceError(f"{self._tables.where(index)}: {error}") from None

    def _picture(self, name: str) -> Any:
        """The picture of the row with this index: tables keep a picture that several rows show once."""
        if self._index is None:
            rows = (self._tables.row(number) for number in range(len(self._tables)))
            self._index = {str(row.get("index")): number for number, row in enumerate(rows)}
        number = self._index.get(name)
        picture = None if number is None else self._tables.row(number).get("image")
        return picture if isinstance(picture, str) and len(picture) >= _SHORTEST_PICTURE else None
