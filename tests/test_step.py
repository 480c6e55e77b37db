"""One step: accumulation, skipping, freezing, shardings, compilations, and 8 devices against 1."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from uhd_jax.config import MeshConfig, OptimizerConfig
from uhd_jax.models import uhd
from uhd_jax.sharding.mesh import make_mesh
from uhd_jax.sharding.rules import param_shardings, place_batch
from uhd_jax.training.optimizer import make_optimizer
from uhd_jax.training.state import abstract_state, draw_params, enter_stage, first_state
from uhd_jax.training.step import CompiledSteps, make_train_step

pytestmark = pytest.mark.usefixtures("unoptimised")

ONE = MeshConfig(data=1)
EIGHT = MeshConfig(data=2, fsdp=2, tensor=2)


def start(stage, mesh_config=ONE, loss_sums=tiny.loss_sums, params=tiny.params):
    """The step function, the first state, and a way to place batches."""
    count = 1 if mesh_config is ONE else 8
    mesh = make_mesh(mesh_config, jax.devices()[:count])
    optimizer = make_optimizer(OptimizerConfig(), stage)
    params = params()
    target = abstract_state(jax.eval_shape(lambda: params), optimizer, stage.trainable, mesh)
    params = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, target.params))
    params = jax.tree.map(jnp.copy, params)  # the state is donated, the cached parameters are not
    state = first_state(params, 0, optimizer, stage.trainable, target)
    step = make_train_step(loss_sums, stage, OptimizerConfig(), target, mesh)
    return step, state, lambda batch: place_batch(batch, mesh)


def assert_close(a, b, rtol=2e-5, atol=2e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@pytest.fixture(scope="module")
def reference():
    """State and metrics after one step of the whole batch on one device."""
    step, state, place = start(tiny.stage())
    state, metrics = step(state, place(tiny.batch(0)))
    return jax.device_get(state), jax.device_get(metrics)


def test_metrics_of_a_step(reference):
    _, metrics = reference
    batch = tiny.batch(0)

    def mean_loss(params):
        loss_sum, weight_sum = tiny.loss_sums(params, batch)
        return loss_sum / weight_sum

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(tiny.params())
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-6)
    norm = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(jax.device_get(grads))))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert metrics["weight_sum"] == batch.loss_weights.sum()
    assert metrics["trained_tokens"] == (batch.loss_weights > 0).sum()
    assert metrics["learning_rate"] == pytest.approx(1e-8)
    assert metrics["skipped_total"] == metrics["skipped_in_a_row"] == 0


def test_accumulation_equals_one_big_batch(reference):
    step, state, place = start(tiny.stage(accumulation=4))
    state, metrics = step(state, place(tiny.batch(0)))
    assert_close(metrics, reference[1])
    # Adam's first moment is a tenth of the clipped gradient.
    assert_close(state.opt_state[1].mu, reference[0].opt_state[1].mu)


@pytest.fixture(scope="module")
def eight():
    """A compiled step over eight devices, its first state, and a way to place batches."""
    step, state, place = start(tiny.stage(accumulation=2), EIGHT)
    return step.lower(state, place(tiny.batch(0))).compile(), state, place


def test_the_step_returns_the_shardings_of_the_state(eight):
    compiled, state, _ = eight
    returned, metrics = compiled.output_shardings
    for out, leaf in zip(jax.tree.leaves(returned), jax.tree.leaves(state), strict=True):
        assert out.is_equivalent_to(leaf.sharding, leaf.ndim)
    assert all(sharding.is_fully_replicated for sharding in metrics.values())
    kernel = state.opt_state[1].mu["decoder"]["layers"]["mlp"]["gate"]["kernel"]
    assert kernel.sharding == state.params["decoder"]["layers"]["mlp"]["gate"]["kernel"].sharding
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 24)


def test_eight_devices_equal_one(eight, reference):
    compiled, state, place = eight
    state, metrics = compiled(state, place(tiny.batch(0)))
    assert_close(metrics, reference[1])
    assert_close(state.opt_state[1].mu, reference[0].opt_state[1].mu)
    assert_close(state.params, reference[0].params)
    state, metrics = compiled(state, place(tiny.batch(1)))  # what came out can go in
    assert int(metrics["skipped_total"]) == 0


def test_a_hybrid_decoder_trains_on_packed_rows_alike_on_eight_devices_and_one():
    def loss_sums(params, batch, key):
        return uhd.loss_sums(params, batch, tiny.HYBRID)

    def params():
        return jax.jit(uhd.init_params, static_argnums=0)(tiny.HYBRID, jax.random.key(0))

    batch = tiny.batch(0, dataclasses.replace(tiny.BUCKET, tokens=80))
    batch.segments[:, 30:78] += 1
    batch.segments[:, 66:78] += 1
    states = []
    for mesh in (ONE, EIGHT):
        step, state, place = start(tiny.stage(warmup_steps=0), mesh, loss_sums, params)
        losses = []
        for _ in range(3):
            state, metrics = step(state, place(batch))
            losses.append(float(metrics["loss"]))
            if len(losses) == 1:
                states.append(jax.device_get((state.opt_state[1].mu, metrics)))
        assert losses[2] < losses[1] < losses[0]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(states[0][0]["decoder"]))
    for a, b in zip(*(jax.tree.leaves(state) for state in states), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 + 1e-4 * np.abs(b).max())


def test_parameters_are_drawn_in_place_with_the_same_values():
    mesh = make_mesh(EIGHT)
    abstract = jax.eval_shape(tiny.init_params, jax.random.key(0))
    params = draw_params(tiny.init_params, 0, param_shardings(abstract, mesh))
    kernel = params["decoder"]["layers"]["mlp"]["gate"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 16, 24)
    assert_close(params, tiny.params(), rtol=1e-6, atol=1e-7)


def test_frozen_parts_stay_bit_for_bit_and_have_no_moments():
    stage = tiny.stage(trainable=tiny.ADAPTER, warmup_steps=0)
    step, state, place = start(stage)
    before = jax.device_get(state.params)
    assert set(state.opt_state[1].mu) == {"tower", "connector"}
    assert set(state.opt_state[1].mu["tower"]) == {"position_table", "compressor"}
    for number in range(3):
        state, _ = step(state, place(tiny.batch(number)))
    after = jax.device_get(state.params)
    for name in ("layers", "patch_embedding", "final_norm"):
        jax.tree.map(np.testing.assert_array_equal, after["tower"][name], before["tower"][name])
    jax.tree.map(np.testing.assert_array_equal, after["decoder"], before["decoder"])
    for trained in (("tower", "position_table"), ("tower", "compressor"), ("connector", "round_0")):
        old, new = before[trained[0]][trained[1]], after[trained[0]][trained[1]]
        assert all((a != b).any() for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)), trained


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    def loss_sums(params, batch, key):
        loss_sum, weight_sum = tiny.loss_sums(params, batch)
        poison = jnp.where(batch.tokens[0, 0] == 0, jnp.nan, 1.0)
        return loss_sum * poison, weight_sum

    step, state, place = start(tiny.stage(warmup_steps=0, trainable=("connector",)), loss_sums=loss_sums)
    good, bad = tiny.batch(0), tiny.batch(1)
    bad.tokens[0, 0] = 0
    before = jax.device_get((state.params, state.opt_state))
    rows = []
    for batch in (bad, bad, good, bad):
        state, metrics = step(state, place(batch))
        rows.append(
            (int(metrics["skipped_total"]), int(metrics["skipped_in_a_row"]), bool(np.isfinite(metrics["loss"])))
        )
        if len(rows) == 2:
            jax.tree.map(np.testing.assert_array_equal, jax.device_get((state.params, state.opt_state)), before)
    assert rows == [(1, 1, False), (2, 2, False), (2, 0, True), (3, 1, False)]
    assert int(state.step) == int(state.stage_step) == 4
    assert int(state.opt_state[1].count) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_a_batch_without_weights_changes_nothing_and_is_not_taken_for_a_step_that_diverged():
    step, state, place = start(tiny.stage(trainable=("connector",)))
    empty, poisoned = tiny.batch(0), tiny.batch(0)
    empty.loss_weights[:] = 0
    poisoned.loss_weights[0, 5] = np.inf
    before = jax.device_get(state.params)
    counts = []
    for batch in (empty, poisoned, empty, poisoned):
        state, metrics = step(state, place(batch))
        counts.append((int(metrics["skipped_total"]), int(metrics["skipped_in_a_row"])))
    assert counts == [(0, 0), (1, 1), (1, 1), (2, 2)]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before)


def test_one_program_per_bucket():
    step, state, place = start(tiny.stage(trainable=("connector",)))
    steps = CompiledSteps(step)
    longer = dataclasses.replace(tiny.BUCKET, tokens=24)
    for number, bucket in enumerate([tiny.BUCKET, longer, tiny.BUCKET, longer]):
        state, _ = steps(state, place(tiny.batch(number, bucket)))
    assert steps.compilations == 2
    assert steps.compile_seconds > 0


def test_the_next_stage_keeps_parameters_and_forgets_moments():
    step, state, place = start(tiny.stage(trainable=("connector",), warmup_steps=0))
    state, _ = step(state, place(tiny.batch(0)))
    params = jax.device_get(state.params)
    stage = tiny.stage(name="next", trainable=("decoder",))
    optimizer = make_optimizer(OptimizerConfig(), stage)
    mesh = make_mesh(ONE, jax.devices()[:1])
    target = abstract_state(jax.eval_shape(tiny.init_params, jax.random.key(0)), optimizer, stage.trainable, mesh)
    state = enter_stage(state, optimizer, stage.trainable, target)
    assert (int(state.step), int(state.stage_step)) == (1, 0)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), params)
    assert set(state.opt_state[1].mu) == {"decoder"}
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(state.opt_state[1].mu))


def test_devices_exchange_parameters_and_not_the_batch():
    """Split over fsdp, a layer gathers its kernels; no device ever sees the activations of all rows."""
    bucket = dataclasses.replace(tiny.BUCKET, tokens=64, patches=64)
    step, state, place = start(tiny.stage(), MeshConfig(data=1, fsdp=8))
    program = step.lower(state, place(tiny.batch(0, bucket))).compile().as_text()
    sizes = [
        math.prod(map(int, filter(None, shape.split(","))))
        for result in re.findall(r"= (.*?) (?:all-gather|all-reduce|all-to-all|reduce-scatter)(?:-start)?\(", program)
        for shape in re.findall(r"\w\[([\d,]*)\]", result)
    ]
    # The compressor's first kernel is the largest; all rows together are 8 x 64 x 32 in decoder and tower alike.
    assert max(sizes) == state.params["tower"]["compressor"]["linear_1"]["kernel"].size == 64 * 96
