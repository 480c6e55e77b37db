"""Names of VDIM's up-sampler in the released v2 checkpoints and in its own pre-training's (spec v1-v2 section 6.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uhd_jax.config import CompressorConfig, ConnectorConfig, ModelConfig, PyramidConfig, TowerConfig
from uhd_jax.convert.family import NO_DECODER, Dropped, Family, shape_of
from uhd_jax.convert.tables import Entry, Rule

if TYPE_CHECKING:
    from uhd_jax.convert.source import Source

# torch convolution of one cell [out, in, 1, 1] <-> matmul kernel [in, out]
CELL_CONVOLUTION = Rule(lambda a: a[:, :, 0, 0].T, lambda a, _: a.T[:, :, None, None], lambda s: (s[1], s[0]))


def cell_convolution(ours: str, theirs: str) -> list[Entry]:
    """A convolution of one cell and its bias."""
    return [Entry(f"{ours}/kernel", f"{theirs}.weight", CELL_CONVOLUTION), Entry(f"{ours}/bias", f"{theirs}.bias")]


def upsampler_table(prefix: str) -> list[Entry]:
    """The up-sampler of a pyramid of any height.

    Args:
      prefix: "model.mm_projector.upsampler.upsampler." in a whole model, "upsampler." in a file of the pre-training.
    """
    entries = cell_convolution("connector/upsampler/fixup", f"{prefix}fixup_proj.1")
    for level in (1, 2, 3):
        ours, theirs = f"connector/upsampler/up{level}", f"{prefix}up{level}"
        entries.append(Entry(f"{ours}/range_temperature", f"{theirs}.range_temp"))
        entries.append(Entry(f"{ours}/spatial_sigma", f"{theirs}.sigma_spatial"))
        for number, place in enumerate((0, 3)):
            entries += cell_convolution(f"{ours}/range_{number}", f"{theirs}.range_proj.{place}")
            entries += cell_convolution(f"{ours}/kernel_{number}", f"{theirs}.fixup_proj.{place}")
    return entries


def _recognise(source: Source) -> bool:
    return {"upsampler.up1.range_temp", "upsampler.fixup_proj.1.weight"} <= set(source.tensors)


def _config(source: Source) -> ModelConfig:
    """A file of the pre-training has no config: levels and width are in the tensors."""
    top = max(level for level in (1, 2, 3) if f"upsampler.up{level}.range_temp" in source.tensors)
    width = shape_of(source, "upsampler.fixup_proj.1.weight")[0]
    return ModelConfig(
        decoder=NO_DECODER,
        tower=TowerConfig(kind="clip", width=width, mlp_width=1, layers=1, heads=1, table_side=1),
        compressor=CompressorConfig("none"),
        connector=ConnectorConfig("hiwin", pyramid=PyramidConfig(2 ** (top + 1) - 1)),
    )


VDIM = Family(
    name="vdim",
    parts=("connector/upsampler",),
    recognise=_recognise,
    config=_config,
    table=lambda config: upsampler_table("upsampler."),
    dropped=lambda config: (
        Dropped(r"downsampler.*", "the down-samplers: only the pre-training's loss has them"),
        Dropped(r"scale_net.*", "the loss's own estimate of its uncertainty"),
        Dropped(r"(validation_)?model\..*", "the frozen CLIP that the features came from"),
        Dropped(r"linear_(acc|iou)(\..*)?", "figures of the pre-training's log"),
    ),
    write_files=lambda config, tokenizer, folder: None,  # the original has nothing but the tensors
)
