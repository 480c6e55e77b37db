"""Stages with the objective "reconstruction": what they train, hand on, save and resume, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from test_loop import Interrupting, losses

from uhd_jax.checkpoint import load_model, save_model
from uhd_jax.config import ConfigError, MeshConfig, OptimizerConfig, PyramidConfig, RunConfig, TrainConfig
from uhd_jax.models import uhd
from uhd_jax.sharding.mesh import make_mesh
from uhd_jax.sharding.rules import place_batch
from uhd_jax.training import vdim
from uhd_jax.training.loop import train
from uhd_jax.training.optimizer import make_optimizer
from uhd_jax.training.state import abstract_state, first_state, shardings_of
from uhd_jax.training.step import make_train_step

pytestmark = pytest.mark.usefixtures("unoptimised", "compiled_once")

MODEL = dataclasses.replace(
    tiny.KINDS["hiwin"], connector=dataclasses.replace(tiny.KINDS["hiwin"].connector, pyramid=PyramidConfig(7))
)
UPSAMPLER = ("upsampler", "upsampler_fixup")


def stage(form="paper", **changes):
    numbers = vdim.ReconstructionConfig(form, jitters=2, pad=2, projections=3, crf_pixels=10)
    values = dict(name="vdim", objective="reconstruction", reconstruction=numbers, trainable=UPSAMPLER, steps=4)
    return tiny.stage(**(values | dict(schedule="constant", warmup_steps=0, learning_rate=1e-3) | changes))


def run_config(*stages, **changes):
    values = dict(stages=stages, checkpoint_every=100, log_every=1, peak_flops=1e12)
    return RunConfig("vdim", MODEL, TrainConfig(**(values | changes)))


def run(workdir, config, make=None):
    """Trains on one device; batches are of one bucket, half of the slots are empty."""
    made = make or (lambda config, index: tiny.RandomBatches(100 * index, (tiny.BUCKET,)))
    return train(config, workdir, made, devices=jax.devices()[:1], stream=io.StringIO())


def upsampler_of(params):
    return params["connector"]["upsampler"]


def without_upsampler(params):
    connector = {name: leaf for name, leaf in params["connector"].items() if name != "upsampler"}
    return {**params, "connector": connector}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("pretrained")
    return workdir, run(workdir, run_config(stage(steps=5)))


def test_the_upsampler_alone_changes_and_the_scaffold_is_no_part_of_the_model(pretrained):
    workdir, result = pretrained
    started = jax.jit(lambda: uhd.init_params(MODEL, jax.random.key(0)))()
    params, config = load_model(workdir)
    assert config == MODEL and set(params) == {"tower", "connector", "decoder"}
    jax.tree.map(np.testing.assert_array_equal, without_upsampler(params), without_upsampler(started))
    pairs = zip(*(jax.tree.leaves(upsampler_of(tree)) for tree in (params, started)), strict=True)
    assert all((a != b).any() for a, b in pairs)
    assert set(result.state.scaffold) == {"level_1", "level_2"}
    began = vdim.init_scaffold(MODEL, "paper", jax.random.key(0))
    pairs = zip(*(jax.tree.leaves(tree) for tree in (result.state.scaffold, began)), strict=True)
    assert all((a != b).any() for a, b in pairs)


def test_a_language_stage_goes_on_with_the_frozen_upsampler(pretrained, tmp_path):
    language = tiny.stage(name="language", steps=2, trainable=("connector",))
    result = run(tmp_path, run_config(stage(steps=5), language))
    assert result.finished and result.step == 7 and result.state.scaffold == {}
    params, before = load_model(tmp_path)[0], pretrained[1].state.params
    jax.tree.map(np.testing.assert_array_equal, upsampler_of(params), upsampler_of(before))
    assert (params["connector"]["join"]["kernel"] != before["connector"]["join"]["kernel"]).any()
    again = run(tmp_path, run_config(stage(steps=5), language))
    assert again.finished and again.step == 7


@pytest.mark.parametrize("form", ["paper", "released"])
def test_interrupted_and_resumed_has_the_same_losses_bit_for_bit(form, tmp_path):
    config = run_config(stage(form))
    run(tmp_path / "whole", config)
    stopped = run(tmp_path / "stopped", config, lambda *_: _one_bucket(Interrupting(0, 2, signal.SIGTERM)))
    assert not stopped.finished
    run(tmp_path / "stopped", config)
    assert len(losses(tmp_path / "whole")) == 4
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def _one_bucket(batches):
    batches.buckets = (tiny.BUCKET,)
    return batches


def test_the_loss_falls(tmp_path):
    """On one batch that comes again and again."""

    class Same(tiny.RandomBatches):
        def __next__(self):
            self.number = 0
            return super().__next__()

    run(tmp_path, run_config(stage(steps=40, learning_rate=1e-2)), lambda *_: Same(0, (tiny.BUCKET,)))
    values = [loss for _, _, loss in losses(tmp_path)]
    assert np.mean(values[-5:]) < 0.7 * np.mean(values[:5])


def test_starting_from_a_saved_model(pretrained, tmp_path):
    save_model(tmp_path / "model", jax.device_get(pretrained[1].state.params), MODEL)
    result = run(tmp_path / "run", run_config(stage(steps=1), init_from=str(tmp_path / "model")))
    assert result.step == 1 and set(result.state.scaffold) == {"level_1", "level_2"}
    tower = pretrained[1].state.params["tower"]
    jax.tree.map(np.testing.assert_array_equal, result.state.params["tower"], tower)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_eight_devices_equal_one_and_keys_make_a_difference(form):
    model = dataclasses.replace(
        MODEL,
        tower=dataclasses.replace(MODEL.tower, layers=2),
        connector=dataclasses.replace(MODEL.connector, pyramid=PyramidConfig(2)),
    )
    one = stage(form, learning_rate=0.0, learning_rate_min=0.0)
    optimizer = make_optimizer(OptimizerConfig(), one)

    def draw():
        scaffold = vdim.init_scaffold(model, form, jax.random.key(0))
        return {**uhd.init_params(model, jax.random.key(0)), "scaffold": scaffold}

    def loss_sums(params, batch, key):
        return vdim.loss_sums(params, batch, key, model, one.reconstruction)

    drawn, made = jax.device_get(jax.jit(draw)()), []
    for mesh_config, seeds in ((MeshConfig(data=1), (0, 1)), (MeshConfig(data=2, fsdp=2, tensor=2), (0,))):
        mesh = make_mesh(mesh_config, jax.devices()[: mesh_config.data * mesh_config.fsdp * mesh_config.tensor])
        target = abstract_state(drawn, optimizer, UPSAMPLER, mesh)
        step = make_train_step(loss_sums, one, OptimizerConfig(), target, mesh)
        for seed in seeds:
            params = jax.device_put(drawn, shardings_of(target).all_params)
            state = first_state(params, seed, optimizer, UPSAMPLER, target)
            state, metrics = step(state, place_batch(tiny.batch(0), mesh))
            made.append((jax.device_get(metrics), jax.device_get(state.opt_state[1].mu)))
        later = step(state, place_batch(tiny.batch(0), mesh))[1]["loss"]  # nothing was learned in between
        assert abs(later - metrics["loss"]) > 1e-4 * abs(metrics["loss"])
    (single, moments), (other, _), (eight, eight_moments) = made
    assert single["weight_sum"] == (8 if form == "released" else 8 * 16)  # views, or their patches
    np.testing.assert_allclose(eight["loss"], single["loss"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), eight_moments, moments)
    assert abs(other["loss"] - single["loss"]) > 1e-4 * abs(single["loss"])


def test_views_that_are_no_squares_are_refused_in_the_released_form(tmp_path):
    class Oblong(tiny.RandomBatches):
        def __next__(self):
            batch, info = super().__next__()
            batch.patch_grids[2, 0] = (2, 7)
            return batch, info

    with pytest.raises(ConfigError, match="square views that fill their slots of 16 patches, but one has 2x7"):
        run(tmp_path / "released", run_config(stage("released")), lambda *_: Oblong())
    assert run(tmp_path / "paper", run_config(stage(steps=1)), lambda *_: Oblong()).finished


def test_adam_for_the_paper_and_for_the_released_form_clipping_at_first():
    params = {"scaffold": {"x": jnp.ones(3)}}
    gradients = {"scaffold": {"x": jnp.asarray([3.0, -4.0, 0.0])}}
    paper, released = (make_optimizer(OptimizerConfig(), stage(form)) for form in ("paper", "released"))
    for optimizer, expected in ((paper, optax.scale_by_adam()), (released, optax.scale_by_adam(nesterov=True))):
        state, wanted = optimizer.init(params), expected.init(params)
        for step in range(12):
            clipped = gradients
            if optimizer is released and step < 10:
                clipped = jax.tree.map(lambda g: g * (1e-4 / 5), gradients)
            update, state = optimizer.update(gradients, state, params)
            right, wanted = expected.update(clipped, wanted)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), update, right)


def test_what_cannot_be_reconstructed_is_refused():
    with pytest.raises(ConfigError, match="trainable: the objective 'reconstruction' trains"):
        stage(trainable=("upsampler", "connector"))
    for pyramid in (PyramidConfig(1), PyramidConfig(7, "bilinear")):
        connector = dataclasses.replace(MODEL.connector, pyramid=pyramid)
        with pytest.raises(ConfigError, match=r"train\.stages\[0\]\.objective: .*more than level 0"):
            dataclasses.replace(run_config(stage()), model=dataclasses.replace(MODEL, connector=connector))


def test_metrics_of_a_reconstruction(pretrained):
    lines = [json.loads(line) for line in (pretrained[0] / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 and line["skipped_total"] == 0 for line in lines)
    assert all(0 < line["flop_utilisation"] < 1 for line in lines)
