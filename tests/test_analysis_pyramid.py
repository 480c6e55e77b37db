"""The picture of the pyramid."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from image_files import photo
from PIL import Image

from uhd_jax.analysis.pyramid import main, principal_colours, view_levels
from uhd_jax.checkpoint import save_model
from uhd_jax.config import ConfigError, PyramidConfig, SlicingConfig
from uhd_jax.models import uhd

pytestmark = pytest.mark.usefixtures("unoptimised")

HIWIN = tiny.KINDS["hiwin"]
MODEL = dataclasses.replace(
    HIWIN,
    connector=dataclasses.replace(HIWIN.connector, pyramid=PyramidConfig(5)),
    slicing=SlicingConfig(rule="v1", scale_resolution=8),
)


def test_a_picture_from_the_command_line(tmp_path):
    params = jax.jit(lambda: uhd.init_params(MODEL, jax.random.key(0)))()
    save_model(tmp_path / "model", params, MODEL)
    photo(40, 60).save(tmp_path / "photo.png")
    main([str(tmp_path / "photo.png"), f"--checkpoint={tmp_path / 'model'}", f"--out={tmp_path / 'out.png'}"])
    assert np.asarray(Image.open(tmp_path / "out.png").convert("L")).std() > 5
    view, made, plain = view_levels(params, MODEL, np.asarray(photo(40, 60)))
    rows, cols = made[0].shape[:2]
    assert view.shape == (2 * rows, 2 * cols, 3)
    assert [level.shape[:2] for level in made] == [(rows, cols), (2 * rows, 2 * cols), (4 * rows, 4 * cols)]
    assert [level.shape for level in plain] == [level.shape for level in made]
    np.testing.assert_array_equal(made[0], plain[0])
    # In the middle of 2x2 cells the bilinear map has their mean.
    np.testing.assert_allclose(plain[1][1:3, 1:3].mean((0, 1)), plain[0][:2, :2].mean((0, 1)), atol=1e-5)
    without = dataclasses.replace(MODEL, connector=dataclasses.replace(MODEL.connector, pyramid=PyramidConfig(1)))
    with pytest.raises(ConfigError, match="level 0 alone"):
        view_levels(params, without, np.asarray(photo(40, 60)))


def test_colours_follow_the_largest_variance_and_are_shared():
    random = np.random.default_rng(0)
    first = random.normal(size=(6, 7, 5)) * np.array([0.1, 9, 0.1, 3, 1])
    small = first[:2, :3]
    colours, of_small = principal_colours([first, small])
    np.testing.assert_allclose(of_small, colours[:2, :3])
    assert colours.min() >= 0 and colours.max() <= 1
    assert abs(np.corrcoef(colours[..., 0].ravel(), first[..., 1].ravel())[0, 1]) > 0.95
