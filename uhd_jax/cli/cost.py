"""What a configuration costs for one image: parameters, visual tokens, FLOPs, memory.

  uhd-jax cost --config=configs/uhd_v4.py --image-size=672x1008
  uhd-jax cost --config=configs/uhd_v4.py --against=configs/uhd_v1.py --against=configs/uhd_v2.py \
      --image-size=336x336 --image-size=672x1008 --plot=cost.png
  uhd-jax cost --config=configs/uhd_v4.py --view=980x980 --convention=paper

The first table is of the model itself, a stage is counted with its own slicing. With several sizes or configurations
there is one line for each of them instead. FLOPs are those of one forward pass over the image with its text; how they
are counted is printed below them, and explained in docs/cost.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from uhd_jax.cli.common import UsageError, file_to_write, not_negative, size, whole_file
from uhd_jax.cli.configs import load_file
from uhd_jax.config import MODES, RunConfig
from uhd_jax.slicing.plan import Size

if TYPE_CHECKING:
    from uhd_jax.analysis.costs import Case

CONFIG = "required"
PLOTTED = range(112, 2017, 28)  # longer sides in pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `uhd-jax cost`."""
    parser.add_argument(
        "--image-size", type=size, action="append", metavar="HxW", help="height and width in pixels; may be repeated"
    )
    parser.add_argument("--view", type=size, metavar="HxW", help="instead of an image: one view of this size")
    parser.add_argument("--text-tokens", type=not_negative, default=0, metavar="N", help="tokens of text (default 0)")
    parser.add_argument("--mode", choices=MODES, help="4x leaves the compressor out (default: the configuration's)")
    parser.add_argument(
        "--against", action="append", default=[], metavar="FILE.py[:ARG]", help="another configuration beside --config"
    )
    parser.add_argument(
        "--convention",
        choices=("default", "paper"),
        default="default",
        help="paper: count as the paper of the model's tower does, and show its figures",
    )
    parser.add_argument("--flops-per-mac", type=int, choices=(2, 1), help="FLOPs of a multiply-accumulate (default 2)")
    parser.add_argument(
        "--causal", choices=("half", "full"), help="pairs of tokens in the decoder's attention (default half)"
    )
    parser.add_argument(
        "--plot", type=file_to_write, metavar="F.png", help="draw the costs of images of all sizes of the first's shape"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(arguments: argparse.Namespace, config: RunConfig | None) -> None:
    """Prints the costs, and draws them on request."""
    _check(arguments)
    from uhd_jax.analysis.cost_tables import comparison, tables
    from uhd_jax.analysis.costs import Case, costs_of, stages_of
    from uhd_jax.cost import Convention

    convention = None
    if arguments.convention == "default":
        convention = Convention(arguments.flops_per_mac or 2, arguments.causal != "full")
    configs = _configs(config, arguments.against)
    cases = [
        Case(image, arguments.view, arguments.text_tokens, arguments.mode, convention)
        for image in arguments.image_size or [None]
    ]
    costs = [costs_of(one, name, case) for case in cases for name, one in configs.items()]
    if len(costs) == 1 and convention:
        costs[0]["stages"] = stages_of(config, cases[0])
    if arguments.plot:
        _plot(arguments.plot, configs, cases[0])
    if len(costs) > 1:
        print(json.dumps({"costs": costs}) if arguments.json else comparison(costs))
    else:
        print(json.dumps(costs[0]) if arguments.json else tables(costs[0]))


def _check(arguments: argparse.Namespace) -> None:
    if (arguments.image_size is None) == (arguments.view is None):
        raise UsageError("give either --image-size=HxW or --view=HxW")
    if arguments.convention == "paper":
        for flag in ("flops_per_mac", "causal", "plot"):
            if getattr(arguments, flag) is not None:
                raise UsageError(
                    f"--{flag.replace('_', '-')} does not go with --convention=paper, which each paper sets"
                )
    if arguments.plot and arguments.view:
        raise UsageError("--plot draws images of all sizes: give --image-size instead of --view")


def _configs(config: RunConfig, files: Sequence[str]) -> dict[str, RunConfig]:
    """The configurations by the name that stands before their costs."""
    configs = {config.name: config}
    for name in files:
        file, colon, argument = name.partition(":")
        labels = (part + colon + argument for part in (Path(file).stem, Path(file).name))
        configs[next((label for label in labels if label not in configs), name)] = load_file(name)
    return configs


def _plot(path: Path, configs: Mapping[str, RunConfig], case: Case) -> None:
    from uhd_jax.analysis import plots
    from uhd_jax.analysis.costs import costs_of

    shape = case.image
    sizes = [Size(*(max(1, round(side * length / max(shape))) for side in shape)) for length in PLOTTED]
    series = {
        name: [costs_of(config, name, dataclasses.replace(case, image=size)) for size in sizes]
        for name, config in configs.items()
    }
    figure = plots.costs(series, f"Images of the shape of {shape}, {case.text_tokens} tokens of text")
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
