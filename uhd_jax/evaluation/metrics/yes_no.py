"""POPE and MME: questions that are answered by yes or no.

Sources: POPE (Li et al., 2023) as LLaVA's scripts score it; MME (Fu et al., 2023); spec ecosystem section 2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from uhd_jax.evaluation.metrics.styles import MetricError, Style, mean
from uhd_jax.evaluation.metrics.vqa import _COMMA_IN_NUMBER, _PERIOD_VLMEVALKIT, _PUNCTUATION

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def parse_pope(prediction: str, style: Style = "official") -> str:
    """ "yes", "no", or what else the answer is taken for.

    official: "no" where the first sentence has the word No, no or not; "yes" otherwise. lmms-eval: the whole answer in
    lower case. vlmevalkit: the one of the words yes and no that occurs, "unknown" where both or neither do.
    """
    if style == "lmms-eval":
        return prediction.lower().strip()
    if style == "vlmevalkit":
        return _one_word(prediction)
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope(answers: Sequence[tuple[str, str]], style: Style = "official") -> dict[str, float]:
    """Scores of a list of questions.

    Args:
      answers: (what the prediction was parsed as, the right answer "yes" or "no").
      style: lmms-eval counts as false negatives only answers of "no", and its yes_ratio is that of the right answers.

    Returns:
      accuracy, precision, recall, f1 and yes_ratio, shares; 0 where a denominator is.
    """
    yes = [wanted for found, wanted in answers if found == "yes"]
    true = yes.count("yes")
    missed = sum(
        wanted == "yes" and (found == "no" or style != "lmms-eval" and found != "yes") for found, wanted in answers
    )
    precision = true / len(yes) if yes else 0.0
    recall = true / (true + missed) if true + missed else 0.0
    said = [wanted for _, wanted in answers].count("yes") if style == "lmms-eval" else len(yes)
    return {
        "accuracy": mean([float(found == wanted) for found, wanted in answers]),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_ratio": said / len(answers) if answers else float("nan"),
    }


def parse_mme(prediction: str, style: Style = "official") -> str:
    """ "yes", "no" or "other": by the first four letters, as the benchmark's own script reads an answer.

    lmms-eval strips the answer and its periods first, and takes a single y or n. vlmevalkit: as in `parse_pope`.
    """
    if style == "vlmevalkit":
        return _one_word(prediction)
    text = prediction.lower()
    if style == "lmms-eval":
        text = text.strip().replace(".", "")
        if len(text) == 1:
            return {"y": "yes", "n": "no"}.get(text, "other")
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def mme(results: Iterable[tuple[str, str, bool]]) -> dict[str, float]:
    """Scores of MME: of each category 100 * accuracy + 100 * accuracy+, the share of images with all questions right.

    Args:
      results: (category, image, whether the answer is right) of each question.

    Returns:
      perception (out of 2000) and cognition (out of 800), the sums over their categories; for each category that
      occurs its score, accuracy and accuracy+.

    Raises:
      MetricError: an image has not two questions.
    """
    images: dict[str, dict[str, list[bool]]] = {}
    for category, image, right in results:
        images.setdefault(category, {}).setdefault(image, []).append(right)
    scores: dict[str, float] = {}
    for category, of_image in images.items():
        for image, questions in of_image.items():
            if len(questions) != 2:
                raise MetricError(f"image {image!r} of {category} has {len(questions)} questions; MME asks two of each")
        accuracy = 100 * mean([float(right) for questions in of_image.values() for right in questions])
        plus = 100 * mean([float(all(questions)) for questions in of_image.values()])
        scores |= {category: accuracy + plus, f"{category} accuracy": accuracy, f"{category} accuracy+": plus}
    return {"perception": _total(scores, PERCEPTION), "cognition": _total(scores, COGNITION)} | scores


def _total(scores: Mapping[str, float], categories: Sequence[str]) -> float:
    return sum(scores.get(category, 0.0) for category in categories)


def _one_word(prediction: str) -> str:
    """VLMEvalKit's: signs removed as in its VQA normalisation, then the words."""
    text = prediction.lower()
    number = _COMMA_IN_NUMBER.search(text)
    words = text
    for sign in _PUNCTUATION:
        words = words.replace(sign, "" if sign + " " in text or " " + sign in text or number else " ")
    found = {"yes", "no"} & set(re.sub(_PERIOD_VLMEVALKIT, "", words).split())
    return found.pop() if len(found) == 1 else "unknown"
