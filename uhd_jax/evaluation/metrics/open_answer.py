"""MMMU's open questions: numbers and phrases that an answer ends in, compared with the references.

Source: MMMU (Yue et al., 2024), its evaluation's `parse_open_response` and `eval_open`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)

Candidate = str | float


def parse(prediction: str) -> list[Candidate]:
    """What the answer may mean: of each sentence the shortest tail behind a word such as "is", and its numbers."""
    text = prediction.strip().strip(".").lower()
    tails = []
    sentences = re.split(r"\.\s(?=[A-Z])|\n", text)
    for number, sentence in enumerate(sentences, 1):
        indicators = (*_INDICATORS, "=") if number == len(sentences) else _INDICATORS
        found = [sentence.split(word)[-1].strip() for word in indicators if word in sentence]
        # In the published order a shorter tail replaces a longer one, and any replaces an empty one.
        shortest = ""
        for tail in found:
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in _TRIVIAL:
            tails.append(shortest)
    tails = tails or [text]
    numbers = [number for tail in tails for pattern in _NUMBERS for number in re.findall(pattern, tail)]
    candidates: dict[Candidate, None] = {}
    for one in (*tails, *numbers):
        candidates |= dict.fromkeys(_normal(one))
    return list(candidates)


def is_right(candidates: Sequence[Candidate], answers: Sequence[str]) -> bool:
    """Whether a number equals an answer's, or an answer's text stands in a candidate's."""
    wanted = [form for answer in answers for form in _normal(answer)]
    texts = [form for form in wanted if isinstance(form, str)]
    return any(
        any(text in candidate for text in texts) if isinstance(candidate, str) else candidate in wanted
        for candidate in candidates
    )


def _normal(text: str) -> list[Candidate]:
    """A number rounded to hundredths; else the text in lower case, a single letter with a space on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
