"""How fast a configuration is on this machine: tower, connector, decoder, the whole training step, the input pipeline.

  uhd-jax bench --config=configs/demo.py --stage=pages
  uhd-jax bench --config=configs/uhd_v4.py:stage4 --rows=8 --parts=tower,connector,decoder --against=torch --json

Parts run apart on random inputs that fill the stage's largest bucket, on the first device; the step runs on all of them
in the configuration's mesh, and once more with the stage's own data, where that is there. --parts=pipeline times files
of several sizes on their way to the device instead, --parts=generation answers of the model: the first token and
further ones, alone and --rows (8) together. With --against=torch the same shapes go through transformers' classes in
turns with ours, parts compiled by torch.compile where that works.
"""

from __future__ import annotations

import argparse
import json

from uhd_jax.cli.common import UsageError, positive
from uhd_jax.config import RunConfig

CONFIG = "required"
PARTS = ("tower", "connector", "decoder", "step", "data")
OTHERS = ("pipeline", "generation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `uhd-jax bench`."""
    parser.add_argument("--stage", metavar="NAME", help="of the configuration (default: its last)")
    parser.add_argument("--rows", type=positive, metavar="N", help="of one call (default: the stage's)")
    parser.add_argument(
        "--parts", default=",".join(PARTS), metavar="A,B", help="default: tower,connector,decoder,step,data"
    )
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="of each measurement (default 5)")
    parser.add_argument("--against", choices=("torch",), help="also transformers' classes, in the same run")
    parser.add_argument("--no-torch-compile", action="store_true", help="run them as they are")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(arguments: argparse.Namespace, config: RunConfig | None) -> None:
    """Prints the figures."""
    parts = tuple(filter(None, arguments.parts.split(",")))
    if not parts or set(parts) - {*PARTS, *OTHERS}:
        raise UsageError(
            f"--parts={arguments.parts}: name some of {', '.join(PARTS + OTHERS)}, with commas between them"
        )
    from uhd_jax.analysis.aot_compile import stage_of
    from uhd_jax.analysis.bench_report import bench, table

    report = bench(
        config,
        stage_of(config, arguments.stage),
        parts,
        arguments.rows,
        arguments.repeats,
        arguments.against,
        not arguments.no_torch_compile,
    )
    print(json.dumps(report) if arguments.json else table(report))
