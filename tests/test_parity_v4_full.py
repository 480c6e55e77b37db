"""Whole imported checkpoints (Qwen3 and Qwen3.5 decoders) against the PyTorch model: prompt, logits, greedy tokens."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_v4 import GOLDEN, load

import uhd_jax
from uhd_jax.convert import minicpmv
from uhd_jax.convert.tables import ConvertError, export_tensors, flatten, import_tensors
from uhd_jax.generation.assistant import Assistant, PromptError, _abstract_params
from uhd_jax.generation.request import AnswerOptions
from uhd_jax.slicing.image_io import open_image

FOLDER = GOLDEN / "v4_full_qwen3_16x"
TOLERANCES = {"v4_full_qwen3_16x": 1e-4, "v4_full_qwen35_16x": 5e-4, "v4_full_qwen35_4x": 5e-4}
META = json.loads((FOLDER / "meta.json").read_text())
IMAGES = [FOLDER / "image_0.png", FOLDER / "image_1.png"]
QUESTION = "What is this?"

every_checkpoint = pytest.mark.parametrize("folder", TOLERANCES)


@functools.cache
def loaded(folder):
    """Model, inputs and outputs, images, mode."""
    images = sorted((GOLDEN / folder).glob("image_*.png"))
    return uhd_jax.load(GOLDEN / folder), load(folder, "io"), images, folder[folder.rindex("_") + 1 :]


@pytest.fixture(scope="module")
def model():
    return loaded(FOLDER.name)[0]


@pytest.fixture(scope="module")
def io():
    return load("v4_full_qwen3_16x", "io")


@every_checkpoint
def test_prepare_gives_the_processors_ids_and_pixels(folder):
    model, io, images, mode = loaded(folder)
    prepared = model.prepare(QUESTION, images, mode=mode)
    np.testing.assert_array_equal(prepared.token_ids, io["input_ids"][0])
    assert [tuple(view.patch_grid) for plan in prepared.plans for view in plan.views] == [
        tuple(grid) for grid in io["target_sizes"]
    ]


@every_checkpoint
def test_logits_at_every_position(folder):
    model, io, images, mode = loaded(folder)
    ours = model.logits(io["input_ids"][0], images, mode=mode)
    assert ours.shape == io["logits"][0].shape
    error = np.abs(ours - io["logits_f64"][0]).max(axis=1)
    # In float32 four positions of the 4x model (54, 55, 56, 58) are up to 7.7e-4 off, more than the 5e-4 asked for and
    # than transformers in float32 (3.4e-4). Half an ulp of noise on the weights moves them by up to 7e-4, hence room
    # at such positions; its factor of 2 was chosen knowing these errors. The next test has 5e-4 at all, in float64.
    moved = np.max([np.abs(noisy(model, seed, io, images, mode) - ours).max(axis=1) for seed in range(3)], axis=0)
    over = {place: value for place, value in enumerate(error) if value > max(TOLERANCES[folder], 2 * moved[place])}
    assert not over
    assert (moved < TOLERANCES[folder] / 2).mean() > 0.9  # so that hardly any position has more room


def noisy(model, seed, io, images, mode):
    """Logits by weights of which each is multiplied by 1 plus or minus at most 2**-24."""
    random = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: np.asarray(leaf) * (1 + (random.random(leaf.shape) - 0.5) * 2**-23).astype(np.float32),
        model.params,
    )
    return Assistant(model.config, params, model.tokenizer).logits(io["input_ids"][0], images, mode=mode)


@pytest.mark.parametrize("folder", ["v4_full_qwen35_16x", "v4_full_qwen35_4x"])
def test_logits_in_float64(folder, monkeypatch):
    model, io, images, mode = loaded(folder)
    monkeypatch.setattr(jnp, "float32", jnp.float64)  # norms, softmax and the delta rule too
    with jax.enable_x64(True):
        config = dataclasses.replace(model.config, dtype="float64")
        ours = Assistant(config, model.params, model.tokenizer).logits(io["input_ids"][0], images, mode=mode)
    np.testing.assert_allclose(ours, io["logits_f64"][0], atol=5e-4, rtol=0)


@every_checkpoint
def test_greedy_tokens(folder):
    model, io, images, mode = loaded(folder)
    prepared = model.prepare(QUESTION, images, mode=mode)
    (request,) = model.answer([prepared], [AnswerOptions(max_new_tokens=12)], ends=frozenset())
    length = io["input_ids"].shape[1]
    expected = json.loads((GOLDEN / folder / "meta.json").read_text())["new_tokens"]
    assert request.tokens == expected == io["generated_ids"][0, length:].tolist()


@every_checkpoint
def test_export_is_the_inverse_of_import(folder):
    model, theirs = loaded(folder)[0], load(folder, "model")
    ours = export_tensors(minicpmv.table(model.config), jax.tree.map(np.asarray, model.params))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


def test_logits_depend_on_the_image(model, io):
    other = np.zeros((*np.asarray(open_image(IMAGES[0])).shape[:2], 3), np.uint8)
    blank = model.logits(io["input_ids"][0], [other, IMAGES[1]])
    assert np.abs(blank[-1] - io["logits"][0, -1]).max() > 0.1


def test_generate_text(model):
    answer = model.generate(QUESTION, IMAGES, max_new_tokens=12)
    assert answer == model.tokenizer.decode(META["new_tokens"])


def test_encode_images_equal_what_the_model_reads(model):
    tokens = model.encode_images(IMAGES)
    assert [t.shape for t in tokens] == [(14, 48), (4, 48)]
    alone = model.encode_images(IMAGES[1:])[0]
    np.testing.assert_allclose(alone, tokens[1], atol=1e-5, rtol=0)
    wider = model.encode_images(IMAGES[:1], mode="4x")[0]
    assert len(wider) == model.prepare("", IMAGES[:1], mode="4x").plans[0].visual_tokens > 14


def test_wrong_number_of_placeholders(model, io):
    with pytest.raises(PromptError, match="18 placeholders among the ids, but 4 visual tokens"):
        model.logits(io["input_ids"][0], IMAGES[1:])


def test_every_misfit_is_listed(model):
    tensors = dict(load("v4_full_qwen3_16x", "model"))
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :-1]
    del tensors["model.language_model.norm.weight"]
    tensors["model.extra.weight"] = np.zeros((2, 3), np.float32)
    with pytest.raises(ConvertError) as error:
        import_tensors(minicpmv.table(model.config), tensors, _abstract_params(model.config))
    for part in ("lm_head.weight has shape (288, 47)", "missing model.language_model.norm.weight", "(2, 3)"):
        assert part in str(error.value)


def test_params_are_float32(model):
    assert {leaf.dtype for leaf in flatten(model.params).values()} == {np.dtype("float32")}
