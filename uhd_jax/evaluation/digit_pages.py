"""The embedded task: held-out pages of digits, transcribed and asked about, sliced and from the thumbnail alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from uhd_jax.data.demo import DigitPages, digit_accuracy, digit_frequencies
from uhd_jax.evaluation.benchmarks import Outcome, Scored
from uhd_jax.evaluation.metrics.styles import Style, mean
from uhd_jax.evaluation.presets import Settings, conversation
from uhd_jax.evaluation.samples import Sample

PAGES = 200
BATCH = 50  # pages answered at a time
SEED = 1  # of the held-out pages; training pages come from other digits whatever their seed
SETTINGS = Settings("bare", max_new_tokens=48)

_VIEWS = {"with_slices": None, "thumbnail_only": 1}  # limit of slices


class DigitPagesTask:
    """Transcriptions of pages, then a question about each of as many other pages; all with slices, then all without.

    Args:
      layout: of the model's visual block, which transcriptions mirror.
    """

    name = "digit_pages"

    def __init__(self, layout: str):
        self._layout = layout
        pages: dict[str, Any] = {"split": "held_out", "samples": PAGES, "layout": layout}
        self._sources = {
            "transcription": DigitPages({"task": "page", "seed": SEED, **pages}),
            "question": DigitPages({"task": "questions", "seed": SEED + 1, **pages}),
        }
        # Alike within a batch, yet every kind of prompt among the first few dozen, for who limits their number.
        groups = [range(start, min(start + 8, PAGES)) for start in range(0, PAGES, 8)]
        self._rows = [
            (kind, views, page) for group in groups for kind in self._sources for views in _VIEWS for page in group
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        """Which page, how it is asked about, and how it is seen."""
        kind, views, page = self._rows[index]
        return f"digit_pages: {kind} of page {page}, {views}"

    def sample(self, index: int) -> Sample:
        """One page with one question."""
        kind, views, page = self._rows[index]
        source = self._sources[kind]
        question, answer = source.messages(page)[:2]
        return Sample(
            id=f"{kind}/{page}/{views}",
            question=question.parts[-1],
            images=tuple(source.images(page)),
            answers=(answer.parts[0],),
            category=kind,
            details={"views": views, "page": page},
            max_slices=_VIEWS[views],
        )

    def prompt(self, sample: Sample) -> str:
        """The question."""
        return sample.question

    def conversation(self, sample: Sample, prompt: str, images: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """A user turn."""
        return conversation(prompt, tuple(images))

    def score(self, sample: Sample, output: str, style: Style) -> Outcome:
        """Of a transcription the share of digits in the right place, of a question whether the answer is exact."""
        if sample.category == "transcription":
            right, total = digit_accuracy(output, sample.answers[0], self._layout)
            return Outcome(right / total, output.strip())
        return Outcome(float(output.strip() == sample.answers[0]), output.strip())

    def summarise(self, scored: Sequence[Scored], style: Style) -> dict[str, Any]:
        """The scores.

        Returns:
          accuracy_with_slices, accuracy_thumbnail_only: share of a page's digits that the transcription has in the
            right place, over all digits of all pages; the same pages, once sliced as the model is configured, once as
            the thumbnail alone.
          chance: the share that the best constant answer gets, the commonest digit of the held-out split.
          questions_with_slices, questions_thumbnail_only: share of questions (one per page) answered exactly.
          questions_chance: the share that the best constant answer to each kind of question gets.
          pages, digits: how many.
          answers: for every prompt the question, the expected answer and both answers.
        """
        records: dict[tuple[str, int], dict[str, str]] = {}
        for sample, outcome in scored:
            key = (sample.category, sample.details["page"])
            new = {"kind": sample.category, "question": sample.question, "expected": sample.answers[0]}
            records.setdefault(key, new)[sample.details["views"]] = outcome.parsed
        pages = [record for record in records.values() if record["kind"] == "transcription"]
        asks = [record for record in records.values() if record["kind"] == "question"]
        return {
            **{f"accuracy_{views}": self._digits_right(pages, views) for views in _VIEWS},
            "chance": float(digit_frequencies("held_out").max()),
            **{
                f"questions_{views}": mean([float(ask[views] == ask["expected"]) for ask in asks if views in ask])
                for views in _VIEWS
            },
            "questions_chance": _constant_answer(asks) if asks else float("nan"),
            "pages": len(pages),
            "digits": sum(digit_accuracy("", page["expected"], self._layout)[1] for page in pages),
            "answers": list(records.values()),
        }

    def save_page(self, path: Path) -> None:
        """Saves the largest of the first pages, so that the picture has slices to show."""
        source = self._sources["transcription"]
        largest = max(range(20), key=lambda index: np.prod(source.sizes(index)[0]))
        Image.fromarray(source.images(largest)[0]).save(path)

    def _digits_right(self, pages: Sequence[dict[str, str]], views: str) -> float:
        counts = [digit_accuracy(page[views], page["expected"], self._layout) for page in pages if views in page]
        return float(sum(right for right, _ in counts) / sum(total for _, total in counts)) if counts else float("nan")


def _constant_answer(asks: Sequence[dict[str, str]]) -> float:
    """Best share of exact answers that one fixed answer per kind of question can reach."""
    by_kind: dict[str, list[str]] = {}
    for ask in asks:
        kind = "".join(c for c in ask["question"] if not c.isdigit())
        by_kind.setdefault(kind, []).append(ask["expected"])
    return sum(max(map(expected.count, expected)) for expected in by_kind.values()) / len(asks)
