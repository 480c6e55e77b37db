"""The embedded task: held-out pages of digits, transcribed and asked about, sliced and from the thumbnail alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from uhd_jax.data.demo import DigitPages, digit_accuracy, digit_frequencies
from uhd_jax.generation.assistant import Assistant

PAGES = 200
BATCH = 50  # pages answered at a time
SEED = 1  # of the held-out pages; training pages come from other digits whatever their seed


def evaluate(model: Assistant, folder: Path) -> dict[str, Any]:
    """Scores a model on held-out pages, and saves one of them as `folder/page.png`.

    Returns:
      accuracy_with_slices, accuracy_thumbnail_only: share of a page's digits that the transcription has in the right
        place, over all digits of all pages; the same pages, once sliced as the model is configured, once as the
        thumbnail alone.
      chance: the share that the best constant answer gets, the commonest digit of the held-out split.
      questions_with_slices, questions_thumbnail_only: share of questions (one per page) answered exactly.
      questions_chance: the share that the best constant answer to each kind of question gets.
      pages, digits: how many.
      answers: for every prompt the question, the expected answer and both answers.
    """
    layout = model.config.chat.layout
    pages = {"split": "held_out", "samples": PAGES, "layout": layout}
    transcriptions = DigitPages({"task": "page", "seed": SEED, **pages})
    questions = DigitPages({"task": "questions", "seed": SEED + 1, **pages})
    _save_page(transcriptions, folder / "page.png")
    records = []
    for kind, source in (("transcription", transcriptions), ("question", questions)):
        asked = [_question(source, index) for index in range(len(source))]
        images = [source.images(index) for index in range(len(source))]
        sliced = _answers(model, [question for question, _ in asked], images, None)
        thumbnails = _answers(model, [question for question, _ in asked], images, 1)
        records += [
            {"kind": kind, "question": question, "expected": expected, "with_slices": full, "thumbnail_only": small}
            for (question, expected), full, small in zip(asked, sliced, thumbnails, strict=True)
        ]
    pages = [record for record in records if record["kind"] == "transcription"]
    asks = [record for record in records if record["kind"] == "question"]
    return {
        "accuracy_with_slices": _digits_right(pages, "with_slices", layout),
        "accuracy_thumbnail_only": _digits_right(pages, "thumbnail_only", layout),
        "chance": float(digit_frequencies("held_out").max()),
        "questions_with_slices": _exact(asks, "with_slices"),
        "questions_thumbnail_only": _exact(asks, "thumbnail_only"),
        "questions_chance": _constant_answer(asks),
        "pages": len(pages),
        "digits": sum(digit_accuracy("", page["expected"], layout)[1] for page in pages),
        "answers": records,
    }


def _question(source: DigitPages, index: int) -> tuple[str, str]:
    question, answer = source.messages(index)[:2]
    return question.parts[-1], answer.parts[0]


def _save_page(source: DigitPages, path: Path) -> None:
    """Saves the largest of the first pages, so that the picture has slices to show."""
    largest = max(range(20), key=lambda index: np.prod(source.sizes(index)[0]))
    Image.fromarray(source.images(largest)[0]).save(path)


def _answers(
    model: Assistant, questions: Sequence[str], images: Sequence[list[np.ndarray]], max_slices: int | None
) -> list[str]:
    answers: list[str] = []
    for start in range(0, len(questions), BATCH):
        part = slice(start, start + BATCH)
        answers += model.generate(questions[part], images[part], max_new_tokens=48, max_slices=max_slices)
    return answers


def _digits_right(pages: Sequence[dict[str, str]], key: str, layout: str) -> float:
    right, total = np.sum([digit_accuracy(page[key], page["expected"], layout) for page in pages], axis=0)
    return float(right / total)


def _exact(asks: Sequence[dict[str, str]], key: str) -> float:
    return float(np.mean([ask[key].strip() == ask["expected"] for ask in asks]))


def _constant_answer(asks: Sequence[dict[str, str]]) -> float:
    """Best share of exact answers that one fixed answer per kind of question can reach."""
    by_kind: dict[str, list[str]] = {}
    for ask in asks:
        kind = "".join(c for c in ask["question"] if not c.isdigit())
        by_kind.setdefault(kind, []).append(ask["expected"])
    return sum(max(map(expected.count, expected)) for expected in by_kind.values()) / len(asks)
