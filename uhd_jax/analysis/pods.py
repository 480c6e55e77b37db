"""The table of docs/pods.md: full-size recipes on slices and hosts, compiled for them without having them.

  python -m uhd_jax.analysis.pods compile --folder=docs/pods    # what is not there yet, the most important first
  python -m uhd_jax.analysis.pods write --folder=docs/pods --out=docs/pods.md

One compile takes minutes and a process of its own; what it says is kept as one JSON file in the folder. Each is what
`uhd-jax compile` prints with the same configuration and overrides. In the folder's own folder `quick` are some that
were compiled a second time, with --effort=-1, to see what that changes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uhd_jax.analysis.pods_page import page
from uhd_jax.analysis.pods_recipes import RECIPES, Recipe

QUICK = "quick"  # folder of what was compiled a second time, with the least effort


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


def compile_missing(folder: Path, only: str, effort: float) -> int:
    """Compiles one after the other; what fails is said and left out. The number of failures."""
    failed = 0
    folder.mkdir(parents=True, exist_ok=True)
    for recipe, topology in missing(folder):
        if only not in recipe.file(topology):
            continue
        out = folder / recipe.file(topology)
        command = [sys.executable, "-m", "uhd_jax", *recipe.command(topology), f"--effort={effort:g}", f"--out={out}"]
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
    parser.add_argument("--effort", type=float, default=0.0, help="compile: as of `uhd-jax compile`")
    parser.add_argument("--out", type=Path, default=Path("docs/pods.md"), help="write: the page")
    arguments = parser.parse_args(argv)
    if arguments.command == "compile":
        return 1 if compile_missing(arguments.folder, arguments.only, arguments.effort) else 0
    reports, quick = read_reports(arguments.folder), read_reports(arguments.folder / QUICK)
    arguments.out.write_text(page(reports, quick), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
