"""How a benchmark is asked: the settings under which the papers' scores were made, by name.

Sources: spec v1-v2 sections 1.4 and 8.1, spec v4 section 1.2; MiniCPM-V 4.6's settings are those of VLMEvalKit's class
`MiniCPM_V_4_6`. Every value can be replaced on the command line.
"""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from PIL import Image

from uhd_jax.evaluation.benchmarks import Kind
from uhd_jax.evaluation.samples import IMAGE_MARK, LETTERS, Sample

Prompts = Literal["llava", "minicpm", "minicpm_steps", "minicpm_4_6", "minicpm_4_6_steps", "bare"]

UPSIZE_AREA = 1344**2  # pixels, up to which a small image is enlarged by chance


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one benchmark is asked. Its fields are kept with the answers, and must be equal to go on from them."""

    prompts: Prompts = "llava"
    max_slices: int | None = None  # None: the model's
    long_side: int = 0  # pixels of the longer side, to which an image is resized before slicing; 0: as it is
    upsize: bool = False  # an image below 1344 x 1344 pixels is enlarged to a random width, up to that area
    beams: int = 1
    temperature: float = 0.0
    max_new_tokens: int = 64
    mode: str | None = None  # "16x" or "4x"; None: the model's
    repetition_penalty: float = 1.0
    thinking: bool | None = None  # whether the model thinks first; None: its habit


_SHORT = 128  # new tokens of LLaVA's loader
_LONG = 1024
_V1_BEAMS = {"vqav2": 3, "gqa": 3, "textvqa": 3, "vizwiz": 3, "scienceqa": 3, "mme": 5}
_V2_BEAMS = _V1_BEAMS | {"refcoco": 3, "ocrbench": 3, "mmmu": 3, "mmbench": 3, "mmstar": 3}
_V2_NATIVE = ("ai2d", "ocrbench", "mmmu", "mmbench", "mmstar")
_V46_STEPS = ("mmmu", "mmstar", "ocrbench", "mmbench", "ai2d")
_V46_UPSIZE = (*_V46_STEPS, "chartqa", "textvqa", "docvqa")
_V4_STEPS = ("mmmu", "mmstar", "ocrbench", "chartqa")  # asked to think step by step, and with enlarged images


def _v1(benchmark: str) -> Settings:
    return Settings(
        max_slices=7,
        long_side=0 if benchmark == "mmbench" else 1024,
        beams=_V1_BEAMS.get(benchmark, 1),
        max_new_tokens=_LONG if benchmark in ("scienceqa", "mmbench") else _SHORT,
    )


def _v2(benchmark: str) -> Settings:
    side = 1536 if benchmark == "textvqa" else 1024
    return Settings(
        max_slices=9,
        long_side=0 if benchmark in _V2_NATIVE else side,
        beams=_V2_BEAMS.get(benchmark, 1),
        max_new_tokens=_LONG if benchmark in ("scienceqa", *_V2_NATIVE[1:]) else _SHORT,
    )


def _v4(benchmark: str) -> Settings:
    steps = benchmark in _V4_STEPS
    return Settings(
        "minicpm_steps" if steps else "minicpm", 9, upsize=steps, beams=3, max_new_tokens=2048 if steps else _LONG
    )


def _v46(benchmark: str) -> Settings:
    return Settings(
        "minicpm_4_6_steps" if benchmark in _V46_STEPS else "minicpm_4_6",
        max_slices=9,
        upsize=benchmark in _V46_UPSIZE,
        beams=3,
        max_new_tokens=8192,
        mode="4x",
        repetition_penalty=1.2,
        thinking=False,
    )


def _v46_thinking(benchmark: str) -> Settings:
    """It samples, so that scores differ from seed to seed; ours is 0."""
    steps = "minicpm_4_6_steps"
    sampled = {"beams": 1, "temperature": 0.7, "repetition_penalty": 1.0, "thinking": True}
    return dataclasses.replace(_v46(benchmark), prompts=steps, upsize=True, **sampled)


PRESETS = {
    "plain": lambda benchmark: Settings(),
    "v1": _v1,
    "v2": _v2,
    "v4": _v4,
    "4.6": _v46,
    "4.6-thinking": _v46_thinking,
}

_WORD = "Answer the question using a single word or phrase."
_LETTER = "Answer with the option's letter from the given choices directly."
_REGION = "Please provide the bounding box coordinate of the region this sentence describes: "
_STEPS_CHOICE = (
    "Carefully read the following multichoice question, solve it step by step and finally pick the option associated "
    'with the correct answer in the format of "Answer: selected option\n\n'
)
_STEPS_SHORT = (
    "Read the following question carefully, solve it step by step, and then output the final answer in the format of "
    '"Answer: single number or single word or phrase".\n\n'
)
_STEPS_TEXT = "Carefully observe the image and answer the OCR-related questions below. \n\n"


def prompt_text(sample: Sample, kind: Kind, prompts: Prompts) -> str:
    """The question as it is put.

    Args:
      sample: the question; where a question file holds the instruction already, it is not repeated.
      kind: of the benchmark.
      prompts: "llava": of LLaVA-1.5's scripts. "minicpm": of MiniCPM-V in VLMEvalKit, and "minicpm_steps" to think step
        by step; the same for 4.6, whose answers are read differently (`final_answer`). "bare": the question and its
        options alone.
    """
    options = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, sample.options, strict=False))
    question = sample.question
    if kind == "box":
        return question if prompts == "bare" else _REGION + question
    if prompts == "bare":
        return f"{question}\n{options}".rstrip("\n") if options else question
    if prompts == "llava":
        if kind == "text":
            return question
        instruction = _LETTER if options or sample.letters else _WORD
        if instruction in question:
            return question
        hint = f"{sample.hint}\n" if sample.hint and sample.hint != "N/A" else ""
        if kind == "yes_no":
            question = re.sub(r"\s*Please answer yes or no\.$", "", question)
        return f"{hint}{question}\n{options}{instruction}"
    hint = f"Hint: {sample.hint}\n" if sample.hint else ""
    if prompts.endswith("_steps"):
        lead = _STEPS_CHOICE if options or sample.letters else _STEPS_TEXT if kind == "text" else _STEPS_SHORT
        return f"{lead}{hint}{question}\n{options}" if kind == "choice" else lead + question
    if kind == "choice":
        return (
            f"{hint}Question: {question}\nOptions:\n{options}\n{_LETTER}" if options else f"{hint}{question}\n{_WORD}"
        )
    return f"{_WORD}\n{question}" if kind in ("short", "text") else question


def conversation(text: str, images: tuple[Any, ...]) -> list[dict[str, Any]]:
    """A user turn: images first, or at their marks "<image 1>" in the text, each where it is named first."""
    parts: list[dict[str, Any]] = []
    left, placed = 0, set()
    for mark in IMAGE_MARK.finditer(text):
        number = int(mark[1]) - 1
        if number >= len(images) or number in placed:
            continue
        placed.add(number)
        if piece := text[left : mark.start()]:
            parts.append({"type": "text", "text": piece})
        parts.append({"type": "image", "image": images[number]})
        left = mark.end()
    first = [{"type": "image", "image": image} for number, image in enumerate(images) if number not in placed]
    return [{"role": "user", "content": [*first, *parts, {"type": "text", "text": text[left:]}]}]


def final_answer(output: str, kind: Kind, prompts: Prompts) -> str:
    """What an output that was asked to think step by step says last; else the output.

    That is what comes behind the last "Answer:". Of MiniCPM-V 4.6 also "Answer is" and the Chinese for it, and whatever
    was asked, thoughts up to "</think>" are left out, and an <answer> is the answer.
    """
    letter = r"Answer:\s*([A-Ia-i])(?![A-Za-z])"
    if prompts.startswith("minicpm_4_6"):
        letter = r"(?:Answer(?:\s+is|:)|\u7b54\u6848(?:\u662f|\u4e3a)?[:\uff1a]?)\s*([A-Ja-j])(?![A-Za-z])"
        thoughts, mark, said = output.rpartition("</think>")
        output = said.strip() if mark else output
        if found := re.search(r"<answer>(.*?)</answer>", output, re.DOTALL):
            return found[1].strip()
    if not prompts.endswith("_steps") or kind == "text":
        return output
    if kind == "choice":
        found = re.findall(letter, output)
        return found[-1].upper() if found else output
    found = re.search(r"Answer:\s*(.*)\s*$", output, re.DOTALL)
    return found[1] if found else output


def resized(image: np.ndarray, settings: Settings, name: str) -> np.ndarray:
    """An image as the settings want it before it is sliced; bicubic.

    Args:
      image: uint8[H, W, 3].
      settings: how.
      name: of the question and the image, from which the random width of `upsize` follows. (The published code draws
        one after the other, so that there it depends on the order of the questions.)
    """
    height, width = image.shape[:2]
    if settings.long_side:
        long = settings.long_side
        size = (
            (long, max(1, int(long / width * height))) if width > height else (max(1, int(long / height * width)), long)
        )
    elif settings.upsize and width * height < UPSIZE_AREA:
        largest = int(width * math.sqrt(UPSIZE_AREA / (width * height)))
        chosen = random.Random(name).randint(width, largest)
        size = (chosen, int(chosen / width * height))
    else:
        return image
    if size == (width, height):
        return image
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def settings_for(preset: str, benchmark: str, replaced: Mapping[str, Any]) -> Settings:
    """The settings of a preset, with those that are given (not None) replaced."""
    given = {key: value for key, value in replaced.items() if value is not None}
    return dataclasses.replace(PRESETS[preset](benchmark), **given)
