"""Tasks by name: the benchmarks read from files, and the embedded pages of digits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from uhd_jax.config import ImageLimits
from uhd_jax.evaluation.benchmarks import BENCHMARKS, Outcome, Scored
from uhd_jax.evaluation.metrics.styles import Style
from uhd_jax.evaluation.presets import Prompts, conversation, final_answer, prompt_text
from uhd_jax.evaluation.samples import Benchmarked, Sample
from uhd_jax.evaluation.tables import Tables, by_key


class BenchmarkTask:
    """A benchmark read from its files.

    Args:
      name: one of `BENCHMARKS`.
      data: its files (`Tables`).
      prompts: how it is put.
      images: folder of the images; None for that of each file.
      annotations: files with the references, found by question_id.
      limits: of images.
    """

    def __init__(
        self,
        name: str,
        data: Sequence[str | os.PathLike],
        prompts: Prompts,
        images: str | os.PathLike | None = None,
        annotations: Sequence[str | os.PathLike] = (),
        limits: ImageLimits = ImageLimits(),
    ):
        self.name, self._prompts, self._benchmark = name, prompts, BENCHMARKS[name]
        answers = by_key(annotations, "question_id") if annotations else None
        self._samples = Benchmarked(Tables(data), self._benchmark.read, images, answers, limits)

    def __len__(self) -> int:
        return len(self._samples)

    def where(self, index: int) -> str:
        """The file and the row in it."""
        return self._samples.where(index)

    def sample(self, index: int) -> Sample | None:
        """One question; None of a row that is not of the benchmark. Raises `SourceError`."""
        return self._samples.sample(index)

    def prompt(self, sample: Sample) -> str:
        """The question as it is put."""
        return prompt_text(sample, self._benchmark.kind, self._prompts)

    def conversation(self, sample: Sample, prompt: str, images: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """A user turn."""
        return conversation(prompt, tuple(images))

    def score(self, sample: Sample, output: str, style: Style) -> Outcome:
        """What an output is worth; of one that thought step by step, what it says last."""
        return self._benchmark.score(sample, final_answer(output, self._benchmark.kind, self._prompts), style)

    def summarise(self, scored: Sequence[Scored], style: Style) -> dict[str, Any]:
        """The scores."""
        return {"samples": len(scored)} | self._benchmark.summarise(scored, style)
