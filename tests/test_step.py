"""One step: accumulation, skipping, freezing, shardings, compilations, and 8 devices against 1."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from uhd_jax.batch import Bucket, abstract_batch
from uhd_jax.config import MeshConfig, OptimizerConfig
from uhd_jax.models import uhd
from uhd_jax.sharding.mesh import make_mesh
from uhd_jax.sharding.rules import batch_sharding, param_shardings, place_batch
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


COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")


def shapes_in(text):
    return [tuple(map(int, filter(None, shape.split(",")))) for shape in re.findall(r"\w\[([\d,]*)\]", text)]


@pytest.fixture(scope="module")
def program():
    """A step on every kind of axis that splits something, as compiled: sizes of the model differ from one another."""
    decoder = dataclasses.replace(tiny.MODEL.decoder, vocab_size=640, layers=5)
    model = dataclasses.replace(tiny.MODEL, decoder=decoder)
    stage, mesh = tiny.stage(), make_mesh(MeshConfig(data=1, fsdp=2, sequence=2, tensor=2))
    params = jax.eval_shape(lambda: uhd.init_params(model, jax.random.key(0)))
    target = abstract_state(params, make_optimizer(OptimizerConfig(), stage), stage.trainable, mesh)
    step = make_train_step(lambda p, b, _: uhd.loss_sums(p, b, model), stage, OptimizerConfig(), target, mesh)
    bucket = Bucket(rows=8, slots=4, tokens=96, patches=64, patch_bytes=model.tower.patch_bytes)
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=batch_sharding(mesh)), abstract_batch(bucket)
    )
    return step.lower(target, batch).compile().as_text(), params, bucket, model


def test_devices_exchange_parameters_and_not_the_batch(program):
    """Nothing is as large as what all rows have together: patches, tower tokens, hidden states."""
    text, params, bucket, model = program
    compressor = params["tower"]["compressor"]["linear_1"]["kernel"].size  # the largest parameter that is used whole
    hidden = bucket.rows * bucket.tokens * model.decoder.width
    tower = bucket.rows * bucket.slots * bucket.patches * model.tower.width
    assert compressor < hidden / 2 <= tower
    sizes = [math.prod(shape) for result, _ in COLLECTIVE.findall(text) for shape in shapes_in(result)]
    assert compressor in sizes and len(sizes) > 50
    # Two groups of devices have half of the rows each: their keys and values, or what they look up, come together.
    assert max(sizes) <= hidden / 2


def test_stacks_are_gathered_layer_by_layer_inside_the_loop(program):
    text, params, _, model = program
    gathered = [
        (shape, line)
        for line in text.splitlines()
        for result, kind in COLLECTIVE.findall(line)
        if kind == "all-gather"
        for shape in shapes_in(result)
    ]
    for part, depth in (("tower", model.tower.layers), ("decoder", model.decoder.layers)):
        for stack in jax.tree.leaves(params[part]["layers"]):
            assert all(shape != stack.shape and shape[:1] + shape[2:] != stack.shape for shape, _ in gathered)
        loops = [line for _, line in gathered if "while/body" in line and part in line.lower()]
        assert len(loops) >= 6, part
        assert not any(shape[0] == depth and len(shape) > 2 for shape, _ in gathered), part


def test_nothing_of_the_vocabularys_size_is_whole(program):
    text, params, bucket, model = program
    vocabulary, width = model.decoder.vocab_size, model.decoder.width
    sizes = {shape: math.prod(shape) for shape in shapes_in(text) if {vocabulary, vocabulary // 2} & set(shape)}
    assert sizes[(vocabulary, width // 8)] and sizes[(width // 4, vocabulary // 2)]  # table and head, as they lie
    assert max(sizes.values()) <= vocabulary * width // 8, max(sizes, key=sizes.get)
