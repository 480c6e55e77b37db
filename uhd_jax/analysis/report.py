"""Gathers what a run left in its folder into one report.

Files it reads: `trained.json` and `metrics.jsonl` of the training, `evaluation.json`, the same of a control run in
`control/`, and, where `launch/quickstart.sh` kept time, `elapsed.txt` (a line "step seconds" per attempt of a step) and
`running.txt` ("step start", in seconds of the epoch: the step that is in progress).
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

ACCURACIES = ("accuracy_with_slices", "accuracy_thumbnail_only", "chance")


class ReportError(RuntimeError):
    """A file of the run is missing or cannot be read."""


def gather(directory: Path) -> dict[str, Any]:
    """The report of a run, with JSON types only.

    Times are wall seconds, interrupted attempts included. `seconds` lists the quickstart's steps, `total_seconds` is
    their sum.

    Raises:
      ReportError: the run is not trained and evaluated, or a file is damaged.
    """
    trained, evaluation = _read(directory / "trained.json"), _read(directory / "evaluation.json")
    seconds = elapsed(directory)
    report = {
        "name": trained["name"],
        "seed": trained["seed"],
        **{key: evaluation[key] for key in ACCURACIES},
        "train_seconds": seconds.get("train", trained["train_seconds"]),
    }
    control = directory / "control" / "evaluation.json"
    if control.exists():
        report["accuracy_thumbnail_trained"] = _read(control)["accuracy_thumbnail_only"]
    if seconds:
        report |= {"total_seconds": sum(seconds.values()), "seconds": seconds}
    return report | {
        "stages": stages(metrics(directory)),
        "steps": trained["steps"],
        "devices": trained["devices"],
        "versions": trained["versions"],
    }


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a loss that was not finite is None.

    Raises:
      ReportError: the file is missing, or a line is not JSON.
    """
    path, records = directory / "metrics.jsonl", []
    for number, line in enumerate(_text(path).splitlines(), 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ReportError(f"{path}: line {number} is not JSON ({error})") from error
    if not records:
        raise ReportError(f"{path}: holds no records; train longer than train.log_every steps")
    return records


def stages(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """First and last loss, and number of compiled programs, of each stage."""
    summary: dict[str, dict[str, Any]] = {}
    for record in records:
        stage = summary.setdefault(record["stage"], {"name": record["stage"], "first_loss": record["loss"]})
        stage |= {"last_loss": record["loss"], "steps": record["stage_step"], "compilations": record["compilations"]}
    return list(summary.values())


def elapsed(directory: Path) -> dict[str, int]:
    """Seconds spent in each of the quickstart's steps so far, in their order; empty for other runs."""
    spent: dict[str, int] = {}
    now = int(time.time())
    for name, end in (("elapsed.txt", None), ("running.txt", now)):
        path = directory / name
        for line in _text(path).splitlines() if path.exists() else ():
            step, _, number = line.partition(" ")
            if not number.isdecimal():
                raise ReportError(f"{path}: {line!r} is not a step and its seconds")
            spent[step] = spent.get(step, 0) + (int(number) if end is None else end - int(number))
    return spent


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise ReportError(f"{path}: is not JSON ({error})") from error


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        raise ReportError(f"{path}: missing; train and evaluate the run before its report") from None
