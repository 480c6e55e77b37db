"""Metrics of free text: edit distance (DocVQA, InfoVQA), relaxed accuracy (ChartQA), exact match (GQA), OCRBench.

Source: spec ecosystem section 2; the papers named at each function.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence

from uhd_jax.evaluation.metrics.styles import MetricError, Style

RECOGNITION = tuple(
    f"{kind} Recognition"
    for kind in ("Regular Text", "Irregular Text", "Artistic Text", "Handwriting", "Digit String", "Non-Semantic Text")
)
FORMULAS = "Handwritten Mathematical Expression Recognition"
OCRBENCH = (*RECOGNITION, "Scene Text-centric VQA", "Doc-oriented VQA", "Key Information Extraction", FORMULAS)


def edit_distance(one: str, other: str) -> int:
    """Levenshtein's: insertions, deletions and substitutions that make one text the other."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        before, row = row, [number]
        for place, sign in enumerate(other, 1):
            row.append(min(before[place] + 1, row[-1] + 1, before[place - 1] + (letter != sign)))
    return row[-1]


def anls(prediction: str, answers: Sequence[str], style: Style = "official", threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of one question (Biten et al., 2019): the best over the answers.

    Texts are compared in lower case, with single spaces. officially a distance is divided by the longer of the two
    texts so compared, and one of the threshold or more gives 0. Both harnesses divide by the length of the texts as
    they came, and one of the threshold exactly still counts.
    """
    if not answers:
        raise MetricError("no reference answers; the split of a hidden test set cannot be scored here")
    best = 1.0
    for answer in answers:
        one, other = (" ".join(text.lower().split()) for text in (answer, prediction))
        longer = max(len(one), len(other)) if style == "official" else max(len(answer.upper()), len(prediction.upper()))
        best = min(best, edit_distance(one, other) / longer if longer else 0.0)
    if style == "official":
        return 1 - best if best < threshold else 0.0
    return 0.0 if 1 - best < threshold else 1 - best


def relaxed_accuracy(prediction: str, answers: Sequence[str], style: Style = "official") -> float:
    """ChartQA's (Masry et al., 2022): a number may be 5 % off, other answers must be equal but for their case.

    A percentage is divided by 100. An answer of 0 is compared as text. vlmevalkit strips the prediction first.
    """
    prediction = prediction.strip() if style == "vlmevalkit" else prediction
    found = _number(prediction)
    for answer in answers:
        wanted = _number(answer)
        if found is not None and wanted:
            right = abs(found - wanted) / abs(wanted) <= 0.05
        else:
            right = prediction.lower() == answer.lower()
        if right:
            return 1.0
    return 0.0


def exact_match(prediction: str, answer: str, style: Style = "official") -> float:
    """GQA's: equal in lower case, the last period gone. lmms-eval drops all punctuation, and keeps spaces."""
    if style == "lmms-eval":
        table = str.maketrans("", "", string.punctuation)
        return float(prediction.lower().translate(table) == answer.lower().translate(table))
    if style == "vlmevalkit":
        return float(prediction.strip().lower() == answer.strip().lower())
    return float(prediction.strip().rstrip(".").lower() == answer.strip().lower())


def ocrbench(prediction: str, answers: Sequence[str], category: str, style: Style = "official") -> float:
    """OCRBench's (Liu et al., 2024): whether an answer stands in the prediction; formulas are compared without spaces.

    lmms-eval also folds full-width letters, and does so in the prediction as well.
    """

    def plain(text: str) -> str:
        if category == FORMULAS:
            return text.strip().replace("\n", " ").replace(" ", "")
        text = _narrow(text) if style == "lmms-eval" else text
        return text.lower().strip().replace("\n", " ")

    return float(any(plain(answer) in plain(prediction) for answer in answers))


def ocrbench_summary(right: Mapping[str, float], style: Style = "official") -> dict[str, float]:
    """Scores from the right answers of each of `OCRBENCH`: of the five parts, and of all.

    Args:
      right: category -> number of right answers.
      style: the whole is out of 1000; lmms-eval divides it by 1000.
    """
    parts = {"text recognition": sum(right.get(name, 0) for name in RECOGNITION)}
    parts |= {name: right.get(name, 0) for name in OCRBENCH[len(RECOGNITION) :]}
    total = sum(parts.values())
    return {"score": total / 1000 if style == "lmms-eval" else total} | parts


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _narrow(text: str) -> str:
    """Full-width ASCII and the ideographic space as ASCII."""
    return "".join(chr(ord(c) - 0xFEE0) if "\uff01" <= c <= "\uff5e" else " " if c == "\u3000" else c for c in text)
