"""What two runs of one model make of the same input, compared position by position: figures, a verdict, a table."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

MAX_KL = 1e-4  # nats at any position, beyond which two models in float32 are not the same
MAX_RELATIVE = 1e-3  # of the length of a patch's features, likewise


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One input to the whole model, to the tower or to the decoder. Arrays have one value for each of T positions."""

    part: str  # "model", "tower", "decoder"
    given: str  # a prompt, the size of a view, a number of ids
    images: int
    max_abs: np.ndarray  # float64[T]: largest difference of a logit or feature
    kl: np.ndarray | None = None  # float64[T]: divergence of ours from the source's distribution, in nats
    same_top: np.ndarray | None = None  # bool[T]: the likeliest token is the same
    relative: np.ndarray | None = None  # float64[T]: of features, length of the difference by that of the source's
    same_ids: bool | None = None  # whether the source's processor makes the same ids; None: it was not asked

    def to_json(self) -> dict[str, Any]:
        """JSON types only, every position."""
        return {
            key: value.tolist() if isinstance(value, np.ndarray) else value
            for key, value in dataclasses.asdict(self).items()
        }

    @property
    def problem(self) -> str | None:
        """Why the two are not the same, or None."""
        for values, limit, unit in ((self.kl, MAX_KL, "KL"), (self.relative, MAX_RELATIVE, "relative difference")):
            if values is None:
                continue
            what = f"{'logits' if unit == 'KL' else 'features'} of {self.given!r}"
            if not (np.isfinite(values).all() and np.isfinite(self.max_abs).all()):
                return f"{what} are not finite on one side"
            if values.max() > limit:
                place = int(values.argmax())
                return f"{what} differ at position {place}: {unit} {values[place]:.1e}, above {limit:.0e}"
        return f"the source's processor makes other ids of {self.given!r}" if self.same_ids is False else None


@dataclasses.dataclass(frozen=True)
class Report:
    """All comparisons of a checkpoint with a model of ours."""

    source: str
    directory: str
    comparisons: tuple[Comparison, ...]
    not_compared: tuple[str, ...] = ()  # parts that PyTorch cannot run, and why

    def to_json(self) -> dict[str, Any]:
        """JSON types only: the summary, and for each comparison every position."""
        return self.summary() | {"comparisons": [comparison.to_json() for comparison in self.comparisons]}

    def summary(self) -> dict[str, Any]:
        """Over all positions; None for figures of logits or of features where there are none."""
        max_abs, kl, same_top, relative = (self._all(name) for name in ("max_abs", "kl", "same_top", "relative"))
        return {
            "source": self.source,
            "directory": self.directory,
            "parts": list(dict.fromkeys(c.part for c in self.comparisons)),
            "not_compared": list(self.not_compared),
            "positions": len(max_abs),
            "max_abs": float(max_abs.max()),
            "max_kl": float(kl.max()) if kl is not None else None,
            "mean_kl": float(kl.mean()) if kl is not None else None,
            "top1_agreement": float(same_top.mean()) if same_top is not None else None,
            "max_relative": float(relative.max()) if relative is not None else None,
            "same": self.problem is None,
        }

    def _all(self, name: str) -> np.ndarray | None:
        found = [values for c in self.comparisons if (values := getattr(c, name)) is not None]
        return np.concatenate(found) if found else None

    @property
    def problem(self) -> str | None:
        """Why the two are not the same model, or None."""
        return next((c.problem for c in self.comparisons if c.problem), None)

    def __str__(self) -> str:
        lines = []
        for logits in (True, False):
            rows = [c for c in self.comparisons if (c.kl is not None) == logits]
            if rows:
                names = ("mean KL", "max KL", "top-1") if logits else ("mean rel.", "max rel.")
                lines.append(_line("part", "given", "images", "positions", "max |diff|", names))
            for c in rows:
                values = c.kl if logits else c.relative
                shown = [f"{values.mean():.1e}", f"{values.max():.1e}"]
                shown += [f"{c.same_top.mean():.1%}"] if logits else []
                lines.append(_line(c.part, c.given, c.images, len(values), f"{c.max_abs.max():.2e}", shown))
        checked = [c.same_ids for c in self.comparisons if c.same_ids is not None]
        if checked:
            lines.append(f"ids of the source's own processor: {'the same' if all(checked) else 'DIFFERENT'}")
        elif any(c.part == "model" for c in self.comparisons):
            lines.append("ids of the source's own processor: not compared (it needs torchvision, or has no template)")
        return "\n".join([*lines, *(f"not compared: {what}" for what in self.not_compared)])


def _line(part: str, given: str, images: Any, positions: Any, largest: str, values: Any) -> str:
    given = given if len(given) <= 32 else given[:29] + "..."
    return f"{part:<9}{given:<34}{images:>6}{positions:>11}{largest:>12}" + "".join(f"{value:>11}" for value in values)


def compare_logits(ours: np.ndarray, theirs: np.ndarray) -> dict[str, np.ndarray]:
    """Of logits [T, V]: `max_abs`, `kl` (theirs || ours) and `same_top` of `Comparison`."""
    ours, theirs = (np.asarray(logits, np.float64) for logits in (ours, theirs))
    log_ours, log_theirs = _log_softmax(ours), _log_softmax(theirs)
    kl = np.sum(np.exp(log_theirs) * (log_theirs - log_ours), axis=-1)
    same = ours.argmax(-1) == theirs.argmax(-1)
    return {"max_abs": np.abs(ours - theirs).max(axis=-1), "kl": kl, "same_top": same}


def compare_features(ours: np.ndarray, theirs: np.ndarray) -> dict[str, np.ndarray]:
    """Of features [T, D]: `max_abs` and `relative` of `Comparison`."""
    ours, theirs = (np.asarray(features, np.float64) for features in (ours, theirs))
    relative = np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)
    return {"max_abs": np.abs(ours - theirs).max(axis=-1), "relative": relative}


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
