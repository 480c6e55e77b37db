"""Asks a model all questions of a task, keeps every answer as a line of JSON, goes on where it was, in shards.

A line has the question's id, the prompt as it was put, where its images come from and how they were cut, the output,
and what it is worth. The first line has the settings; answers made under others are not mixed with these.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from uhd_jax.data.sources.protocol import SourceError
from uhd_jax.evaluation.benchmarks import Outcome, Scored
from uhd_jax.evaluation.metrics.styles import Style
from uhd_jax.evaluation.presets import Settings, resized
from uhd_jax.evaluation.samples import Sample
from uhd_jax.generation.assistant import Assistant
from uhd_jax.sharding import multihost
from uhd_jax.slicing.image_io import open_image
from uhd_jax.slicing.plan import ImageRefused, Size, plan_image

Line = dict[str, Any]


class EvaluationError(RuntimeError):
    """An evaluation cannot start or go on; the message says what to do."""


class Task(Protocol):
    """Questions, how they are put, and what the answers are worth."""

    name: str

    def __len__(self) -> int:
        """Number of rows."""

    def sample(self, index: int) -> Sample | None:
        """One question; None of a row that is not asked. Raises `SourceError`."""

    def where(self, index: int) -> str:
        """The place of a row, for people."""

    def prompt(self, sample: Sample) -> str:
        """The question as it is put."""

    def conversation(self, sample: Sample, prompt: str, images: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """The turn that the model gets."""

    def score(self, sample: Sample, output: str, style: Style) -> Outcome:
        """What an output is worth."""

    def summarise(self, scored: Sequence[Scored], style: Style) -> dict[str, Any]:
        """The scores."""


class Shard(NamedTuple):
    """Part `number` of `count`, from 1: the rows number - 1, number - 1 + count, .."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}of{self.count}"


@dataclasses.dataclass(frozen=True)
class Run:
    """What is done, and where the answers go."""

    task: Task
    settings: Settings
    samples: Path  # JSON lines
    fingerprint: Mapping[str, Any]  # of data and model: what must be equal, besides the settings, to go on
    shard: Shard = Shard(1, 1)
    batch: int = 8
    devices: int = 1
    limit: int | None = None

    @property
    def header(self) -> Line:
        """The first line."""
        return {"task": self.task.name, **self.fingerprint, **dataclasses.asdict(self.settings)}

    @property
    def own_file(self) -> Path:
        """Where this shard's answers go."""
        return self.samples if self.shard.count == 1 else _shard_file(self.samples, self.shard)


def _shard_file(path: Path, shard: Shard) -> Path:
    return path.with_suffix(f".{shard}{path.suffix}")


def answer_all(run: Run, model: Assistant, progress: Callable[[int, int], None] = lambda done, count: None) -> int:
    """Answers what is not answered yet.

    Returns:
      How many were answered now.

    Raises:
      EvaluationError: the answers that are there were made under other settings.
      SourceError, ImageRefused, PromptError: a question cannot be asked; with its place.
    """
    rows = _rows(run)
    done = {line["index"] for line in _kept(run)}
    path, waiting = run.own_file, [row for row in rows if row not in done]
    count = len(rows) - len(waiting)
    progress(count, len(rows))
    if not waiting and path.exists():
        return 0
    begun = path.exists() and path.stat().st_size
    with path.open("a", encoding="utf-8") as file:
        if not begun:
            file.write(json.dumps({"settings": run.header}, ensure_ascii=False) + "\n")
        for lines, asked in _answered(run, model, waiting):
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            count += asked
            progress(count, len(rows))
    return len(waiting)


def _rows(run: Run) -> list[int]:
    number, count = run.shard
    whole = range(len(run.task) if run.limit is None else min(run.limit, len(run.task)))
    return list(whole[number - 1 :: count])


