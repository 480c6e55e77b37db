"""What a device could reach at best, for the FLOP utilisation of training."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Dense bf16 FLOP/s of one device, without structured sparsity, as published; first match of the device kind.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    (r"TPU v4", 275e12),
    (r"TPU (v5 lite|v5e)", 197e12),
    (r"TPU (v5|v5p)", 459e12),
    (r"TPU (v6 lite|v6e)", 918e12),
    (r"TPU7x", 1153e12),  # of a core, as devices are; two a chip
    (r"NVIDIA H100 PCIe", 756e12),
    (r"NVIDIA (H100|H200|GH200)\b.*", 989e12),
    (r"NVIDIA A100\b.*", 312e12),
)


def peak_flops(devices: Sequence[Any], override: float = 0.0) -> float:
    """FLOP/s that `devices` could reach together.

    Args:
      devices: of a mesh.
      override: per device; 0 to look it up in `PEAK_FLOPS` by device kind. A kind that is not there (a CPU) is
        measured: the rate of a float32 matrix product on one device. Host devices of one process share its cores, so
        they count as one.
    """
    if override:
        return override * len(devices)
    kind = devices[0].device_kind
    for pattern, peak in PEAK_FLOPS:
        if re.fullmatch(pattern, kind):
            return peak * len(devices)
    count = len({device.process_index for device in devices}) if devices[0].platform == "cpu" else len(devices)
    return measured_matmul_flops(jax.local_devices(backend=devices[0].platform)[0]) * count


@functools.cache
def measured_matmul_flops(device: Any, size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of the fastest of a few [size, size] float32 products on one device."""
    matrix = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
