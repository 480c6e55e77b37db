"""Gather a run's results into report.json and draw its losses into loss.png.

  uhd-jax report runs/quickstart

The folder must hold a finished training and its evaluation.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from uhd_jax.cli.common import whole_file, write_json
from uhd_jax.config import RunConfig

CONFIG = "none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `uhd-jax report`."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="the folder of a run")
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")


def run(arguments: argparse.Namespace, config: RunConfig | None) -> None:
    """Writes both files; the report last, so that its presence means that both are there."""
    from uhd_jax.analysis import plots, report

    gathered = report.gather(arguments.directory)
    title = f"{gathered['name']}, seed {gathered['seed']}"
    figure = plots.losses(report.metrics(arguments.directory), title)
    with whole_file(arguments.directory / "loss.png") as partial:
        figure.savefig(partial, format="png", dpi=120)
    write_json(arguments.directory / "report.json", gathered)
    if arguments.json:
        print(json.dumps(gathered))
    else:
        for key, value in gathered.items():
            if isinstance(value, int | float | str):
                print(f"{key:27} {round(value, 4) if isinstance(value, float) else value}")
