"""How fast answers come: the first token of an image and a question, and every further one; alone and several together.

The model has random weights and the byte tokenizer, so any configuration does; answers end by their length.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from uhd_jax.analysis.bench import Timing, measure
from uhd_jax.checkpoint import save_model
from uhd_jax.config import ModelConfig
from uhd_jax.convert.tables import ConvertError
from uhd_jax.convert.transfer import export_model
from uhd_jax.data.tokenizer import byte_tokenizer
from uhd_jax.generation.assistant import Assistant, Prepared
from uhd_jax.generation.request import AnswerOptions
from uhd_jax.generation.visual import VisualCache
from uhd_jax.models import uhd

TOKENS = 33  # of an answer
TOGETHER = 8
QUESTION = "What is this, and what is it for?"

# A prompt, so many times in one batch, each with so many new tokens: their ids, int[rows, tokens].
Answering = Callable[[Prepared, int, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds of one thing, here and there."""

    what: str
    ours: Timing
    theirs: Timing | None

    def to_json(self) -> dict[str, Any]:
        """With ratios: theirs over ours."""
        found = {"what": self.what, **dataclasses.asdict(self.ours), "against": None}
        if self.theirs:
            ratios = {
                "ratio": self.theirs.seconds / self.ours.seconds,
                "cpu_ratio": self.theirs.cpu_seconds / self.ours.cpu_seconds,
            }
            found["against"] = dataclasses.asdict(self.theirs) | ratios
        return found


def measure_generation(config: ModelConfig, rows: int | None, repeats: int, against: str | None) -> dict[str, Any]:
    """Measures answers on the first device.

    Args:
      config: the model.
      rows: answers that go on together; None for `TOGETHER`.
      repeats: of each measurement, after one to warm up.
      against: "torch" for transformers' `generate` on the same weights, in turns with ours.

    Raises:
      BenchError: torch or transformers is missing, or transformers has no model of these parts.
    """
    rows = rows or TOGETHER
    model = random_model(config)
    side = config.slicing.scale_resolution
    image = np.random.default_rng(0).integers(0, 256, (side, 2 * side, 3), np.uint8)
    shown, text = model.prepare(QUESTION, [image]), model.prepare(QUESTION)
    with contextlib.ExitStack() as stack:
        sides: list[Answering] = [ours(model)]
        if against == "torch":
            sides.append(stack.enter_context(theirs(model)))

        said: list[np.ndarray] = [None] * len(sides)
        same = True

        def timed(prepared: Prepared, rows: int, tokens: int) -> list[Timing]:
            nonlocal same

            def call(number: int) -> None:
                said[number] = sides[number](prepared, rows, tokens)

            timings = measure([functools.partial(call, number) for number in range(len(sides))], repeats)
            same &= all(np.array_equal(said[0], other) for other in said)
            return timings

        alone = [timed(shown, 1, tokens) for tokens in (1, TOKENS)]
        together = [timed(text, rows, tokens) for tokens in (1, TOKENS)]
    named = {
        f"first token, {len(shown.plans[0].views)} views and {len(shown.token_ids)} tokens": alone[0],
        "further token": _further(*alone),
        f"first token of {rows}, {len(text.token_ids)} tokens each": together[0],
        f"further token of {rows}": _further(*together),
    }
    speeds = [Speed(what, *timings, *[None] * (2 - len(timings))) for what, timings in named.items()]
    return {"tokens": TOKENS, "rows": rows, "same_tokens": same, "speeds": [speed.to_json() for speed in speeds]}


def random_model(config: ModelConfig) -> Assistant:
    """A model that says something, on the first device."""
    params = jax.jit(uhd.init_params, static_argnums=0)(config, jax.random.key(0))
    return Assistant(config, params, byte_tokenizer())


def ours(model: Assistant) -> Answering:
    """Answers made here; images are encoded anew each time."""

    def answer(prepared: Prepared, rows: int, tokens: int) -> np.ndarray:
        model.encoder.cache = VisualCache()
        requests = model.answer([prepared] * rows, [AnswerOptions(tokens)] * rows, ends=frozenset())
        return np.array([request.tokens for request in requests])

    return answer


@contextlib.contextmanager
def theirs(model: Assistant) -> Iterator[Answering]:
    """Answers of transformers' model with the same weights, exported for it.

    Raises:
      BenchError: as of `measure_generation`.
    """
    from uhd_jax.analysis.bench_torch import BenchError, generator

    with tempfile.TemporaryDirectory() as folder:
        saved, exported = Path(folder) / "saved", Path(folder) / "exported"
        save_model(saved, model.params, model.config)
        (saved / "tokenizer").mkdir()
        model.tokenizer.save(saved / "tokenizer")
        try:
            export_model(saved, exported, "minicpm_v_4_6")
        except ConvertError as error:
            raise BenchError(f"transformers has no whole model like this one: {error}") from error
        yield generator(exported, model.config)


def _further(first: list[Timing], whole: list[Timing]) -> list[Timing]:
    """Of every token after the first."""
    return [
        Timing((b.seconds - a.seconds) / (TOKENS - 1), (b.cpu_seconds - a.cpu_seconds) / (TOKENS - 1))
        for a, b in zip(first, whole, strict=True)
    ]
