"""Checksums of a tree of arrays: whether it is what it was, and whether all devices hold the same of it.

A checksum is the sum, modulo 2**32, of an array's bit patterns times 1, 3, 5, ..: no change of one element leaves it as
it is, and a change of order hardly ever does. Each array is read once where it lies.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def _checksum(array: jax.Array) -> jax.Array:
    """uint32[] of an array of a dtype of at most 32 bits."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    index, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(array.ndim)):  # not by a reshape, which would gather what is split
        index += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)


_of_whole = jax.jit(_checksum)  # one array at a time: those of one shape share a program


@functools.partial(jax.jit, static_argnames=("mesh", "spec"))
def _of_shards(array: jax.Array, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    """uint32[devices]: of what each device of the mesh holds."""
    of_shard = jax.shard_map(
        lambda shard: _checksum(shard)[None],
        mesh=mesh,
        in_specs=spec,
        out_specs=PartitionSpec(mesh.axis_names),
        check_vma=False,  # what lies whole on several devices is to be read on each of them
    )
    return of_shard(array)


def checksums(tree: Any) -> dict[str, int]:
    """Path of each array, as "params/decoder/embedding", and its checksum, which does not depend on its sharding."""
    # One after the other: many sums over devices at a time can wait for each other for ever on few threads of a CPU.
    return {path: int(_of_whole(leaf)) for path, leaf in _paths(tree).items()}


def differing_copies(tree: Any, mesh: Mesh) -> dict[str, list[jax.Device]]:
    """Arrays of which devices that should hold the same hold something else.

    Every process of the mesh calls this and gets the same answer.

    Args:
      tree: arrays with a NamedSharding over `mesh`, each dimension divided evenly.
      mesh: of all devices.

    Returns:
      Path -> the devices in the minority; where there are as many on each side, all but those of the first kind.
    """
    leaves = _paths(tree)
    sums = [_of_shards(leaf, mesh, leaf.sharding.spec) for leaf in leaves.values()]
    everywhere = NamedSharding(mesh, PartitionSpec())
    table = jax.device_get(jax.jit(jnp.stack, out_shardings=everywhere)(sums))  # uint32[arrays, devices]
    devices = mesh.devices.flatten()
    found = {}
    for (path, leaf), row in zip(leaves.items(), table, strict=True):
        odd = [devices[index] for copies in _copies(mesh, leaf.sharding.spec) for index in _minority(copies, row)]
        if odd:
            found[path] = odd
    return found


def _copies(mesh: Mesh, spec: PartitionSpec) -> np.ndarray:
    """int[shards, copies]: numbers of the devices that hold the same shard."""
    split = {axis for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ())}
    numbers = np.arange(mesh.size).reshape(mesh.devices.shape)
    order = sorted(range(numbers.ndim), key=lambda axis: mesh.axis_names[axis] not in split)
    shards = math.prod(mesh.shape[axis] for axis in split)
    return numbers.transpose(order).reshape(shards, -1)


def _minority(copies: np.ndarray, row: np.ndarray) -> np.ndarray:
    values, first, counts = np.unique(row[copies], return_index=True, return_counts=True)
    usual = values[np.lexsort((first, -counts))[0]]
    return copies[row[copies] != usual]


def _paths(tree: Any) -> dict[str, jax.Array]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}