def _answered(run: Run, model: Assistant, rows: Sequence[int]) -> Iterator[tuple[list[Line], int]]:
    """Batches of answers in the order of the rows; those of several devices are worked on side by side."""
    batches = [rows[start : start + run.batch] for start in range(0, len(rows), run.batch)]
    if run.devices == 1:
        for batch in batches:
            yield _answer(run, model, batch), len(batch)
        return
    devices = jax.local_devices()[: run.devices]
    models = [
        Assistant(model.config, jax.device_put(model.params, one), model.tokenizer, model.max_length) for one in devices
    ]
    with concurrent.futures.ThreadPoolExecutor(len(devices)) as pool:

        def ask(number: int, batch: Sequence[int]) -> list[Line]:
            with jax.default_device(devices[number % len(devices)]):
                return _answer(run, models[number % len(models)], batch)

        for start in range(0, len(batches), len(devices)):
            round_ = batches[start : start + len(devices)]
            for lines, batch in zip(pool.map(ask, range(len(round_)), round_), round_, strict=True):
                yield lines, len(batch)


def _answer(run: Run, model: Assistant, rows: Sequence[int]) -> list[Line]:
    settings, task = run.settings, run.task
    asked: list[tuple[int, Sample, str, list[np.ndarray]]] = []
    for row in rows:
        sample = task.sample(row)
        if sample is None:
            continue
        try:
            images = [open_image(image, model.config.slicing.limits) for image in sample.images]
        except ImageRefused as error:
            raise ImageRefused(f"{task.where(row)}: {error}") from None
        images = [resized(image, settings, f"{sample.id}/{number}") for number, image in enumerate(images)]
        asked.append((row, sample, task.prompt(sample), images))
    lines: list[Line] = []
    for limit in dict.fromkeys(sample.max_slices or settings.max_slices for _, sample, _, _ in asked):
        own = [one for one in asked if (one[1].max_slices or settings.max_slices) == limit]
        prompts = [task.conversation(sample, prompt, images) for _, sample, prompt, images in own]
        try:
            outputs = model.generate(prompts, max_slices=limit, **generation(settings))
        except ValueError as error:
            raise _placed(error, [task.where(row) for row, *_ in own]) from error
        for (row, sample, prompt, images), output in zip(own, outputs, strict=True):
            plans = [plan_image(Size(*image.shape[:2]), model.config, settings.mode, limit) for image in images]
            lines.append(
                {
                    "index": row,
                    "id": sample.id,
                    "where": task.where(row),
                    "prompt": prompt,
                    "images": [
                        os.fspath(one) if isinstance(one, str | os.PathLike) else "inside the row"
                        for one in sample.images
                    ],
                    "views": [plan.to_json() for plan in plans],
                    "output": output,
                }
            )
    return sorted(lines, key=lambda line: line["index"])


def generation(settings: Settings) -> dict[str, Any]:
    """Arguments of `Assistant.generate`."""
    chosen = {"max_new_tokens": settings.max_new_tokens, "temperature": settings.temperature, "mode": settings.mode}
    plain, others = Settings(), ("beams", "repetition_penalty", "thinking")
    return chosen | {name: value for name in others if (value := getattr(settings, name)) != getattr(plain, name)}


def _placed(error: ValueError, places: Sequence[str]) -> ValueError:
    """The error of a batch with the place of its prompt instead of the prompt's number."""
    found = re.match(r"prompt\[(\d+)\]: ", str(error))
    return type(error)(f"{places[int(found[1])]}: {str(error)[found.end() :]}") if found else error


def _kept(run: Run) -> list[Line]:
    """Answers that are there: this shard's own, and where it is the whole also those of shards."""
    found: dict[int, Line] = {}
    paths = [run.own_file]
    if run.shard.count == 1:
        pattern = re.compile(re.escape(run.samples.stem) + r"\.\d+of\d+" + re.escape(run.samples.suffix))
        paths += sorted(path for path in run.samples.parent.glob("*") if pattern.fullmatch(path.name))
    for path in paths:
        if path.exists():
            for line in _read(path, run.header):
                found.setdefault(line["index"], line)
    return list(found.values())


