"""The definitions that a metric comes in, and the error of a metric that cannot be computed."""

from __future__ import annotations

from typing import Literal, get_args

# official: of the benchmark's authors. The harnesses: as they compute it, quirks included, for comparing with scores
# that were made with them (docs/evaluation.md lists the differences).
Style = Literal["official", "lmms-eval", "vlmevalkit"]
STYLES: tuple[str, ...] = get_args(Style)


class MetricError(ValueError):
    """References or predictions do not have the form that the metric is defined for."""


def mean(values: list[float]) -> float:
    """The mean; NaN of nothing, which is not a score of 0."""
    return sum(values) / len(values) if values else float("nan")
