"""Score a trained model on a task.

  uhd-jax evaluate --checkpoint=runs/quickstart --task=digit_pages --out=runs/quickstart/evaluation.json

Every answer is kept in the file; what the task saves besides, such as an image of it, goes into the file's folder.
"""

from __future__ import annotations

import argparse
import importlib
import json

from uhd_jax.cli.common import file_to_write, write_json
from uhd_jax.config import RunConfig

CONFIG = "none"
TASKS = {"digit_pages": "uhd_jax.evaluation.digit_pages"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `uhd-jax evaluate`."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="the folder of a training run or of a model")
    parser.add_argument("--task", required=True, choices=TASKS, help="what is asked")
    parser.add_argument(
        "--out", required=True, type=file_to_write, metavar="F.json", help="where scores and answers go"
    )
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")


def run(arguments: argparse.Namespace, config: RunConfig | None) -> None:
    """Loads the model, evaluates it, prints the scores."""
    import uhd_jax

    task = importlib.import_module(TASKS[arguments.task])
    result = task.evaluate(uhd_jax.load(arguments.checkpoint), arguments.out.parent)
    write_json(arguments.out, result)
    scores = {key: value for key, value in result.items() if isinstance(value, int | float | str)}
    if arguments.json:
        print(json.dumps(scores))
    else:
        for key, value in scores.items():
            print(f"{key:27} {round(value, 4) if isinstance(value, float) else value}")
