"""Where activations lie: rows over the mesh axes of the batch, a row's tokens over `sequence`."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from uhd_jax.sharding.mesh import BATCH_AXES


def mesh_in_use() -> AbstractMesh | None:
    """The mesh that the compiler is to spread a program over.

    None outside of a mesh, on a mesh of one device, and inside a `shard_map`, where each device runs by itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return None
    return mesh


def over_tokens(array: jax.Array) -> jax.Array:
    """Pins [B, T, ..]: rows over the axes of the batch, tokens over `sequence` where it divides them, the rest whole.

    Left free, the compiler, which sees both the batch and the kernels split over fsdp, may choose to gather the batch
    of all devices instead of a layer's kernels.
    """
    return _pin(array, ("sequence",), ())


def by_tokens(array: jax.Array) -> jax.Array:
    """Pins [B, T, N, ..]: rows over the axes of the batch, tokens over `sequence`, heads over `tensor`."""
    return _pin(array, ("sequence",), ("tensor",))


def by_heads(array: jax.Array) -> jax.Array:
    """Pins [B, T, N, ..]: rows over the axes of the batch, tokens together, heads over `tensor` and `sequence`.

    For what a token does with all of its row, head by head: two exchanges inside the row's group of devices, to here
    and back to `by_tokens`.
    """
    return _pin(by_tokens(array), (), ("tensor", "sequence"))  # in two steps, for which the compiler has an exchange


def _pin(array, tokens, heads):
    mesh = mesh_in_use()
    if mesh is None:
        return array
    spec = (dividing(mesh, axes, size) for axes, size in zip((BATCH_AXES, tokens, heads), array.shape, strict=False))
    return jax.lax.with_sharding_constraint(array, PartitionSpec(*spec))


def dividing(mesh: AbstractMesh, axes: tuple[str, ...], size: int) -> tuple[str, ...]:
    """The first of `axes`, as many as together divide `size`."""
    while size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes


def pad_tokens(array: jax.Array, value: int = 0) -> jax.Array:
    """[B, T, ..] with `value` behind its tokens, so that the mesh axis `sequence` divides them."""
    mesh = mesh_in_use()
    if mesh is None or array.shape[1] % mesh.shape["sequence"] == 0:
        return array
    room = [(0, 0), (0, -array.shape[1] % mesh.shape["sequence"])] + [(0, 0)] * (array.ndim - 2)
    return jnp.pad(array, room, constant_values=value)
