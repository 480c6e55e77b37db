"""Whole parameters for the moment of their use: a layer's, inside the loop over layers, and again for its gradient.

Kernels travel in the dtype that they are used in; their gradients are summed over devices in float32 and leave
scattered, as the parameters lie.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from uhd_jax.sharding.activations import mesh_in_use
from uhd_jax.sharding.rules import PARAM_AXES, param_specs

GatherLayer = Callable[[Any], Any]  # one layer's parameters of a stack, as they lie here -> whole


def keep_all_but_whole(primitive: Any, *_: Any, **__: Any) -> bool:
    """Policy of `jax.checkpoint`: whole parameters are gathered again for the gradient, nothing else is made again."""
    return primitive.name not in ("all_gather", "sharding_constraint")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(part: jax.Array, spec: PartitionSpec, dtype: Any) -> jax.Array:
    """The whole, in `dtype`, of a parameter of which this device holds a part; inside a `shard_map`."""
    part = part.astype(dtype)
    for dimension, axes in enumerate(spec):
        if axes:
            part = jax.lax.all_gather(part, axes, axis=dimension, tiled=True)
    return part


def _gather(part, spec, dtype):
    return gather(part, spec, dtype), None


def _scatter(spec, dtype, _, gradient):
    gradient = gradient.astype(jnp.float32)
    for dimension, axes in enumerate(spec):
        if axes:
            gradient = jax.lax.psum_scatter(gradient, axes, scatter_dimension=dimension, tiled=True)
    return (gradient,)


gather.defvjp(_gather, _scatter)


def used_dtypes(layer: Any, dtype: Any) -> Any:
    """The dtypes in which a layer uses its parameters: kernels in that of the computation, others as they are."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.dtype(dtype if path[-1].key == "kernel" else leaf.dtype), layer
    )


def layer_gatherer(stacked: Any, path: str, dtype: Any) -> GatherLayer | None:
    """For a decoder's stack [L, ..], which the compiler spreads over the mesh: gathers all but the split over `tensor`.

    None outside of a mesh.

    Args:
      stacked: the parameters' tree.
      path: of the tree, with a "/" at its end.
      dtype: of the computation.
    """
    mesh = mesh_in_use()
    if mesh is None:
        return None

    def relay(leaf, spec, dtype):
        spec = PartitionSpec(*spec[1:])
        return _relay(leaf, spec, PartitionSpec(*map(_without_param_axes, spec)), dtype)

    specs, dtypes = param_specs(stacked, mesh, path), used_dtypes(stacked, dtype)
    return lambda layer: jax.tree.map(relay, layer, specs, dtypes)


def whole(params: Any, path: str) -> Any:
    """A tree of parameters whole on every device, as the compiler spreads it; for small ones. `path`: of the tree."""
    mesh = mesh_in_use()
    if mesh is None:
        return params
    specs = param_specs(params, mesh, path)
    return jax.tree.map(lambda leaf, spec: _relay(leaf, spec, PartitionSpec(), leaf.dtype), params, specs)


def _without_param_axes(axes):
    return None if axes in PARAM_AXES or axes == PARAM_AXES else axes


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _relay(part, spec, whole, dtype):
    part = jax.lax.with_sharding_constraint(part.astype(dtype), spec)
    return jax.lax.with_sharding_constraint(part, whole)


def _relay_forward(part, spec, whole, dtype):
    return _relay(part, spec, whole, dtype), None


def _relay_backward(spec, whole, dtype, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient.astype(jnp.float32), spec),)


_relay.defvjp(_relay_forward, _relay_backward)
