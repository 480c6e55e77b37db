"""Stacks of equal layers: one tree whose leaves have a leading layer axis, run by one compiled body."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uhd_jax.sharding.activations import over_tokens
from uhd_jax.sharding.gathering import GatherLayer, keep_all_but_whole

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Apart:
    """Layers in arrays of their own, in the place of a stacked tree.

    For devices that copy each layer out of a stack before they use it, which costs most where a layer's weights are
    read for a few tokens only.
    """

    layers: tuple[Any, ...]  # equal trees

    def __len__(self) -> int:
        """How many layers."""
        return len(self.layers)

    def __getitem__(self, index: Any) -> Any:
        """A layer, or for a slice some of them, `Apart` again."""
        return Apart(self.layers[index]) if isinstance(index, slice) else self.layers[index]


def apart(stacked: Any) -> Apart:
    """The layers of a stacked tree, copied."""
    count = len(jax.tree.leaves(stacked)[0])
    return Apart(tuple(jax.tree.map(lambda leaf, i=index: leaf[i], stacked) for index in range(count)))


def in_groups(stacked: Any, size: int) -> Any:
    """Layers [G * size, ...] as [G, size, ...], of a tree whose leaves are stacked or `Apart`."""

    def split(leaf):
        if _is_apart(leaf):
            return Apart(tuple(leaf[start : start + size] for start in range(0, len(leaf), size)))
        return leaf.reshape(-1, size, *leaf.shape[1:])

    return _map_stacks(split, stacked)


def _is_apart(leaf: Any) -> bool:
    return isinstance(leaf, Apart)


def _map_stacks(function: Callable[[Any], Any], stacked: Any) -> Any:
    return jax.tree.map(function, stacked, is_leaf=_is_apart)


def stack_init(layer: nn.Module, depth: int, *example: Any) -> Callable[[jax.Array], dict]:
    """Initialiser of `depth` equal layers as one tree whose leaves have a leading layer axis [L, ...].

    For `self.param("layers", stack_init(...))`. `layer` must be unbound (parent=None); `example` are arguments of its
    `__call__`, of which only shapes and dtypes matter.
    """

    def init(key: jax.Array) -> dict:
        keys = jax.random.split(key, depth)
        return jax.vmap(lambda k: layer.init(k, *example)["params"])(keys)

    return init


def stack_param(module: nn.Module, name: str, init: Callable[[jax.Array], dict]) -> dict:
    """The stacked tree `name` of a module, made by `init` of `stack_init` where it is not there yet.

    Unlike `module.param` it does not compare shapes: in a `shard_map` a device has a part of each layer, and layers may
    be `Apart`.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init)


def run_stack(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    stacked: Any,
    *,
    scan: bool,
    remat: str,
    start: int = 0,
    stop: int | None = None,
    pin: bool = True,
    gather: GatherLayer | None = None,
) -> tuple[Any, Any]:
    """Runs layers `start` to `stop` (exclusive) of a stacked tree.

    Args:
      step: (carry, one layer's slice of `stacked`) -> (carry, output of the layer).
      carry: goes from layer to layer.
      stacked: tree whose leaves have a leading layer axis, or are `Apart`: then there is no scan.
      scan: one compiled body for all layers, else a Python loop (to compare, and to count FLOPs).
      remat: name in REMAT_POLICIES, or "none".
      start: first layer.
      stop: one past the last layer; None for all.
      pin: keep what is carried where its rows are; off where its leading axis is not one of rows.
      gather: makes a layer's slice whole where devices hold parts of it, in the loop, and again for the gradient.

    Returns:
      The last carry, and the layers' outputs stacked on a leading axis.
    """

    def run(carry, layer):
        carry = jax.tree.map(over_tokens, carry) if pin else carry
        return step(carry, layer if gather is None else gather(layer))

    part = _map_stacks(lambda leaf: leaf[start:stop], stacked)
    leaves = jax.tree.leaves(part, is_leaf=_is_apart)
    length = len(leaves[0])
    scan = scan and not any(map(_is_apart, leaves))
    policy = REMAT_POLICIES.get(remat)
    if remat == "none" and gather is not None:
        policy = keep_all_but_whole
    if policy is not None:
        run = jax.checkpoint(run, policy=policy, prevent_cse=not scan)
    if scan or not length:  # without layers too, as scan knows the outputs' shapes
        return jax.lax.scan(run, carry, part)
    outputs = []
    for index in range(length):
        carry, output = run(carry, _map_stacks(lambda leaf, i=index: leaf[i], part))
        outputs.append(output)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
