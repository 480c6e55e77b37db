"""What happens to an image along one axis, as a matrix: enlargement, jitter, blur.

All of these are linear and separable: a chain of them is one matrix product from the left and one from the right, and
where only some pixels or channels of the result are needed, only those are made.
Source: the pre-training of VDIM (spec v1-v2 section 3.4).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from uhd_jax.ops.neighbourhood import reflected

BLUR_RADIUS, BLUR_SIGMA = 2, 1.0


def bilinear_axis(size: int, source: int) -> np.ndarray:
    """float32[size, source]: torch's bilinear interpolation, half-pixel centres, border cells repeated."""
    position = np.clip((np.arange(size) + 0.5) * source / size - 0.5, 0, source - 1)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(source))).astype(np.float32)


def blur_axis(size: int) -> np.ndarray:
    """float32[size, size]: a Gaussian over five pixels, reflected at the border."""
    offsets = np.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
    weights = np.exp(-(offsets**2) / (2 * BLUR_SIGMA**2))
    padded = np.pad(np.arange(size), BLUR_RADIUS, mode="reflect" if size > 1 else "edge")
    matrix = np.zeros((size, size))
    for number, weight in enumerate(weights / weights.sum()):
        matrix[np.arange(size), padded[number : number + size]] += weight
    return matrix.astype(np.float32)


def jitter_axis(size: int, pad: int, zoom: jax.Array, offset: jax.Array, flip: jax.Array) -> jax.Array:
    """float32[size, size]: pad by reflection, enlarge bilinearly, cut `size` pixels out, and perhaps turn them round.

    Args:
      size: pixels of the axis.
      pad: pixels on either side.
      zoom: float32[], at least 1; coordinates are scaled by exactly 1 / zoom, as torch does for a given scale factor.
      offset: int32[], first pixel that is cut out of the enlarged axis.
      flip: bool[].
    """
    pixel = jnp.arange(size)
    pixel = jnp.where(flip, size - 1 - pixel, pixel)
    position = jnp.maximum((1 / zoom) * (pixel + offset + 0.5) - 0.5, 0)
    low = jnp.floor(position)
    fraction = position - low
    matrix = jnp.zeros((size, size))
    for tap, weight in ((0, 1 - fraction), (1, fraction)):
        padded = jnp.minimum(low.astype(jnp.int32) + tap, size + 2 * pad - 1)
        source = reflected((padded - pad)[None], jnp.asarray([size]))[0]
        matrix += jnp.where(source[:, None] == jnp.arange(size), weight[:, None], 0)
    return matrix
