"""The device mesh and its axes, from the slowest network to the fastest.

dcn_data (whole copies, over slices or hosts that only the data-centre network joins), data (whole copies), fsdp
(parameters split, rows split), sequence (a row's tokens split), tensor (layers split inside).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from uhd_jax.config import MeshConfig

AXES = ("dcn_data", "data", "fsdp", "sequence", "tensor")
BATCH_AXES = ("dcn_data", "data", "fsdp")  # over which the rows of a batch are split


class ShardingError(ValueError):
    """Numbers of devices, rows or parameter sizes that do not divide."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes `AXES`, in which the compiler propagates shardings (axis type Auto).

    Neighbours on `dcn_data` are whole TPU slices, or groups of processes elsewhere; all other axes stay inside one.

    Args:
      config: devices per axis; one axis may be -1, "all that are left".
      devices: None for all devices of all processes.

    Raises:
      ShardingError: the sizes do not multiply to the number of devices, or `dcn_data` would cut a slice.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [getattr(config, axis) for axis in AXES]
    asked = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size != -1 and size < 1 for size in sizes):
        raise ShardingError(f"mesh {asked}: sizes must be positive, and at most one may be -1")
    known = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise ShardingError(
            f"mesh {asked} does not fit {len(devices)} devices: set sizes whose product is {len(devices)}"
        )
    axis_types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return Mesh(_arrange(devices, tuple(sizes), asked), AXES, axis_types=axis_types)


def _arrange(devices: Sequence[jax.Device], sizes: tuple[int, ...], asked: str) -> np.ndarray:
    """Devices in the shape of the mesh, near ones along the inner axes."""
    copies = sizes[0]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform == "tpu" and slices > 1:
        if copies != slices:
            raise ShardingError(
                f"mesh {asked}: these devices are {slices} TPU slices, joined by the data-centre network alone: set "
                f"dcn_data={slices}, and the other axes for the {len(devices) // slices} devices of a slice"
            )
        outer = (copies, *[1] * (len(sizes) - 1))
        return mesh_utils.create_hybrid_device_mesh((1, *sizes[1:]), outer, devices, allow_split_physical_axes=True)
    if copies == 1 or devices[0].platform == "tpu":  # a single slice, whose shape `mesh_utils` knows
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    processes = len({device.process_index for device in devices})
    if processes % copies and copies % processes:
        raise ShardingError(
            f"mesh {asked}: a group of dcn_data is made of whole processes, and {processes} processes do not make "
            f"{copies} equal groups; set dcn_data to a divisor of {processes}"
        )
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return np.array(ordered, dtype=object).reshape(sizes)


def row_shards(mesh: Mesh | jax.sharding.AbstractMesh) -> int:
    """Number of parts that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
