"""The vision part on every chip: views spread over all mesh axes, parameters gathered where a device needs them.

A view depends on no other, so the tower needs no product split between devices. The views of a batch are folded into
one axis, which all mesh axes split, also those that split a row's tokens or a layer's inside for the decoder. Every
device then runs the tower on its own views as if it were alone (`shard_map`): the compiler has nothing to divide, and
kernels see local arrays. A layer's parameters are gathered inside the loop over layers; their gradients leave it
scattered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from uhd_jax.sharding.activations import mesh_in_use
from uhd_jax.sharding.gathering import gather, used_dtypes
from uhd_jax.sharding.mesh import AXES, BATCH_AXES, row_shards
from uhd_jax.sharding.rules import logical_axes, param_specs


def fold_views(rows: jax.Array) -> jax.Array:
    """[B, S, ..] -> [V, ..]: all views, spread over all mesh axes; V is B * S and what makes it divisible, in zeros.

    Each device of a row's group takes some of the group's views, so nothing moves between devices.
    """
    batch, slots = rows.shape[:2]
    mesh = mesh_in_use()
    if mesh is None:
        return rows.reshape(batch * slots, *rows.shape[2:])
    shards = math.gcd(batch, row_shards(mesh))
    groups = rows.reshape(shards, batch // shards * slots, *rows.shape[2:])
    groups = _fill_up(groups, 1, mesh.size // shards)
    views = groups.reshape(-1, *rows.shape[2:])
    return jax.lax.with_sharding_constraint(views, PartitionSpec(AXES))


def unfold_views(views: jax.Array, batch: int, slots: int) -> jax.Array:
    """The inverse of `fold_views`: [V, ..] -> [B, S, ..], each row's on all devices that work on the row.

    The one place where visual tokens change devices.
    """
    mesh = mesh_in_use()
    if mesh is None:
        return views.reshape(batch, slots, *views.shape[1:])
    shards = math.gcd(batch, row_shards(mesh))
    over_rows = PartitionSpec(BATCH_AXES if shards == row_shards(mesh) else None)
    groups = views.reshape(shards, -1, *views.shape[1:])
    groups = jax.lax.with_sharding_constraint(groups, over_rows)[:, : batch // shards * slots]
    return jax.lax.with_sharding_constraint(groups.reshape(batch, slots, *views.shape[1:]), over_rows)


def on_every_chip(encode: Callable[..., Any], dtype: Any, params: Any, *views: jax.Array) -> Any:
    """`encode(params, gather_layer, *views)`, each device with its own views.

    Args:
      encode: of views [V, ..] and parameters to arrays [V, ..], every view by itself. Stacks of layers come to it as
        they lie on the device; `gather_layer` makes one layer of the tower's whole, its kernels in `dtype`. All else
        comes whole.
      dtype: of the computation.
      params: {"tower": .., "connector": ..} or one of them.
      views: arrays [V, ..], best of `fold_views`; any other V is filled up with zeros for the time being.

    Returns:
      What `encode` returns, over all views; outside of a mesh with more than one device that of a plain call.
    """
    mesh = mesh_in_use()
    if mesh is None:
        return encode(params, None, *views)
    specs = param_specs(params, mesh)
    of_layers = jax.tree.map(lambda spec: PartitionSpec(*spec[1:]), specs.get("tower", {}).get("layers", {}))

    def gather_layer(layer):
        return jax.tree.map(gather, layer, of_layers, used_dtypes(layer, dtype))

    def local(params, *views):
        def whole(path, leaf, spec):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return leaf if "layers" in logical_axes(name) else gather(leaf, spec, leaf.dtype)

        return encode(jax.tree_util.tree_map_with_path(whole, params, specs), gather_layer, *views)

    over_views = PartitionSpec(AXES)
    run = jax.shard_map(local, in_specs=(specs, *[over_views] * len(views)), out_specs=over_views, check_vma=False)
    count = len(views[0])
    out = run(params, *(_fill_up(array, 0, mesh.size) for array in views))
    return jax.tree.map(lambda array: array[:count], out)


def _fill_up(array: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Zeros behind the end of an axis, so that `multiple` divides it."""
    room = [(0, 0)] * array.ndim
    room[axis] = (0, -array.shape[axis] % multiple)
    return jnp.pad(array, room) if room[axis][1] else array
