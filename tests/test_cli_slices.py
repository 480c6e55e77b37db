"""`uhd-jax slices`: what it prints, draws and refuses."""

from __future__ import annotations

import json

import pytest
from command_line import assert_one_line, call
from PIL import Image

from uhd_jax.slicing import viewer


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["--size=1344x896"],
            {"grid": [3, 2], "thumbnail": [560, 392], "slice": [448, 448], "views": 7, "patches": 7264},
        ),
        (["--size", "300x400"], {"grid": [0, 0], "slice": None, "views": 1, "visual_tokens": 63}),
        (["--size=640x480", "--mode=4x"], {"grid": [2, 1], "slice": [364, 560], "visual_tokens": 772}),
        (["--size=3024x4032", "--max-slices=2"], {"grid": [1, 2], "views": 3}),
    ],
)
def test_slices_as_json(capsys, flags, expected):
    status, out, _ = call(capsys, "slices", "--json", *flags)
    assert status == 0
    plan = json.loads(out)
    assert {key: plan[key] for key in expected} == expected


def test_slices_as_a_table(capsys, image_file):
    status, out, _ = call(capsys, "slices", image_file)
    assert status == 0
    assert "600x900" in out.splitlines()[0]
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["thumbnail", "slice", "together"]


def test_slices_follow_the_configuration(capsys, config_file):
    argv = ("slices", "--size=224x336", "--json", f"--config={config_file}")
    plan = json.loads(call(capsys, *argv)[1])
    assert (plan["grid"], plan["visual_tokens"]) == ([2, 3], 28)
    plan = json.loads(call(capsys, *argv, "--config.model.slicing.max_slices=4")[1])
    assert plan["grid"] == [2, 2]


def test_slices_of_other_rules(capsys, config_file, image_file, tmp_path):
    config = (f"--config={config_file}", "--config.model.slicing.rule=v1")
    argv = ("slices", image_file, *config, "--config.model.slicing.overview=False", f"--out={tmp_path / 'a.png'}")
    status, out, _ = call(capsys, *argv, "--config.model.slicing.pre_resize.long_side=300")
    assert status == 0 and (tmp_path / "a.png").exists()
    assert "first resized to 200x300" in out.splitlines()[0]
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["slice", "together"]
    changes = {"slicing.rule": "v1_legacy", "slicing.scale_resolution": 168, "tower.patch_size": 7, "mode": "4x"}
    legacy = (f"--config={config_file}", *(f"--config.model.{key}={value}" for key, value in changes.items()))
    lines = call(capsys, "slices", "--size=219x259", *legacy)[1].splitlines()[2:]
    assert [line.split()[0] for line in lines] == ["thumbnail", "slice", "slice", "slice", "together"]
    assert sum(int(line.split()[1]) for line in lines[:-1]) == int(lines[-1].split()[1]) == 5


def test_slices_draws(capsys, image_file, tmp_path):
    out = tmp_path / "slices.png"
    assert call(capsys, "slices", image_file, f"--out={out}")[0] == 0
    with Image.open(out) as picture:
        assert picture.format == "PNG" and picture.width > 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.png", "slices.png"]


@pytest.mark.parametrize(
    ("argv", "status", "part"),
    [
        ([], 2, "IMAGE or --size"),
        (["a.png", "--size=3x3"], 2, "IMAGE or --size"),
        (["--size=3x3", "--out=a.png"], 2, "IMAGE"),
        (["--size=3by3"], 2, "HEIGHTxWIDTH"),
        (["--size=3x3", "--max-slices=0"], 2, "'0'"),
        (["--size=3x3", "--mode=2x"], 2, "'2x'"),
        (["--size=20000x20"], 1, "20000x20"),
        (["--size=0x20"], 1, "0x20"),
        (["missing.png"], 1, "missing.png"),
        (["--size=3x3", "--config"], 2, "--config needs a value"),
        (["--size=3x3", "--config=missing.py"], 1, "missing.py"),
        (["--size=3x3", "--config.model.mode=4x"], 2, "no --config=FILE.py"),
    ],
)
def test_slices_refuses(capsys, argv, status, part):
    got, out, err = call(capsys, "slices", *argv)
    assert (got, out) == (status, "")
    assert_one_line(err, part)


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_slices_refuses_files(capsys, tmp_path, image_file, content):
    path = tmp_path / "bad.png"
    with open(image_file, "rb") as file:
        path.write_bytes(file.read()[:2000] if content is None else content)
    for flags in ([], ["--json"], [f"--out={tmp_path / 'out.png'}"]):
        status, out, err = call(capsys, "slices", str(path), *flags)
        assert (status, out) == (1, "")
        assert_one_line(err, "bad.png")
    assert not (tmp_path / "out.png").exists()


def test_the_picture_is_headed_by_the_name_of_the_file(capsys, image_file, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(
        viewer, "draw_slices", lambda image, plan, title: titles.append(title) or Image.new("RGB", (9, 9))
    )
    assert call(capsys, "slices", image_file, f"--out={tmp_path / 'out.png'}")[0] == 0
    assert titles == ["image.png"]
