"""The table of docs/pods.md: full-size recipes on slices and hosts, compiled for them without having them.

  python -m uhd_jax.analysis.pods compile --folder=docs/pods    # what is not there yet, the most important first
  python -m uhd_jax.analysis.pods write --folder=docs/pods --out=docs/pods.md

One compile takes minutes and a process of its own; what it says is kept as one JSON file in the folder. Each is what
`uhd-jax compile` prints with the same configuration and overrides.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PROJECTED = ("v4, stage 4", (64, 256, 1024))  # the recipe, and numbers of devices
_ROWS = "train.stages[0].rows"
_ACCUMULATION = "train.stages[0].accumulation"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A full-size stage, and what it is compiled for with which values replaced."""

    title: str
    config: str
    machines: Mapping[str, Mapping[str, Any]]
    why: str

    def command(self, topology: str) -> list[str]:
        """Arguments of `uhd-jax` that compile it for one of its machines."""
        overrides = [f"--config.{key}={value}" for key, value in self.machines[topology].items()]
        return ["compile", f"--config={self.config}", f"--topology={topology}", *overrides]

    def file(self, topology: str) -> str:
        """Name of the JSON file."""
        words = "".join(letter if letter.isalnum() else " " for letter in f"{self.title} {topology}").split()
        return "_".join(words) + ".json"


def _v4(stage: int, why: str) -> Recipe:
    machines: dict[str, dict[str, Any]] = {name: {} for name in ("v5e:8x8", "v5p:4x4x4", "v6e:8x8")}
    return Recipe(
        f"v4, stage {stage}", f"configs/uhd_v4.py:stage{stage}", machines | {"8xh100": {_ACCUMULATION: 8}}, why
    )


def _accumulating(machines: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    return {topology: {_ACCUMULATION: count} for topology, count in machines.items()}


_LLAVA = "Published: 128 rows a step. "

# In order of importance; each line of a recipe in the order of its machines.
RECIPES: tuple[Recipe, ...] = (
    _v4(
        4,
        "64 rows, on 64 devices one each, the published layout. Everything is trained.",
    ),
    _v4(3, "The longest rows, 10,240 tokens and 114 views; everything is trained."),
    _v4(1, "Thumbnails and short rows; tower, compressor and connector are trained, the decoder passes gradients on."),
    _v4(2, "As stage 4, but the decoder is frozen: it has neither moments nor gradients."),
    Recipe(
        "v2 with Vicuna-7B, stage 2",
        "configs/uhd_v2.py:stage2",
        _accumulating({"8xh100": 4, "v5p:2x2x4": 2, "v6e:4x8": 4, "v5e:8x8": 2}),
        _LLAVA + "The pyramid's maps are sixteen times the tower's, so a device takes few rows at a time.",
    ),
    Recipe(
        "v1 with Vicuna-13B, stage 2",
        "configs/uhd_v1.py:stage2",
        _accumulating({"8xh100": 4, "v5p:2x2x4": 1, "v6e:4x8": 2, "v5e:8x8": 2}),
        _LLAVA + "The tower is frozen. 13 billion parameters with moments need 160 GB over all devices.",
    ),
    Recipe(
        "v2 with Vicuna-13B, stage 2",
        "configs/uhd_v2.py:13b,stage2",
        _accumulating({"8xh100": 8, "v5p:2x2x4": 4, "v6e:4x8": 4, "v5e:8x8": 2}),
        _LLAVA + "As the 7B, with 160 GB of state.",
    ),
    Recipe(
        "MiniCPM-V 4.6, fine-tuning",
        "configs/minicpm_v_4_6.py",
        {"8xh100": {}, "v5e:4x4": {_ROWS: 16}, "v5p:2x2x1": {_ROWS: 4}, "v6e:2x4": {}},
        "One row per device. The state is small; the vocabulary of 248,094 makes the loss's chunk the largest piece.",
    ),
)


def missing(folder: Path) -> list[tuple[Recipe, str]]:
    """What the folder has no file of, the first machine of every recipe before the second."""
    pairs = [
        (recipe, topology)
        for number in range(max(len(recipe.machines) for recipe in RECIPES))
        for recipe in RECIPES
        for topology in list(recipe.machines)[number : number + 1]
    ]
    first = [(RECIPES[0], topology) for topology in RECIPES[0].machines]
    order = first + [pair for pair in pairs if pair not in first]
    return [(recipe, topology) for recipe, topology in order if not (folder / recipe.file(topology)).is_file()]


def compile_missing(folder: Path, only: str) -> int:
    """Compiles one after the other; what fails is said and left out. The number of failures."""
    failed = 0
    folder.mkdir(parents=True, exist_ok=True)
    for recipe, topology in missing(folder):
        if only not in recipe.file(topology):
            continue
        out = folder / recipe.file(topology)
        command = [sys.executable, "-m", "uhd_jax", *recipe.command(topology), f"--out={out}"]
        print(" ".join(command[1:]), flush=True)
        failed += subprocess.run(command).returncode != 0
    return failed


def read_reports(folder: Path) -> dict[str, Any]:
    """The JSON files of a folder by name."""
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def main(argv: Sequence[str] | None = None) -> int:
    """The two commands of the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("compile", "write"))
    parser.add_argument("--folder", type=Path, default=Path("docs/pods"), help="of the JSON files")
    parser.add_argument("--only", default="", help="compile: files whose name holds this")
    parser.add_argument("--out", type=Path, default=Path("docs/pods.md"), help="write: the page")
    arguments = parser.parse_args(argv)
    if arguments.command == "compile":
        return 1 if compile_missing(arguments.folder, arguments.only) else 0
    from uhd_jax.analysis.pods_page import page

    arguments.out.write_text(page(read_reports(arguments.folder)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
