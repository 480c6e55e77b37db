"""Where activations lie: rows over the mesh axes of the batch, a row's tokens over `sequence`."""

from __future__ import annotations

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
    mesh = mesh_in_use()
    if mesh is None:
        return array
    tokens = "sequence" if array.shape[1] % mesh.shape["sequence"] == 0 else None
    return jax.lax.with_sharding_constraint(array, PartitionSpec(BATCH_AXES, tokens))


def pad_tokens(array: jax.Array, value: int = 0) -> jax.Array:
    """[B, T, ..] with `value` behind its tokens, so that the mesh axis `sequence` divides them."""
    mesh = mesh_in_use()
    if mesh is None or array.shape[1] % mesh.shape["sequence"] == 0:
        return array
    room = [(0, 0), (0, -array.shape[1] % mesh.shape["sequence"])] + [(0, 0)] * (array.ndim - 2)
    return jnp.pad(array, room, constant_values=value)
