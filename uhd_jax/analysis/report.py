"""Gathers what a run left in its folder into one report.

Files it reads: `trained.json` and `metrics.jsonl` of the training, `evaluation.json`, the same of a control run in
`control/`, and, where `launch/quickstart.sh` kept time, `elapsed.txt` (a line "step seconds" per attempt of a step) and
`running.txt` ("step start", in seconds of the epoch: the step that is in progress).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TRAINED = ("name", "seed", "steps", "train_seconds", "devices", "versions")
RECORD = ("stage", "step", "stage_step", "loss", "compilations")


class ReportError(RuntimeError):
    """A file of the run is missing or cannot be read."""


def gather(directory: Path) -> dict[str, Any]:
    """The report of a run, with JSON types only: every score of its evaluation, times, losses and versions.

    Times are wall seconds, interrupted attempts included. `seconds` lists the quickstart's steps, `total_seconds` is
    their sum.

    Raises:
      ReportError: the run is not trained and evaluated, or a file is damaged.
    """
    if not directory.is_dir():
        raise ReportError(f"{directory}: is not a folder; name the folder of a run")
    trained, evaluation = _read(directory / "trained.json", TRAINED), _read(directory / "evaluation.json")
    seconds = elapsed(directory)
    report = {
        "name": trained["name"],
        "seed": trained["seed"],
        **{key: value for key, value in evaluation.items() if isinstance(value, int | float)},
        "train_seconds": seconds.get("train", trained["train_seconds"]),
    }
    control = directory / "control" / "evaluation.json"
    if control.exists():
        report["accuracy_thumbnail_trained"] = _read(control, ("accuracy_thumbnail_only",))["accuracy_thumbnail_only"]
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
      ReportError: the file is missing, or a line is no record.
    """
    path = directory / "metrics.jsonl"
    lines = enumerate(_text(path).splitlines(), 1)
    records = [_parsed(line, f"{path}: line {number}", RECORD) for number, line in lines]
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


def _read(path: Path, keys: Sequence[str] = ()) -> dict[str, Any]:
    return _parsed(_text(path), str(path), keys)


def _parsed(text: str, name: str, keys: Sequence[str]) -> dict[str, Any]:
    """A JSON object that has the keys."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ReportError(f"{name} is not JSON ({error})") from error
    lacking = [key for key in keys if key not in value] if isinstance(value, dict) else ["a JSON object"]
    if lacking:
        raise ReportError(f"{name} lacks {', '.join(lacking)}; make it again")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ReportError(f"{path}: missing; train and evaluate the run before its report") from None
    except UnicodeDecodeError as error:
        raise ReportError(f"{path} is not text ({error})") from error
