"""The state of a run: what a checkpoint holds beside the data iterator, and how it is created over a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from uhd_jax.sharding.rules import param_shardings, replicated
from uhd_jax.training.stages import SCAFFOLD, split_params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step reads and writes."""

    step: Any  # int32[]: steps of the whole run, skipped ones included
    stage_step: Any  # int32[]: steps of this stage
    params: Any  # the whole model's parameters, float32
    scaffold: Any  # parameters that only training needs and the model does not have; {} for most stages
    opt_state: Any  # optimiser state of the trainable parameters only
    rng: Any  # uint32[2]: key of the run; parameters were drawn from it
    skipped_total: Any  # int32[]: non-finite steps so far
    skipped_in_a_row: Any  # int32[]: of them, those just now

    @property
    def all_params(self) -> dict[str, Any]:
        """The model's parameters, and the scaffold's as one more subtree."""
        return {**self.params, SCAFFOLD: self.scaffold}


def split_scaffold(all_params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's parameters and the scaffold's; the inverse of `all_params`."""
    model = {key: subtree for key, subtree in all_params.items() if key != SCAFFOLD}
    return model, all_params.get(SCAFFOLD, {})


def new_state(
    all_params: Any, rng: jax.Array, optimizer: optax.GradientTransformation, trainable: tuple[str, ...]
) -> TrainState:
    """The state before the first step of a run; pure."""
    opt_state = optimizer.init(split_params(all_params, trainable)[0])
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, *split_scaffold(all_params), opt_state, rng, zero, zero)


def state_shardings(
    state: TrainState, optimizer: optax.GradientTransformation, trainable: tuple[str, ...], mesh: Mesh
) -> TrainState:
    """A tree of NamedSharding like `state` (abstract or not): moments lie where their parameters lie."""
    params, whole = param_shardings(state.params, mesh), replicated(mesh)
    scaffold = param_shardings(state.scaffold, mesh, f"{SCAFFOLD}/")
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        state.opt_state,
        split_params({**params, SCAFFOLD: scaffold}, trainable)[0],
        transform_non_params=lambda _: whole,
    )
    return TrainState(whole, whole, params, scaffold, opt_state, whole, whole, whole)


def abstract_state(
    all_params: Any, optimizer: optax.GradientTransformation, trainable: tuple[str, ...], mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of a stage's state, from the abstract parameters; no array is made."""
    rng = jax.ShapeDtypeStruct((2,), jnp.uint32)
    state = jax.eval_shape(lambda params, rng: new_state(params, rng, optimizer, trainable), all_params, rng)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_shardings(state, optimizer, trainable, mesh),
    )


def draw_params(init_params: Callable[[jax.Array], Any], seed: int, shardings: Any) -> Any:
    """Random parameters, each drawn where it belongs: no whole tree on any device of a mesh."""
    return jax.jit(init_params, out_shardings=shardings)(jax.random.key(seed))


def first_state(
    all_params: Any, seed: int, optimizer: optax.GradientTransformation, trainable: tuple[str, ...], target: TrainState
) -> TrainState:
    """The state before the first step, with the shardings of `target`. Consumes `all_params`."""
    make = jax.jit(
        lambda params, rng: new_state(params, rng, optimizer, trainable),
        out_shardings=shardings_of(target),
        donate_argnums=0,
    )
    return make(all_params, jax.random.key_data(jax.random.key(seed)))


def enter_stage(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    trainable: tuple[str, ...],
    target: TrainState,
    scaffold: Any = None,
) -> TrainState:
    """Hands parameters and counters to the next stage: a fresh optimiser and scaffold (none by default), the stage's
    step at 0. Consumes `state`."""

    def enter(state):
        opt_state = optimizer.init(split_params(state.all_params, trainable)[0])
        return dataclasses.replace(state, stage_step=jnp.zeros_like(state.stage_step), opt_state=opt_state)

    bare = dataclasses.replace(state, opt_state=(), scaffold=scaffold or {})
    for moments in jax.tree.leaves(state.opt_state):
        moments.delete()  # before the new ones are made
    return jax.jit(enter, out_shardings=shardings_of(target), donate_argnums=0)(bare)


def shardings_of(target: Any) -> Any:
    """The shardings of a tree of arrays or ShapeDtypeStruct."""
    return jax.tree.map(lambda leaf: leaf.sharding, target)
