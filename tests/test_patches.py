"""The bytes of a batch and the kernel for them give what pixels in the towers' order and their own kernel give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uhd_jax.config import TowerConfig
from uhd_jax.models.patches import for_bytes, normalise_bytes, normalise_patches


@pytest.mark.parametrize("kind", ["siglip2", "clip"])
def test_kernels_follow_the_bytes(kind):
    config = TowerConfig(kind, width=8, mlp_width=8, layers=2, heads=1, table_side=4, patch_size=6)
    random = np.random.default_rng(0)
    patches = random.integers(0, 256, (2, 5, config.patch_bytes), np.uint8)
    pixels = patches.reshape(2, 5, 6, 6, 4)[..., :3]
    expected = ((pixels / 255 - config.pixel_mean) / config.pixel_std).transpose(0, 1, 4, 2, 3).reshape(2, 5, -1)
    normalised = normalise_patches(jnp.asarray(patches), config)
    assert normalised.dtype == jnp.float32 and normalised.shape == (2, 5, config.patch_dim)
    np.testing.assert_allclose(normalised, expected, atol=1e-5, rtol=0)

    params = {"patch_embedding": {"kernel": jnp.asarray(random.normal(size=(config.patch_dim, 8)))}, "layers": 3}

    def embed(params, patches):
        made = for_bytes(params, config)
        assert made["layers"] == 3
        return normalise_bytes(patches, config) @ made["patch_embedding"]["kernel"]

    embedded = embed(params, patches)
    np.testing.assert_allclose(embedded, expected @ params["patch_embedding"]["kernel"], atol=1e-4, rtol=0)
    patches.reshape(2, 5, 36, 4)[..., 3] ^= 255  # means nothing
    np.testing.assert_array_equal(embed(params, patches), embedded)
    gradient = jax.grad(lambda kernel: embed({**params, "patch_embedding": {"kernel": kernel}}, patches).sum())
    found = gradient(params["patch_embedding"]["kernel"])
    np.testing.assert_allclose(found, np.tile(expected.sum((0, 1))[:, None], 8), atol=1e-3, rtol=0)


def test_every_byte_is_the_processors_value():
    """Compiled, to the last bit: a product with the rounded 1 / 255 would be off for most of them."""
    config = TowerConfig(width=8, mlp_width=8, layers=2, heads=1, table_side=4, patch_size=8)
    patches = np.repeat(np.arange(256, dtype=np.uint8), 4).reshape(4, 256)
    found = jax.jit(lambda patches: normalise_bytes(patches, config))(patches).reshape(256, 4)[:, 0]
    bytes_ = np.arange(256, dtype=np.float32)
    np.testing.assert_array_equal(found, (bytes_ / np.float32(255) - np.float32(0.5)) / np.float32(0.5))
