"""RefCOCO: whether the box that a model writes covers the object (Kazemzadeh et al., 2014; spec ecosystem section 2).

Boxes are (left, top, right, bottom).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from uhd_jax.evaluation.metrics.styles import Style
from uhd_jax.slicing.plan import Size

THRESHOLD = 0.5


class Box(NamedTuple):
    """Left, top, right and bottom; in pixels or, normalised, in shares of the image's sides."""

    left: float
    top: float
    right: float
    bottom: float


_NUMBER = r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?"
_BRACKETS = re.compile(rf"\[\s*({_NUMBER})" + rf"(?:\s*,\s*|\s+)({_NUMBER})" * 3 + r"\s*\]")
_LMMS = re.compile(r"\[\s*(-?\d+(?:\.\d+)?)" + r",\s*(-?\d+(?:\.\d+)?)" * 3 + r"\s*\]")


def parse_box(prediction: str, size: Size, style: Style = "official") -> Box | None:
    """The box that an answer names, normalised.

    Coordinates of at most 1.5 are shares of the image's sides, of at most 1000 thousandths of them, larger ones pixels;
    the box is cut to the image, and swapped sides are put right. lmms-eval takes them as shares whatever they are, only
    in brackets with commas.

    Args:
      prediction: the answer; its first [x, y, x, y] counts, else its first four numbers.
      size: of the image.
      style: official and vlmevalkit read alike.

    Returns:
      None where there are not four numbers. (lmms-eval then takes an empty box.)
    """
    if style == "lmms-eval":
        found = _LMMS.search(prediction)
        return Box(*map(float, found.groups())) if found else Box(0, 0, 0, 0)
    found = _BRACKETS.search(prediction)
    numbers = [float(n) for n in (found.groups() if found else re.findall(_NUMBER, prediction)[:4])]
    if len(numbers) < 4:
        return None
    largest = max(map(abs, numbers))
    height, width = (1, 1) if largest <= 1.5 else (1000, 1000) if largest <= 1000 else size
    x = sorted(min(max(n / width, 0.0), 1.0) for n in numbers[0::2])
    y = sorted(min(max(n / height, 0.0), 1.0) for n in numbers[1::2])
    return Box(x[0], y[0], x[1], y[1])


def iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Area of the intersection over that of the union; 0 of empty boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    inside = max(0.0, width) * max(0.0, height)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - inside
    return inside / union if union > 0 else 0.0
