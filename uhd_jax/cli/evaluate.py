"""Score a trained model on a task, keeping every answer.

  uhd-jax evaluate --checkpoint=runs/quickstart --task=digit_pages --out=runs/quickstart/evaluation.json
  uhd-jax evaluate --checkpoint=DIR --task=textvqa --data=TextVQA_0.5.1_val.json --images=train_images \\
    --preset=v1 --out=scores/textvqa.json --html=scores/textvqa.html

The scores go to --out. Every question with its prompt, views, output and score is a line of the file of the same name
that ends in .jsonl; an evaluation that was stopped goes on from there. --shard=i/n answers a part; the same command
without --shard puts the parts together. Files are read as the benchmarks publish them; see docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uhd_jax.cli.common import UsageError, above_zero, file_to_write, number, positive, whole_file, write_json
from uhd_jax.config import MODES, RunConfig

if TYPE_CHECKING:
    from uhd_jax.evaluation.runner import Run

CONFIG = "none"
_WIDTH = 27  # of names of scores
_OF_PROCESS = (0, 0)  # shards are the processes of the launch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `uhd-jax evaluate`."""
    from uhd_jax.evaluation.metrics.styles import STYLES
    from uhd_jax.evaluation.names import PRESETS, PROMPTS, TASKS

    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="the folder of a training run or of a model")
    parser.add_argument("--task", required=True, choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    parser.add_argument(
        "--out", required=True, type=file_to_write, metavar="F.json", help="where scores and answers go"
    )
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")
    files = parser.add_argument_group("files of a benchmark")
    files.add_argument("--data", action="append", default=[], metavar="F", help="its file or folder; may be repeated")
    files.add_argument("--images", metavar="DIR", help="folder of its images (default: that of each file)")
    files.add_argument(
        "--annotations", action="append", default=[], metavar="F", help="its answers, where they are in another file"
    )
    asking = parser.add_argument_group("how it is asked")
    asking.add_argument("--preset", choices=PRESETS, help="the settings of a paper (default: plain)")
    asking.add_argument("--prompts", choices=PROMPTS, help="the form of the prompts")
    asking.add_argument("--max-slices", type=positive, metavar="N", help="slices per image")
    asking.add_argument("--long-side", type=positive, metavar="N", help="resize images to so many pixels first")
    asking.add_argument(
        "--upsize", action=argparse.BooleanOptionalAction, help="enlarge images below 1344x1344 by chance"
    )
    asking.add_argument("--beams", type=positive, metavar="N", help="width of the beam search; 1: greedy")
    asking.add_argument("--temperature", type=number, metavar="X", help="of sampling; 0: greedy")
    asking.add_argument("--max-new-tokens", type=positive, metavar="N", help="length of an answer")
    asking.add_argument(
        "--repetition-penalty", type=above_zero, metavar="X", help="above 1: against repetitions (MiniCPM-V 4.6: 1.2)"
    )
    asking.add_argument(
        "--thinking", action=argparse.BooleanOptionalAction, help="think before the answer (default: the model's habit)"
    )
    asking.add_argument("--mode", choices=MODES, help="4x leaves the compressor out (default: the model's)")
    scoring = parser.add_argument_group("scores")
    scoring.add_argument(
        "--metrics", choices=STYLES, default=STYLES[0], help="whose definition (default: %(default)s); answers stay"
    )
    scoring.add_argument("--html", type=file_to_write, metavar="F.html", help="a report with the images, one file")
    scoring.add_argument("--limit", type=positive, metavar="N", help="only the first N rows")
    work = parser.add_argument_group("work")
    work.add_argument("--batch", type=positive, metavar="N", help="questions answered together (default: 8)")
    work.add_argument(
        "--devices", type=positive, default=1, metavar="N", help="local devices, each with the whole model"
    )
    work.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="only this part of the rows, 1/N to N/N; or process: one part for each process of a launch",
    )


def _shard(text: str) -> tuple[int, int]:
    if text == "process":
        return _OF_PROCESS
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part such as 1/4, nor the word process")
    return int(found[1]), int(found[2])


