"""Sizes and grids as typed pairs, and which image sizes are refused."""

from __future__ import annotations

from typing import NamedTuple

from uhd_jax.config import ImageLimits


class Size(NamedTuple):
    """An image or view size in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


class Grid(NamedTuple):
    """A number of rows and columns: of slices, or of patches in a view."""

    rows: int
    cols: int

    @property
    def area(self) -> int:
        """rows x cols."""
        return self.rows * self.cols

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}"


class ImageRefused(ValueError):
    """The image cannot be used: unreadable, hostile, or of a size outside the configured limits."""


def check_size(size: Size, limits: ImageLimits) -> None:
    """Raises `ImageRefused` when an image of `size` breaks the limits on sides, pixels or aspect ratio."""
    height, width = size
    if min(size) < 1:
        raise ImageRefused(f"size {height}x{width}: an image needs at least one pixel on each side")
    if max(size) > limits.max_side:
        raise ImageRefused(f"size {height}x{width}: a side is above max_side={limits.max_side}; shrink the image")
    if height * width > limits.max_pixels:
        raise ImageRefused(
            f"size {height}x{width}: {height * width} pixels are above max_pixels={limits.max_pixels}; shrink the image"
        )
    if max(size) > min(size) * limits.max_aspect_ratio:
        raise ImageRefused(
            f"size {height}x{width}: the aspect ratio {max(size) / min(size):.0f} is above "
            f"max_aspect_ratio={limits.max_aspect_ratio:g}; crop the image or cut it into several"
        )
