"""Where a model looks: weights of its attentions, and where they lie on the image."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny
from command_line import call
from PIL import Image

import uhd_jax
from uhd_jax.analysis import looking
from uhd_jax.config import CompressorConfig, ModelConfig, PyramidConfig, SlicingConfig, TowerConfig
from uhd_jax.data.tokenizer import byte_tokenizer
from uhd_jax.generation.assistant import Assistant
from uhd_jax.models import uhd
from uhd_jax.slicing.plan import Grid, Size, ViewPlan, plan_image

pytestmark = pytest.mark.usefixtures("unoptimised")

_OWN = {"slicing": SlicingConfig(scale_resolution=112), "dtype": "float32"}
_DECODER = dataclasses.replace(tiny.MODEL.decoder, vocab_size=272, layers=1)
_TOWER = TowerConfig(width=16, mlp_width=24, layers=2, heads=2, table_side=7)


def _with(kind: str) -> ModelConfig:
    """A tiny model with another connector, of 2 x 2 queries."""
    config = tiny.KINDS[kind]
    tower = dataclasses.replace(config.tower, patch_size=14)
    connector = dataclasses.replace(config.connector, query_side=2)
    if kind == "perceiver":  # v1's has no pyramid
        connector = dataclasses.replace(connector, pyramid=PyramidConfig())
    return dataclasses.replace(config, decoder=_DECODER, tower=tower, connector=connector, **_OWN)


CONFIGS = {
    "v4": ModelConfig(decoder=_DECODER, tower=_TOWER, compressor=CompressorConfig(after_layer=0), **_OWN),
    "hiwin": _with("hiwin"),
}
IMAGE = np.random.default_rng(0).integers(0, 256, (112, 224, 3), np.uint8)


def silenced(tree, name="query"):
    """The parameters with every projection of that name zero: then all keys weigh the same."""

    def change(path, leaf):
        return leaf * 0 if any(getattr(key, "key", None) == name for key in path) else leaf

    return jax.tree_util.tree_map_with_path(change, tree)


def make(config):
    params = jax.eval_shape(lambda: uhd.init_params(config, jax.random.key(3)))
    return Assistant(config, tiny.random_params(params), byte_tokenizer(), max_length=4000)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return make(CONFIGS[request.param])


@pytest.mark.parametrize(("kind", "shape"), [("spatial_resampler", (24, 24)), ("perceiver", (8, 8))])
def test_where_the_resamplers_of_v1_look(kind, shape):
    looked = looking.look(make(_with(kind)), IMAGE[:, :112], "What?", answer="a")
    [(name, [laid])] = looked.inside.items()
    assert name == "resampler: mean over its queries" and laid.shape == shape
    assert laid.mean() == pytest.approx(1, abs=1e-5) and laid.std() > 0.01


def test_weights_are_those_of_the_model(model):
    looked = looking.look(model, IMAGE, "What?", answer="a cat")
    plan = looked.plan
    assert plan.grid == Grid(1, 2) and len(plan.views) == 3
    assert [text for text, _ in looked.tokens][:5] == list("a cat")
    [maps] = looked.inside.values()
    name = next(iter(looked.inside))
    if "compressor" in name:
        for view, laid in zip(plan.views, maps, strict=True):
            windows = laid.reshape(view.patch_grid.rows // 2, 2, view.patch_grid.cols // 2, 2).mean(axis=(1, 3))
            np.testing.assert_allclose(windows, 1, atol=1e-5)
    else:
        assert [laid.shape for laid in maps] == [(24, 24)] * 3
        assert [laid.mean() for laid in maps] == pytest.approx([1] * 3)
    assert max(laid.std() for laid in maps) > 0.01
    answering = np.concatenate([laid.ravel() for laid in looked.answering])
    assert answering.size == plan.visual_tokens and answering.mean() == pytest.approx(1, abs=1e-5)
    assert 0 < looked.visual_share < 1 and answering.std() > 0.01
    each = np.mean([np.concatenate([laid.ravel() for laid in maps]) for _, maps in looked.tokens], axis=0)
    assert np.corrcoef(each, answering)[0, 1] > 0.8

    even = Assistant(model.config, silenced(model.params), model.tokenizer, model.max_length)
    looked = looking.look(even, IMAGE, "What?", answer="a cat")
    length = len(even.prepare("What?", [IMAGE]).token_ids)
    shares = [plan.visual_tokens / (length + number) for number in range(len(looked.tokens))]
    assert looked.visual_share == pytest.approx(np.mean(shares), rel=1e-5)
    for maps in (*looked.inside.values(), looked.answering):
        for laid in maps:
            np.testing.assert_allclose(laid, 1, atol=1e-5)


def test_patches_in_merge_order_are_laid_where_they_stand():
    config = CONFIGS["v4"]
    plan = plan_image(Size(112, 112), config)
    [view] = plan.views
    weights = np.zeros(64, np.float32)
    weights[[1, 4, 16]] = 1  # right in the first window; first of the second window; first of the second 4x4 block
    laid = looking._in_patches(weights, view, plan)
    assert sorted(zip(*np.nonzero(laid), strict=True)) == [(0, 1), (0, 2), (0, 4)] and laid.max() == 4


def test_levels_of_a_perceiver_fall_on_their_patches():
    config = tiny.KINDS["perceiver"]
    view = ViewPlan(Size(0, 0), Grid(1, 2), 0)
    levels, room = config.connector.pyramid.levels, 4
    weights = np.zeros((1, room * sum(4**level for level in levels)), np.float32)
    start = sum(room * 4**level for level in levels if level < 1)
    weights[0, start + 2] = 1  # of level 1, which is 2 x 4: first row, third column
    np.testing.assert_allclose(looking._of_perceiver(weights, view, config), [[0, 2]])


def test_slices_are_tiled_over_the_image():
    plan = plan_image(Size(112, 224), CONFIGS["v4"])
    tiled = looking.tiled([np.array([[1.0], [2.0]]), np.array([[3.0, 4.0]])], plan, Size(4, 8))
    np.testing.assert_array_equal(tiled[0], [1, 1, 1, 1, 3, 3, 4, 4])
    np.testing.assert_array_equal(tiled[3], [2, 2, 2, 2, 3, 3, 4, 4])


def test_a_picture_from_the_command_line(tmp_path, capsys, monkeypatch):
    model = make(CONFIGS["v4"])
    Image.fromarray(IMAGE).save(tmp_path / "page.png")
    monkeypatch.setitem(vars(uhd_jax), "load", lambda directory: model)
    argv = ["look", "--checkpoint=m", f"--image={tmp_path}/page.png", "--prompt=What?", "--answer=a cat"]
    status, out, err = call(capsys, *argv, f"--out={tmp_path}/looked.png", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["answer"] == "a cat" and len(found["maps"]) == 2 and found["plan"]["grid"] == [1, 2]
    with Image.open(tmp_path / "looked.png") as picture:
        assert min(picture.size) > 300
