"""Eight devices in five mesh shapes train as one device does: 20 steps of every system, and of every stage's parts.

The ordinary suite runs every mesh shape and every system. UHD_ALL_MESHES=1 runs all combinations with every stage that
trains other parts than the one before.
"""

import dataclasses
import functools
import os
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from uhd_jax.batch import Bucket
from uhd_jax.config import MeshConfig, OptimizerConfig, PyramidConfig
from uhd_jax.config import from_config_dict as build
from uhd_jax.models import uhd
from uhd_jax.sharding.mesh import make_mesh
from uhd_jax.sharding.rules import place_batch
from uhd_jax.training.objective import loss_sums_of, scaffold_init
from uhd_jax.training.optimizer import make_optimizer
from uhd_jax.training.stages import split_params
from uhd_jax.training.state import abstract_state, first_state, shardings_of
from uhd_jax.training.step import make_train_step

pytestmark = pytest.mark.usefixtures("unoptimised", "compiled_once")

STEPS = 20
ROOT = Path(__file__).parents[1]
MESHES = {
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "dcn 2, data 2, fsdp 2": MeshConfig(dcn_data=2, data=2, fsdp=2),
    "data 2, fsdp 2, tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp 2, sequence 2, tensor 2": MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
    "sequence 2, tensor 4": MeshConfig(data=1, sequence=2, tensor=4),
}
HIWIN = dataclasses.replace(tiny.KINDS["hiwin"].connector, pyramid=PyramidConfig(3))
MODELS = {
    "uhd_v1": tiny.KINDS["spatial_resampler"],
    "uhd_v2": dataclasses.replace(tiny.KINDS["hiwin"], connector=HIWIN),
    "uhd_v4": tiny.MODEL,
}
# Stages that train other parts than those before them.
STAGES = ("uhd_v4:stage1", "uhd_v4:stage2", "uhd_v1:stage1", "uhd_v1:stage2", "uhd_v2_vdim:vdim", "uhd_v2:stage1")
STAGES += ("uhd_v2:stage2", "uhd_v4:stage3")
CHOSEN = [
    ("uhd_v4:stage1", "fsdp 8"),
    ("uhd_v4:stage2", "dcn 2, data 2, fsdp 2"),
    ("uhd_v2:stage2", "data 2, fsdp 2, tensor 2"),
    ("uhd_v1:stage2", "fsdp 2, sequence 2, tensor 2"),
    ("uhd_v4:stage3", "sequence 2, tensor 4"),
]
ALL = [(stage, mesh) for stage in STAGES for mesh in MESHES]


def stages_of(file):
    return build(runpy.run_path(str(ROOT / f"configs/{file}.py"))["get_config"]()).train.stages


def stage_named(name):
    """Model and stage, small, with the parts and the objective of the recipe's stage."""
    file, _, which = name.partition(":")
    (recipe,) = [stage for stage in stages_of(file) if stage.name == which]
    accumulation = 2 if recipe.trainable == stages_of("uhd_v1")[1].trainable else 1
    changes = dict(trainable=recipe.trainable, objective=recipe.objective, reconstruction=recipe.reconstruction)
    stage = tiny.stage(steps=STEPS, accumulation=accumulation, **changes)
    return MODELS[file.removesuffix("_vdim")], stage


def make_batch(model, seed):
    """Two samples in each row, one with two views, the other with one; a length that no mesh axis divides."""
    random = np.random.default_rng(seed)
    bucket = Bucket(rows=16, slots=3, tokens=27, patches=16, patch_bytes=model.tower.patch_bytes)
    batch = tiny.batch(seed, bucket)
    batch.segments[:, 15:25] = 2
    batch.positions[:, 15:25] -= 15
    batch.loss_weights[:, 15:17] = 0
    batch.visual_index[:] = -1
    tokens = model.visual_tokens(bucket.patches)
    for slot, start in enumerate((1, 5, 16)):
        own = min(tokens, 3)
        batch.visual_index[:, start : start + own] = slot * tokens + np.arange(own)
        batch.patch_grids[:, slot] = [(4, 4), (2, 4), (4, 2)][(seed + slot) % 3]
    batch.patches[:] = random.integers(0, 256, batch.patches.shape)
    return batch


def curve(name, mesh):
    """Losses of all steps, the first gradients (Adam's first moments), the last parameters."""
    model, stage = stage_named(name)
    optimizer = make_optimizer(OptimizerConfig(), stage)

    def draw():
        params = uhd.init_params(model, jax.random.key(0))
        return {**params, "scaffold": scaffold_init(model, stage)(jax.random.key(1))}

    params = jax.device_get(jax.jit(draw)())
    target = abstract_state(params, optimizer, stage.trainable, mesh)
    state = first_state(jax.device_put(params, shardings_of(target).all_params), 0, optimizer, stage.trainable, target)
    step = make_train_step(loss_sums_of(model, stage), stage, OptimizerConfig(), target, mesh)
    losses, moments = [], None
    for number in range(STEPS):
        state, metrics = step(state, place_batch(make_batch(model, number), mesh))
        losses.append(float(metrics["loss"]))
        moments = moments or jax.device_get(state.opt_state[1].mu)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(target), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    trained = split_params(state.all_params, stage.trainable)[0]
    for moment, parameter in zip(jax.tree.leaves(state.opt_state[1].mu), jax.tree.leaves(trained), strict=True):
        assert moment.sharding.is_equivalent_to(parameter.sharding, moment.ndim)
    return losses, moments


@functools.cache
def alone(name):
    return curve(name, make_mesh(MeshConfig(data=1), jax.devices()[:1]))


@pytest.mark.parametrize(("stage", "mesh"), ALL if os.environ.get("UHD_ALL_MESHES") else CHOSEN)
def test_eight_devices_train_as_one(stage, mesh):
    (losses, moments), (expected, expected_moments) = curve(stage, make_mesh(MESHES[mesh])), alone(stage)
    assert abs(losses[0] - expected[0]) <= 1e-6
    worst = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    print(f"\n{stage}, {mesh}: first {abs(losses[0] - expected[0]):.1e}, worst of {STEPS} steps {worst:.1e}")
    assert worst <= 1e-4
    assert max(expected) - min(expected) > 1e-3  # something was learned
    for ours, theirs in zip(jax.tree.leaves(moments), jax.tree.leaves(expected_moments), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 + 1e-4 * np.abs(theirs).max())
