"""Keeping activations where their rows are."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import PartitionSpec

from uhd_jax.sharding.rules import BATCH_AXES


def over_rows(tree: Any) -> Any:
    """Pins the leading axis (rows, or views) of every array to the mesh axes of the batch; the others stay free.

    Without it the compiler, which sees both the batch and the kernels split over fsdp, may choose to gather the batch
    of all devices instead of a layer's kernels. Outside of a mesh, as in generation on one device, nothing happens.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    free = PartitionSpec.UNCONSTRAINED

    def pin(array):
        return jax.lax.with_sharding_constraint(array, PartitionSpec(BATCH_AXES, *[free] * (array.ndim - 1)))

    return jax.tree.map(pin, tree)


def whole_rows(array: jax.Array) -> jax.Array:
    """Pins all axes: the leading one as `over_rows` does, the others whole on every device.

    For places where the compiler, left free, has divided a product wrongly.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return array
    return jax.lax.with_sharding_constraint(array, PartitionSpec(BATCH_AXES))
