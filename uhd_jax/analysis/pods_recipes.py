"""Which full-size recipes docs/pods.md compiles for which slices and hosts, and why so.

What a recipe replaces for a machine is what was found to fit: rows and micro-batches; the rest is in its configuration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
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


_AS_CONFIGURED: Mapping[str, Any] = MappingProxyType({})
_SHARED = {"train.mesh.sequence": 2, _ACCUMULATION: 2}


def _v4(stage: int, why: str, on_v5e: Mapping[str, Any] = _AS_CONFIGURED) -> Recipe:
    machines: dict[str, Mapping[str, Any]] = {"v5e:8x8": on_v5e, "v5p:4x4x4": {}, "v6e:8x8": {}}
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
    _v4(
        3,
        "The longest rows, 10,240 tokens and 114 views; everything is trained. On v5e two devices share the tokens of "
        "a row: one alone would need 17.9 GiB.",
        _SHARED,
    ),
    _v4(1, "Thumbnails and short rows; tower, compressor and connector are trained, the decoder passes gradients on."),
    _v4(
        2,
        "Rows of 8,192 tokens and 91 views, and the decoder is frozen: it has neither moments nor gradients. On v5e "
        "two devices share the tokens of a row: one alone would need 16.2 GiB.",
        _SHARED,
    ),
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