def run(arguments: argparse.Namespace, config: RunConfig | None) -> None:
    """Loads the model, asks what is not answered yet, prints the scores."""
    benchmark = arguments.task != "digit_pages"
    given = [name for name in ("data", "images", "annotations", "preset", "prompts") if getattr(arguments, name)]
    if benchmark and not arguments.data:
        raise UsageError(f"--task={arguments.task} needs --data=FILE")
    if not benchmark and given:
        raise UsageError(f"--{given[0]} is not for the embedded task digit_pages")
    import uhd_jax
    from uhd_jax.evaluation import runner

    by_process = arguments.shard == _OF_PROCESS
    if by_process:
        arguments.shard = runner.process_shard()
    made = _run(arguments, model := uhd_jax.load(arguments.checkpoint))
    with runner.alone(made), _bar(arguments.task) as progress:
        runner.answer_all(made, model, progress)
    if by_process:
        made = runner.together(made)
        if made is None:
            return
    with runner.alone(made):
        summary, lines = runner.finish(made, arguments.metrics)
    write_json(arguments.out, {"task": arguments.task, "metrics": arguments.metrics, **summary})
    if arguments.html:
        _write_page(arguments, made, model, summary, lines)
    scores = {key: value for key, value in summary.items() if isinstance(value, int | float | str)}
    if arguments.json:
        print(json.dumps(scores))
    else:
        for key, value in scores.items():
            print(f"{key:{_WIDTH}} {round(value, 4) if isinstance(value, float) else value}")


def _run(arguments: argparse.Namespace, model: Any) -> Run:
    from uhd_jax.evaluation import digit_pages, presets, runner, tasks

    names = ("prompts", "max_slices", "long_side", "upsize", "beams", "temperature", "max_new_tokens", "mode")
    names += ("repetition_penalty", "thinking")
    replaced = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    name, weights = os.path.basename(os.path.abspath(arguments.checkpoint)), runner.weights_stamp(arguments.checkpoint)
    marks: dict[str, Any] = {"model": name, "weights": weights}
    if arguments.task == "digit_pages":
        import dataclasses

        settings = dataclasses.replace(digit_pages.SETTINGS, **replaced)
        task: Any = digit_pages.DigitPagesTask(model.config.chat.layout)
        task.save_page(arguments.out.parent / "page.png")
    else:
        settings = presets.settings_for(arguments.preset or "plain", arguments.task, replaced)
        data, limits = arguments.data, model.config.slicing.limits
        task = tasks.BenchmarkTask(
            arguments.task, data, settings.prompts, arguments.images, arguments.annotations, limits
        )
        marks["data"] = runner.fingerprint([*data, *arguments.annotations])
    runner.generation(settings)  # what the model cannot do is known before it is asked
    return runner.Run(
        task,
        settings,
        arguments.out.with_suffix(".jsonl"),
        marks,
        runner.Shard(*(arguments.shard or (1, 1))),
        arguments.batch or (digit_pages.BATCH if arguments.task == "digit_pages" else 8),
        arguments.devices,
        arguments.limit,
    )


def _write_page(arguments: argparse.Namespace, made: Run, model: Any, summary: Any, lines: Any) -> None:
    from uhd_jax.evaluation.page import page
    from uhd_jax.slicing.image_io import open_image

    def images(row: int) -> list[Any]:
        sample = made.task.sample(row)
        return [open_image(image, model.config.slicing.limits) for image in sample.images] if sample else []

    text = page(f"{arguments.task}: {made.header['model']}", summary, made.header, lines, images)
    with whole_file(arguments.html) as partial:
        Path(partial).write_text(text, encoding="utf-8", errors="backslashreplace")


def _bar(name: str):
    """A bar of questions, where someone looks."""
    import contextlib

    from tqdm import tqdm

    @contextlib.contextmanager
    def shown():
        with tqdm(desc=name, unit=" questions", disable=None) as bar:

            def progress(done: int, count: int) -> None:
                bar.total = count
                bar.update(done - bar.n)

            yield progress

    return shown()
