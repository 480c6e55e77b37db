"""From the bytes of a batch to what a tower sees.

Bytes stand as Pillow keeps them, (y, x, channel) with a fourth channel that means nothing; towers and their checkpoints
have (channel, y, x). For the patch embedding not the pixels are put in order but the rows of its kernel, of which there
are few: pixels would be copied whole, and their short axes padded to tiles of the device.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uhd_jax.config import TowerConfig

# 1 / 255 in two parts. Times a byte the first, of 16 bits, is exact, so that the sum of both is x / 255 well rounded.
_HIGH = np.float32(round(2**23 / 255) / 2**23)
_LOW = np.float32(1 / 255 - float(_HIGH))


def normalise_bytes(patches: jax.Array, config: TowerConfig) -> jax.Array:
    """uint8[.., patch_bytes] -> float32 with the tower's mean and deviation; on device, so that bytes travel.

    (x / 255 - mean) / std as the processors of the checkpoints have it, for SigLIP's values bit for bit. Compilers turn
    x / 255 into a product with the rounded 1 / 255: most bytes then err by the same little upwards, which all pixels
    share and deep models magnify.
    """
    pixels = config.patch_size**2
    mean, std = np.tile((*config.pixel_mean, 0.0), pixels), np.tile((*config.pixel_std, 1.0), pixels)
    x = patches.astype(jnp.float32)
    unit = x * _HIGH + x * _LOW
    return (unit - mean.astype(np.float32)) / std.astype(np.float32)


def normalise_patches(patches: jax.Array, config: TowerConfig) -> jax.Array:
    """uint8[.., patch_bytes] -> float32[.., patch_dim] normalised, (channel, y, x)."""
    *views, _ = patches.shape
    pixels = normalise_bytes(patches, config).reshape(*views, config.patch_size**2, 4)
    return jnp.swapaxes(pixels[..., :3], -1, -2).reshape(*views, config.patch_dim)


def for_bytes(tower: dict[str, Any], config: TowerConfig) -> dict[str, Any]:
    """A tower's parameters for patches as of `normalise_bytes`.

    Args:
      tower: with patch_embedding/kernel, float[patch_dim, D].
      config: of the tower.

    Returns:
      The same with float[patch_bytes, D] there, of which every fourth row is zero.
    """
    embedding = tower["patch_embedding"]
    rows = jnp.swapaxes(embedding["kernel"].reshape(3, config.patch_size**2, -1), 0, 1)
    kernel = jnp.pad(rows, ((0, 0), (0, 1), (0, 0))).reshape(config.patch_bytes, -1)
    return {**tower, "patch_embedding": {**embedding, "kernel": kernel}}
