"""`convert verify`: what it says of a good import, of a damaged one, and of sources that cannot run."""

from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
import pytest
from command_line import call
from hf46 import make_checkpoint
from safetensors.numpy import load_file, save_file

from uhd_jax.analysis.comparison import Comparison, Report, compare_features, compare_logits
from uhd_jax.analysis.verify import VerifyError, made_images, verify
from uhd_jax.cli.convert import _abstract_of
from uhd_jax.config import ChatConfig
from uhd_jax.convert.minicpmv46_files import chat_template
from uhd_jax.convert.source import open_source
from uhd_jax.convert.tables import ConvertError
from uhd_jax.convert.transfer import import_model, recognise

pytest.importorskip("transformers")
pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("unoptimised")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint and its import."""
    source, imported = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("import") / "model"
    make_checkpoint(source, "qwen3_5_text", tied=True)
    (source / "chat_template.jinja").write_text(chat_template(ChatConfig()))
    with open_source(source) as opened:
        import_model(opened, imported, recognise(opened, _abstract_of))
    return source, imported


def test_a_good_import(folders):
    report = verify(*folders)
    assert [c.images for c in report.comparisons] == [2, 2, 0]
    loadable = importlib.util.find_spec("torchvision") is not None
    assert [c.same_ids for c in report.comparisons] == [True if loadable else None] * 3
    summary = report.summary()
    assert summary["max_abs"] < 1e-3 and summary["max_kl"] < 1e-6 and summary["top1_agreement"] == 1
    assert summary["positions"] == sum(len(c.kl) for c in report.comparisons)
    text = str(report)
    assert "100.0%" in text and len(text.splitlines()) == 5
    assert summary["parts"] == ["model"] and summary["max_relative"] is None and summary["not_compared"] == []
    assert ("the same" if loadable else "not compared") in text


def test_a_damaged_import_shows(folders, tmp_path):
    source, imported = folders
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in source.iterdir():
        (damaged / path.name).symlink_to(path)
    tensors = load_file(source / "model.safetensors")
    name = "model.vision_tower.vit_merger.linear_2.weight"
    tensors[name] = tensors[name][::-1].copy()
    (damaged / "model.safetensors").unlink()
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with_images, _, without = verify(damaged, imported).comparisons
    assert with_images.max_abs.max() > 0.01 and with_images.kl.max() > 1e-6
    assert without.max_abs.max() < 1e-3


def test_the_command_line(folders, capsys, image_file):
    source, imported = map(str, folders)
    arguments = ["convert", "verify", source, imported, "--image", image_file, "--prompt", "Why?"]
    status, out, _ = call(capsys, *arguments, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["top1_agreement"] == 1 and len(found["comparisons"]) == 1
    (prompt,) = found["comparisons"]
    assert len(prompt["kl"]) == len(prompt["max_abs"]) == len(prompt["same_top"]) == found["positions"]


def test_the_verdict():
    def problem(kl, same_ids=None):
        figures = np.array([1e-3, kl]), np.array([0.0, kl]), np.array([True, True])
        return Report("source", "model", (Comparison("model", "Why?", 0, *figures, same_ids=same_ids),)).problem

    assert problem(1e-6) is None
    assert problem(0.5) == "logits of 'Why?' differ at position 1: KL 5.0e-01, above 1e-04"
    assert "not finite" in problem(np.nan)
    assert "other ids" in problem(1e-6, same_ids=False)
    features = compare_features(np.array([[3.0, 4.0], [3.0, 4.1]]), np.array([[3.0, 4.0], [3.0, 4.0]]))
    np.testing.assert_allclose(features["relative"], [0, 0.02])
    of_tower = Report("source", "model", (Comparison("tower", "image 1", 1, **features),), ("the rest",))
    assert of_tower.problem == "features of 'image 1' differ at position 1: relative difference 2.0e-02, above 1e-03"
    assert of_tower.summary()["max_kl"] is None and "not compared: the rest" in str(of_tower)


def test_another_model_is_refused(folders, tmp_path):
    source, _ = folders
    other = tmp_path / "other"
    make_checkpoint(other, "qwen3", tied=False)
    assert "differ at position" in verify(source, other, prompts=["Why?"]).problem


def test_compare_logits():
    theirs = np.log([[0.5, 0.5], [0.25, 0.75]])
    ours = np.log([[0.25, 0.75], [0.25, 0.75]]) + 3
    max_abs, kl, same = compare_logits(ours, theirs).values()
    np.testing.assert_allclose(max_abs, [3 + np.log(1.5), 3])
    np.testing.assert_allclose(kl, [0.5 * np.log(2) + 0.5 * np.log(2 / 3), 0], atol=1e-12)
    assert same.tolist() == [False, True]


def test_made_images_are_always_the_same():
    assert [picture.shape for picture in made_images()] == [(420, 980, 3), (150, 100, 3)]
    assert all((a == b).all() for a, b in zip(made_images(), made_images(), strict=True))


def test_sources_that_cannot_run(folders, tmp_path, monkeypatch):
    source, imported = folders
    with pytest.raises(ConvertError, match="no weights there"):
        verify(tmp_path, imported)
    for path in source.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConvertError, match=r"config.json: not JSON"):
        verify(tmp_path, imported)
    fields = json.loads((source / "config.json").read_text())
    fields["text_config"]["linear_num_value_heads"] = 3
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConvertError, match="linear_num_value_heads"):
        verify(tmp_path, imported)
    fields["text_config"]["linear_num_value_heads"] = 4
    fields["pad_token_id"] = ["x"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(VerifyError, match=r"transformers .* cannot load it"):
        verify(tmp_path, imported)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(VerifyError, match="pip install torch transformers"):
        verify(source, imported)
