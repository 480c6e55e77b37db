"""Conversations about images of the sizes that people have, made on the fly: to measure packing and reading with.

uhd-jax data stats --config=configs/uhd_v4.py --stage=stage4 --source=size_mix --option samples=12000
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from PIL import Image

from uhd_jax.config import ImageLimits
from uhd_jax.config.checks import require_at_least
from uhd_jax.data.chat import ImagePart, Message
from uhd_jax.slicing import image_io
from uhd_jax.slicing.sizes import Size

Kind = Literal["photos", "page_scans", "log_uniform"]
KINDS = ("photos", "page_scans", "log_uniform")

_PHOTOS = (
    (3024, 4032),
    (1536, 2048),
    (1365, 2048),
    (1080, 1920),
    (768, 1024),
    (720, 1280),
    (480, 640),
    (427, 640),
    (333, 500),
)
_PAPER_INCHES = ((11.69, 8.27), (11.0, 8.5), (8.27, 5.83))
_SCAN_DPI = (72, 100, 150, 200, 300)
_QUESTION = "What is this?"


@dataclasses.dataclass(frozen=True)
class SizeMixOptions:
    """Options of the source "size_mix" (`DataConfig.options`)."""

    samples: int = 3000
    kind: Literal["all", "photos", "page_scans", "log_uniform"] = "all"  # all: an equal mix of the three
    seed: int = 0

    def __post_init__(self):
        require_at_least(self, 1, "samples")
        require_at_least(self, 0, "seed")


class SizeMix:
    """One image, one question and one answer per sample; answers are log-normal, median 80 bytes, 4 to 1,500."""

    def __init__(self, options: SizeMixOptions, limits: ImageLimits = ImageLimits()):
        self._limits = limits
        count = options.samples
        kinds = KINDS if options.kind == "all" else (options.kind,)
        drawn = [draw_sizes(kind, -(-count // len(kinds)), options.seed) for kind in kinds]
        self._sizes = [size for together in zip(*drawn, strict=True) for size in together][:count]
        rng = np.random.default_rng((options.seed, 1))
        self._lengths = rng.lognormal(np.log(80), 0.8, count).clip(4, 1500).astype(int)

    def __len__(self) -> int:
        return len(self._sizes)

    def sizes(self, index: int) -> list[Size]:
        """The size of the image."""
        return [self._sizes[index]]

    def messages(self, index: int) -> tuple[Message, ...]:
        """The image, a question, and an answer that says nothing."""
        answer = ("word " * 300)[: self._lengths[index] - 1] + "."
        return Message("user", (ImagePart(0), _QUESTION)), Message("assistant", (answer,))

    def images(self, index: int) -> list[np.ndarray]:
        """A blurred pattern: uint8[H, W, 3]."""
        height, width = self._sizes[index]
        pattern = np.random.default_rng(index).integers(0, 256, (16, 16, 3), np.uint8)
        return [np.asarray(Image.fromarray(pattern).resize((width, height), Image.Resampling.BILINEAR))]

    def files(self, index: int) -> list[bytes]:
        """The image as a PNG."""
        return [image_io.read_bytes(image, self._limits) for image in self.images(index)]

    def where(self, index: int) -> str:
        """The number of the sample."""
        return f"size_mix, sample {index}"


def draw_sizes(kind: Kind, count: int, seed: int = 0) -> list[Size]:
    """Draws image sizes.

    Args:
      kind: "photos": camera, screen and web sizes, 7 of 10 landscape, 3 of 10 cropped; "page_scans": paper sizes at 72
        to 300 dpi, cut by up to 3 %, 1 of 7 landscape; "log_uniform": both sides log-uniform in 64 to 4096, aspect
        ratio at most 10.
      count: how many.
      seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    sizes = []
    while len(sizes) < count:
        if kind == "photos":
            height, width = np.array(_PHOTOS[rng.integers(len(_PHOTOS))]) * (
                rng.uniform(0.5, 1, 2) if rng.random() < 0.3 else 1
            )
            sideways = rng.random() < 0.3
        elif kind == "page_scans":
            paper = np.array(_PAPER_INCHES[rng.integers(len(_PAPER_INCHES))])
            height, width = paper * _SCAN_DPI[rng.integers(len(_SCAN_DPI))] * rng.uniform(0.97, 1, 2)
            sideways = rng.random() < 1 / 7
        else:
            height, width = np.exp(rng.uniform(np.log(64), np.log(4096), 2))
            sideways = False
            if max(height, width) > 10 * min(height, width):
                continue
        sizes.append(Size(int(width), int(height)) if sideways else Size(int(height), int(width)))
    return sizes
