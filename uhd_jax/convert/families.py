"""Every known family of PyTorch checkpoints, and which of them a checkpoint belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uhd_jax.convert.decoder_families import DECODER_FAMILIES
from uhd_jax.convert.family import Dropped, Family, drops, select, settings
from uhd_jax.convert.llava_uhd import LLAVA_FAMILIES
from uhd_jax.convert.minicpmv46 import MINICPM_V_4_6
from uhd_jax.convert.research import RESEARCH
from uhd_jax.convert.tables import ConvertError
from uhd_jax.convert.towers import TOWER_FAMILIES
from uhd_jax.convert.vdim import VDIM

if TYPE_CHECKING:
    from uhd_jax.convert.source import Source

__all__ = ["FAMILIES", "Dropped", "Family", "drops", "family_named", "find_family", "select"]

FAMILIES: tuple[Family, ...] = (MINICPM_V_4_6, *LLAVA_FAMILIES, RESEARCH, VDIM, *TOWER_FAMILIES, *DECODER_FAMILIES)


def find_family(source: Source) -> Family:
    """The family that a checkpoint belongs to.

    Raises:
      ConvertError: none or several; says what config.json calls it and what is known.
    """
    found = [family for family in FAMILIES if family.recognise(source)]
    if len(found) == 1:
        return found[0]
    config = settings(source)
    if found:
        problem = f"could be any of {', '.join(family.name for family in found)}"
    elif not config:
        problem = "there is no config.json, and the tensors' names are of no known file without one (VDIM)"
    else:
        keys = ("model_type", "architectures", "mm_projector_type", "feature_mode", "model_mode")
        shown = [f"{key} {config[key]!r}" for key in keys if key in config]
        problem = f"{', '.join(shown) or 'config.json without model_type'}: not known with tensors of these names"
    raise ConvertError(f"{source.path}: {problem}; known families: {', '.join(family.name for family in FAMILIES)}")


def family_named(name: str) -> Family:
    """The family of a name.

    Raises:
      ConvertError: there is none; lists them.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise ConvertError(f"family {name!r} is not known; known: {', '.join(family.name for family in FAMILIES)}")
