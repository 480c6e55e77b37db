"""The source of images without text: which files, in which order, how they are cut, and a run that trains on them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command_line import call
from image_files import photo
from PIL import Image

from uhd_jax.checkpoint import load_model
from uhd_jax.cli.configs import load_file
from uhd_jax.config import ConfigError, DataConfig
from uhd_jax.data.images import NoImages
from uhd_jax.data.sources import check_data, make_source
from uhd_jax.slicing.plan import ImageRefused, Size


def source(folder, **options):
    return make_source(DataConfig("images", {"path": str(folder), **options}))


@pytest.fixture
def folder(tmp_path):
    """Images in nested folders, and files that are none."""
    for name in ("b.PNG", "a/z.jpeg", "a/b/y.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        photo().save(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "png").write_text("no image either")
    return tmp_path


def test_images_below_a_folder_in_the_order_of_their_paths(folder):
    found = source(folder)
    assert [found.where(index) for index in range(len(found))] == [
        str(folder / name) for name in ("a/b/y.webp", "a/z.jpeg", "b.PNG")
    ]
    assert found.sizes(2) == [Size(37, 53)]
    np.testing.assert_array_equal(found.images(2)[0], photo())


def test_links_are_followed_once(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    photo().save(elsewhere / "x.png")
    (folder / "a" / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    assert len(source(folder)) == 4


@pytest.mark.parametrize("size", [(60, 120), (120, 60), (61, 90)])
def test_a_crop_is_the_square_in_the_middle_of_the_resized_image(tmp_path, size):
    height, width = size
    photo(height, width).save(tmp_path / "x.png")
    found = source(tmp_path, crop=30)
    assert found.sizes(0) == [Size(30, 30)]
    cropped = found.images(0)[0]
    assert cropped.shape == (30, 30, 3)
    if height % 30 == width % 30 == 0:
        resized = np.asarray(photo(height, width).resize((width // 2, height // 2), Image.Resampling.BICUBIC), int)
        top, left = (height // 2 - 30) // 2, (width // 2 - 30) // 2
        np.testing.assert_allclose(cropped, resized[top : top + 30, left : left + 30], atol=1)  # rounded in between


def test_damaged_images_are_refused_by_name(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ImageRefused, match=r"broken\.png"):
        source(tmp_path, crop=8).sizes(0)


def test_folders_without_images(tmp_path):
    with pytest.raises(NoImages, match=r"holds no file named \*\.bmp"):
        source(tmp_path)
    with pytest.raises(NoImages, match="nowhere: there is no such folder"):
        source(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"data\.options\.crop: must be at least 0"):
        check_data(DataConfig("images", {"path": "x", "crop": -1}))


def test_the_full_size_run_has_the_model_that_goes_on_from_it():
    for options in ("", "13b,mask=5", "qwen2,paper"):
        here, there = load_file(f"configs/uhd_v2_vdim.py:{options}"), load_file(f"configs/uhd_v2.py:{options}")
        assert here.model == there.model
        (stage,) = here.train.stages
        assert (stage.objective, stage.steps, stage.rows, stage.learning_rate) == ("reconstruction", 2000, 16, 1e-3)
    released = load_file("configs/uhd_v2_vdim.py:released,images=here").train.stages[0]
    assert released.reconstruction.form == "released" and released.data.options["path"] == "here"
    with pytest.raises(ConfigError, match="'nonsense'"):
        load_file("configs/uhd_v2_vdim.py:nonsense")


@pytest.mark.usefixtures("unoptimised", "compiled_once")
def test_the_full_size_run_in_small(folder, tmp_path_factory, capsys):
    """Every layer of it on noise, through the command line; stopped, started again."""
    workdir = tmp_path_factory.mktemp("run")
    small = {
        "model.dtype": "float32",
        "model.tower.width": 16,
        "model.tower.mlp_width": 16,
        "model.tower.layers": 2,
        "model.tower.heads": 2,
        "model.tower.table_side": 4,
        "model.connector.heads": 2,
        "model.connector.query_side": 2,
        "model.decoder.width": 16,
        "model.decoder.mlp_width": 16,
        "model.decoder.layers": 1,
        "model.decoder.heads": 2,
        "model.decoder.kv_heads": 2,
        "model.decoder.head_dim": 8,
        "model.slicing.scale_resolution": 56,
        "train.checkpoint_every": 1,
        "train.log_every": 1,
        "train.packing_window": 16,
        "train.stages[0].rows": 8,
        "train.stages[0].data.options.crop": 56,
        "train.stages[0].buckets[0].patches": 16,
    }
    config = f"--config=configs/uhd_v2_vdim.py:mask=3,images={folder}"
    argv = ["train", config, f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in small.items())]
    for steps in (1, 2):
        status, _, shown = call(capsys, *argv, f"--config.train.stages[0].steps={steps}")
        assert status == 0, shown
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["loss"] is not None and line["grad_norm"] > 0 for line in lines)
    assert set(load_model(workdir)[0]) == {"tower", "connector", "decoder"}
