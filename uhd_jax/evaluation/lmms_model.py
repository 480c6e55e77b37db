"""The model as lmms-eval calls it: `lmms_eval --model uhd_jax --model_args checkpoint=DIR`.

Imported by lmms-eval alone, which must be installed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.model import lmms

import uhd_jax
from uhd_jax.evaluation.presets import Settings, resized
from uhd_jax.evaluation.runner import EvaluationError, generation
from uhd_jax.slicing.image_io import open_image

_DEFAULT_NEW_TOKENS = 1024  # of tasks that do not say


class UhdJax(lmms):
    """A chat model: conversations with images and videos in, text out.

    Args:
      checkpoint: folder of a training run, of a model, or of a whole model in a PyTorch layout.
      batch_size: questions answered together.
      max_slices: slices per image; None for the model's.
      mode: "16x" or "4x"; None for the model's.
      long_side: pixels of the longer side, to which images are resized before slicing; 0: as they are.
      upsize: images below 1344 x 1344 pixels are enlarged by chance, as MiniCPM-V is evaluated.
      device, max_batch_size: given by lmms-eval, and not used.
    """

    is_simple = False

    def __init__(
        self,
        checkpoint: str,
        batch_size: int | str = 1,
        max_slices: int | None = None,
        mode: str | None = None,
        long_side: int = 0,
        upsize: bool = False,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        self._model = uhd_jax.load(checkpoint)
        self._batch_size = int(batch_size)
        self._max_slices = max_slices
        self._settings = Settings(mode=mode, long_side=long_side, upsize=upsize)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests; those of equal options are answered together."""
        answers: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            *_, options, _, _, _ = request.args
            groups.setdefault(json.dumps(options, sort_keys=True, default=str), []).append(number)
        for numbers in groups.values():
            for start in range(0, len(numbers), self._batch_size):
                batch = numbers[start : start + self._batch_size]
                asked = [self._conversation(requests[number].args) for number in batch]
                *_, options, _, _, _ = requests[batch[0]].args
                for number, answer in zip(batch, self._generate(asked, options), strict=True):
                    answers[number] = answer
        return answers

    def _conversation(self, arguments: Sequence[Any]) -> list[dict[str, Any]]:
        *_, to_messages, _, row, task, split = arguments
        place = f"{task}/{split}/{row}"
        messages = to_messages(self.task_dict[task][split][row])
        return [
            {
                "role": one["role"],
                "content": [self._part(part, f"{place}/{n}") for n, part in enumerate(one["content"])],
            }
            for one in messages
        ]

    def _part(self, part: Mapping[str, Any], name: str) -> dict[str, Any]:
        kind = part["type"]
        if kind == "text":
            return dict(part)
        if kind == "image":
            image = open_image(part["url"], self._model.config.slicing.limits)
            return {"type": "image", "image": resized(image, self._settings, name)}
        if kind == "video":
            return {"type": "video", "video": part["url"]}
        raise EvaluationError(f"{name}: this model takes no {kind}")

    def _generate(self, asked: list[Any], options: Mapping[str, Any]) -> list[str]:
        sampling = options.get("do_sample", True) and options.get("temperature") or 0.0
        settings = Settings(
            beams=int(options.get("num_beams") or 1),
            temperature=float(sampling),
            max_new_tokens=int(options.get("max_new_tokens") or _DEFAULT_NEW_TOKENS),
            mode=self._settings.mode,
            repetition_penalty=float(options.get("repetition_penalty") or 1.0),
        )
        more = {"top_p": float(options["top_p"])} if sampling and options.get("top_p") else {}
        answers = self._model.generate(asked, max_slices=self._max_slices, **generation(settings), **more)
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        return [_until(answer, stops) for answer in answers]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered."""
        raise NotImplementedError("uhd_jax answers by generating; choose a task with output_type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("uhd_jax answers one round at a time; choose a task with output_type generate_until")


def _until(answer: str, stops: Sequence[str]) -> str:
    """What stands before the first of the stop strings."""
    places = [place for stop in stops if stop and (place := answer.find(stop)) >= 0]
    return answer[: min(places)] if places else answer
