"""Compiles a training step for a machine that is not there: memory, collectives, the best utilisation it could reach.

  uhd-jax compile --config=configs/uhd_v4.py:stage4 --topology=v5p:4x4x4
  uhd-jax compile --config=configs/uhd_v1.py --stage=stage2 --topology=8xh100 --json

It needs the real compilers (pip install 'uhd-jax[aot]') and no accelerator. Mesh, rows, accumulation and remat are the
configuration's: --config.train.mesh.tensor=2, --config.train.stages[0].rows=32, --config.model.decoder_remat=dots.
Topologies: v5e:4x4, v5p:4x4x4, v6e:4x8, tpu7x:2x2x1, their friendly names (v5e-16; v5p-128, which counts cores),
several slices (2xv5e:4x4), and hosts of GPUs (8xh100, h200:16). A step takes minutes to compile, whatever the number of
chips; for TPUs --effort=-1 is four to ten times quicker and says nearly the same of memory. The status is 0 also where
the step does not fit; docs/pods.md explains what is printed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from uhd_jax.cli.common import file_to_write, write_json
from uhd_jax.config import RunConfig

CONFIG = "required"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `uhd-jax compile`."""
    parser.add_argument("--topology", required=True, metavar="NAME", help="the machine, e.g. v5p:4x4x4, v6e-8, 8xh100")
    parser.add_argument("--stage", metavar="NAME", help="of the configuration (default: its last)")
    parser.add_argument(
        "--effort",
        type=effort,
        default=0.0,
        metavar="X",
        help="of the compiler to make the step fast, -1 (least) to 1; 0 (default) is what training uses",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--out", type=file_to_write, metavar="F.json", help="also write the JSON to a file")


def effort(text: str) -> float:
    """A number from -1 to 1."""
    value = float(text)
    if not -1 <= value <= 1:
        raise ValueError(text)
    return value


def run(arguments: argparse.Namespace, config: RunConfig | None) -> None:
    """Prints the report."""
    from uhd_jax.analysis.aot_targets import parse_target, prepare

    target = parse_target(arguments.topology)  # before anything that takes long
    prepare()
    from uhd_jax.analysis.aot_report import compile_report, table

    report = compile_report(config, target, arguments.stage, arguments.effort)
    if arguments.out:
        write_json(Path(arguments.out), report)
    print(json.dumps(report) if arguments.json else table(report))
