"""One optimiser step: loss, gradients of the trainable parameters, accumulation, update or skip."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uhd_jax.batch import Batch, Bucket
from uhd_jax.config import OptimizerConfig, StageConfig
from uhd_jax.sharding.mesh import BATCH_AXES
from uhd_jax.sharding.rules import replicated
from uhd_jax.training.optimizer import make_optimizer, make_schedule
from uhd_jax.training.stages import merge_params, split_params
from uhd_jax.training.state import TrainState, shardings_of, split_scaffold

# (parameters with the scaffold's, batch, key of this step and micro-batch) -> sum of losses, sum of weights
LossSums = Callable[[Any, Batch, jax.Array], tuple[jax.Array, jax.Array]]
Metrics = dict[str, jax.Array]


def make_train_step(
    loss_sums: LossSums, stage: StageConfig, optimizer: OptimizerConfig, target: TrainState, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step of a stage; the state is donated, and comes back with the shardings of `target`.

    The gradient is taken with respect to the trainable parameters only: weight gradients of frozen ones are not part of
    the program, nor is any backward pass before the first trainable parameter. Micro-batches add up sums of losses and
    of gradients, divided at the end by the global sum of weights, which is exactly the loss of the batch in one piece.
    A step whose loss or gradient norm is not finite leaves parameters and optimiser state as they were and is counted.
    So does a batch in which no token has a weight, uncounted: its loss, 0 / 0, is not the model's.

    Args:
      loss_sums: float32[] sum of weighted losses and float32[] sum of weights of a batch.
      stage: trainable parts, accumulation, schedule.
      optimizer: AdamW's numbers.
      target: the state's shapes and shardings (`abstract_state`).
      mesh: where the state and the batches lie.

    Returns:
      (state, batch) -> (state, metrics); the metrics are scalars: loss, grad_norm, learning_rate, weight_sum,
      trained_tokens, skipped_total, skipped_in_a_row.
    """
    transformation = make_optimizer(optimizer, stage)
    schedule = make_schedule(stage)
    # Left to itself the compiler may keep gradients, and with them sums of gradients, whole on every device.
    gradient_shardings = split_params(shardings_of(target).all_params, stage.trainable)[0]

    def gradients(trainable, frozen, batch, key):
        def objective(trainable):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for `sharding.activations`
                return loss_sums(merge_params(trainable, frozen), batch, key)

        (loss_sum, weight_sum), grads = jax.value_and_grad(objective, has_aux=True)(trainable)
        return loss_sum, weight_sum, jax.lax.with_sharding_constraint(grads, gradient_shardings)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        trainable, frozen = split_params(state.all_params, stage.trainable)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        if stage.accumulation == 1:
            loss_sum, weight_sum, grads = gradients(trainable, frozen, batch, key)
        else:

            def add(total, micro_batch):
                return jax.tree.map(jnp.add, total, gradients(trainable, frozen, *micro_batch)), None

            zeros = jax.lax.with_sharding_constraint(jax.tree.map(jnp.zeros_like, trainable), gradient_shardings)
            zero = (jnp.zeros(()), jnp.zeros(()), zeros)
            micro_batches = _micro_batches(batch, stage.accumulation, mesh)
            keys = jax.random.split(key, stage.accumulation)
            (loss_sum, weight_sum, grads), _ = jax.lax.scan(add, zero, (micro_batches, keys))

        loss = loss_sum / weight_sum
        grads = jax.tree.map(lambda g: g / weight_sum, grads)
        grad_norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        learning_rate = schedule(state.stage_step)
        updates, opt_state = transformation.update(grads, state.opt_state, trainable)
        updated = jax.tree.map(lambda p, u: p - learning_rate * u, trainable, updates)
        trainable, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), (updated, opt_state), (trainable, state.opt_state)
        )
        bad = (~good & (weight_sum != 0)).astype(jnp.int32)
        params, scaffold = split_scaffold(merge_params(trainable, frozen))
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            stage_step=state.stage_step + 1,
            params=params,
            scaffold=scaffold,
            opt_state=opt_state,
            skipped_total=state.skipped_total + bad,
            skipped_in_a_row=jnp.where(good, 0, state.skipped_in_a_row + bad),
        )
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "weight_sum": weight_sum,
            "trained_tokens": jnp.sum(batch.loss_weights > 0),
            "skipped_total": state.skipped_total,
            "skipped_in_a_row": state.skipped_in_a_row,
        }
        return state, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings_of(target), replicated(mesh)))


def _micro_batches(batch: Batch, accumulation: int, mesh: Mesh) -> Batch:
    """[B, ...] -> [A, B / A, ...]. Every A-th row goes together, so that each device keeps the rows it has."""
    sharding = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))

    def split(rows):
        pieces = rows.reshape(rows.shape[0] // accumulation, accumulation, *rows.shape[1:])
        return jax.lax.with_sharding_constraint(jnp.swapaxes(pieces, 0, 1), sharding)

    return jax.tree.map(split, batch)


class CompiledSteps:
    """Runs a jitted step through one program per bucket, compiled when the bucket is first met.

    A call never compiles behind the scenes: an array of another shape, dtype or sharding than its bucket's is an error.
    """

    def __init__(self, step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]):
        self._step = step
        self._programs: dict[Bucket, Any] = {}
        self.compile_seconds = 0.0

    @property
    def compilations(self) -> int:
        """Programs compiled so far; equals the number of buckets met."""
        return len(self._programs)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One step; consumes `state`."""
        bucket = batch.bucket
        if bucket not in self._programs:
            start = time.monotonic()
            self._programs[bucket] = self._step.lower(state, batch).compile()
            self.compile_seconds += time.monotonic() - start
        return self._programs[bucket](state, batch)