def _read(path: Path, header: Line) -> list[Line]:
    """The answers of a file; a last line that a killed run left half is taken off."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with path.open("r+b") as file:
            file.truncate(end)
    if not end:
        return []
    try:
        first, *lines = [json.loads(line) for line in data[:end].decode("utf-8").split("\n")[:-1]]
        made = first["settings"]
        for line in lines:
            line["index"], line["id"], line["output"]  # noqa: B018
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{path}: is damaged ({error}); move it away to begin anew") from None
    differing = [key for key in dict.fromkeys((*made, *header)) if made.get(key) != header.get(key)]
    if differing:
        what = ", ".join(f"{key}: {made.get(key)!r} there, {header.get(key)!r} now" for key in differing)
        raise EvaluationError(
            f"{path}: holds answers made under other settings ({what:.500}); move it away, or give those"
        )
    return lines


def finish(run: Run, style: Style) -> tuple[dict[str, Any], list[Line]]:
    """Scores all answers and writes them, in the order of the data, as one file.

    Returns:
      The summary; and the lines, each with "expected", "parsed" and "score".

    Raises:
      EvaluationError: answers are missing.
      SourceError, MetricError: the references do not have the form that the metric needs.
    """
    lines = {line["index"]: line for line in _kept(run)}
    kept, scored = [], []
    for row in _rows(run):
        sample = run.task.sample(row)
        if sample is None:
            continue
        line = lines.get(row)
        if line is None or line["id"] != sample.id:
            problem = "is not answered yet" if line is None else f"was question {line['id']}, and is now {sample.id}"
            raise EvaluationError(f"{run.task.where(row)}: {problem}; run the same command again, or every shard first")
        outcome = run.task.score(sample, line["output"], style)
        scored.append((sample, outcome))
        kept.append(line | {"expected": list(sample.answers), "parsed": outcome.parsed, "score": outcome.score})
    summary = run.task.summarise(scored, style)
    # Of the first rows alone some scores have no question, and JSON no NaN.
    summary = {key: value for key, value in summary.items() if value == value}
    text = [{"settings": run.header}, *kept]
    partial = run.own_file.with_name(f".{run.own_file.name}.partial")
    partial.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in text), encoding="utf-8")
    os.replace(partial, run.own_file)
    return summary, kept


def process_shard() -> Shard:
    """The part of this process in a launch of several, which are brought together first (`sharding.multihost`)."""
    multihost.join(multihost.Launch())
    return Shard(jax.process_index() + 1, jax.process_count())


def together(run: Run) -> Run | None:
    """Waits until all processes have answered. The first one gets the whole to put together, the others None."""
    multihost_utils.sync_global_devices("evaluated")
    return dataclasses.replace(run, shard=Shard(1, 1)) if jax.process_index() == 0 else None


@contextlib.contextmanager
def alone(run: Run) -> Iterator[None]:
    """Keeps a second evaluation away from the file of answers while one writes it."""
    import fcntl

    with run.own_file.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise EvaluationError(f"{run.own_file}: another evaluation is writing it") from None
        yield


def weights_stamp(folder: str | os.PathLike) -> str:
    """What tells one state of a model from another: the fingerprint of its newest checkpoint's or its own weights."""
    folder = Path(folder)
    steps = [path for path in (folder / "checkpoints").glob("*") if path.name.isdecimal()]
    newest = [max(steps, key=lambda path: int(path.name)) / "params"] if steps else [folder / "params"]
    stored = [path for path in newest if path.exists()] or sorted(folder.glob("*.safetensors"))
    return fingerprint(stored) if stored else ""


def fingerprint(paths: Sequence[str | os.PathLike]) -> str:
    """Of files: their names, sizes and first and last mebibyte."""
    digest = hashlib.sha256()
    for path in sorted(map(os.fspath, paths)):
        if os.path.isdir(path):
            digest.update(fingerprint([os.path.join(path, name) for name in os.listdir(path)]).encode())
            continue
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(f"{os.path.basename(path)} {size} ".encode() + file.read(2**20))
                file.seek(max(0, size - 2**20))
                digest.update(file.read())
        except OSError as error:
            raise SourceError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()[:16]
