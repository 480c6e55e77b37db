"""The device mesh: axes data (whole copies), fsdp (parameters split), tensor (layers split inside)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax

from uhd_jax.config import MeshConfig

AXES = ("data", "fsdp", "tensor")


class ShardingError(ValueError):
    """Numbers of devices, rows or parameter sizes that do not divide."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh with axes `AXES`, in which the compiler propagates shardings (axis type Auto).

    Args:
      config: devices per axis; one axis may be -1, "all that are left".
      devices: None for all devices of all processes.

    Raises:
      ShardingError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [config.data, config.fsdp, config.tensor]
    asked = "x".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size != -1 and size < 1 for size in sizes):
        raise ShardingError(f"mesh {asked}: sizes must be positive, and at most one may be -1")
    known = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise ShardingError(
            f"mesh {asked} does not fit {len(devices)} devices: set sizes whose product is {len(devices)}"
        )
    axis_types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=axis_types, devices=devices)
