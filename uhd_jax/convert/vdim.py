"""Names of VDIM's up-sampler in the released v2 checkpoints and in its own pre-training's (spec v1-v2 section 6.3)."""

from __future__ import annotations

from uhd_jax.convert.tables import Entry, Rule

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
