"""Machines to compile for without having them: their names, what their chips can do, and their devices."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
import re
from typing import Any

import jax

GIB = 2**30


class AotError(ValueError):
    """A machine that is not known here, or whose compiler is not installed."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device (a chip; of tpu7x and v4 a core, half a chip) can do at best, as published."""

    platform: str  # "tpu" or "cuda"
    description: str
    memory_bytes: int  # that a program may use
    peak_flops: float  # dense bfloat16, per second
    memory_bandwidth: float  # bytes per second
    link_bandwidth: (
        float  # bytes per second that leave a device over all its links in a slice, or over NVLink in a host
    )
    network_bandwidth: float  # bytes per second that leave a device for other slices, or other hosts of GPUs
    source: str


_CLOUD = "docs.cloud.google.com/tpu/docs/"
_NVIDIA = "NVIDIA's data sheets of the GPU and of DGX"

# TPU memory is what the compiler says is available; GPU memory is nine tenths of the device's, as XLA reserves some.
# Links are published for both directions together, half of which counts here. Networks: of a TPU pod over its chips; of
# GPU hosts one 400 Gb/s adapter per GPU, as in DGX H100 and H200.
CHIPS: dict[str, Chip] = {
    "v5e": Chip("tpu", "TPU v5e", int(15.75 * GIB), 197e12, 819e9, 200e9, 3.125e9, f"{_CLOUD}v5e"),
    "v5p": Chip("tpu", "TPU v5p", int(95.74 * GIB), 459e12, 2765e9, 600e9, 6.25e9, f"{_CLOUD}v5p"),
    "v6e": Chip("tpu", "TPU v6e", int(31.25 * GIB), 918e12, 1640e9, 400e9, 12.5e9, f"{_CLOUD}v6e"),
    "tpu7x": Chip("tpu", "TPU7x, one core", int(94.75 * GIB), 1153e12, 3690e9, 300e9, 6.25e9, f"{_CLOUD}tpu7x"),
    "h100": Chip("cuda", "NVIDIA H100 80GB HBM3", int(0.9 * 84978434048), 989e12, 3352e9, 450e9, 50e9, _NVIDIA),
    "h200": Chip("cuda", "NVIDIA H200", int(0.9 * 150_754_820_096), 989e12, 4800e9, 450e9, 50e9, _NVIDIA),
}

# Slices by number of chips. Of v5p the number in a friendly name counts cores, two a chip.
_FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
_CUBES |= {1024: "8x8x16"}
SLICES = {"v5e": _FLAT, "v6e": _FLAT, "v5p": _CUBES, "tpu7x": _CUBES}
GPUS_PER_HOST = 8

_FORMS = "v5e:4x4, v5p:4x4x4, v6e-8, v5p-128, tpu7x:2x2x1, 2xv5e:4x4 (slices), h100:8, 8xh200"


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine: some slices of a TPU, or some hosts of GPUs."""

    name: str  # as asked for
    chip_name: str  # of `CHIPS`
    topology: str  # "4x4" of TPUs; of GPUs "1xHOSTSxGPUS"
    groups: int  # slices, or hosts of GPUs
    devices: int  # in all

    @property
    def chip(self) -> Chip:
        """What its devices can do."""
        return CHIPS[self.chip_name]

    @property
    def per_group(self) -> int:
        """Devices with fast links among each other."""
        return self.devices // self.groups


def parse_target(text: str) -> Target:
    """The machine of a name such as those of `_FORMS`.

    Raises:
      AotError: no such machine is known.
    """
    name = text.strip().lower().replace("v5litepod", "v5e")
    if match := re.fullmatch(r"(?:(h100|h200):(\d+)|(\d+)x(h100|h200)|(h100|h200))", name):
        chip = match[1] or match[4] or match[5]
        count = int(match[2] or match[3] or GPUS_PER_HOST)
        if count < 1 or (count > GPUS_PER_HOST and count % GPUS_PER_HOST):
            raise AotError(f"topology {text!r}: {count} GPUs are not up to 8, or whole hosts of 8")
        hosts = max(1, count // GPUS_PER_HOST)
        return Target(text, chip, f"1x{hosts}x{count // hosts}", hosts, count)
    match = re.fullmatch(r"(?:(\d+)x)?(v5e|v5p|v6e|tpu7x)(?:[:=_](\d+(?:x\d+){1,2})|-(\d+))?", name)
    if match is None:
        raise AotError(f"topology {text!r} is not known; write one like {_FORMS}")
    slices, chip, shape, number = int(match[1] or 1), match[2], match[3], match[4]
    table = SLICES[chip]
    if number is not None:
        chips = int(number) // 2 if chip == "v5p" else int(number)
        if chips not in table or (chip == "v5p" and int(number) % 2):
            scale = 2 if chip == "v5p" else 1
            known = ", ".join(f"{chip}-{scale * size}" for size in table)
            raise AotError(f"topology {text!r}: no such slice; known: {known}")
        shape = table[chips]
    elif shape is None:
        shape = next(iter(table.values()))
    sides = [int(side) for side in shape.split("x")]
    if len(sides) != (2 if table is _FLAT else 3) or min(sides) < 1 or slices < 1:
        raise AotError(f"topology {text!r}: {chip} has {'two' if table is _FLAT else 'three'} sides of at least 1")
    cores = 2 if chip == "tpu7x" else 1
    return Target(text, chip, shape, slices, slices * math.prod(sides) * cores)


def prepare() -> None:
    """Lets this process compile for machines that are not there: it needs a CPU alone, and asks no metadata server.

    Before the first device is asked for.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # else two compiles at a time end in an error
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    jax.config.update("jax_platforms", "cpu")


def missing_compiler(target: Target) -> str:
    """What has to be installed before anything can be compiled for a target; empty if nothing."""
    module = "libtpu" if target.chip.platform == "tpu" else "jax_plugins.xla_cuda13"
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    return "" if found else module


@functools.lru_cache(maxsize=4)
def devices_of(target: Target) -> tuple[Any, ...]:
    """The machine's devices, to compile for; nothing can be run on them.

    Raises:
      AotError: its compiler is missing, or knows no such topology.
    """
    from jax.experimental import topologies

    if missing := missing_compiler(target):
        raise AotError(f"compiling for {target.name} needs {missing}: pip install 'uhd-jax[aot]'")
    try:
        if target.chip.platform == "tpu":
            several = {"num_slices": target.groups} if target.groups > 1 else {}
            described = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{target.chip_name}:{target.topology}", **several
            )
        else:
            described = topologies.get_topology_desc(
                platform="cuda", topology_name="", topology=target.topology, target_config=_gpu_text(target.chip)
            )
    except Exception as error:  # of many kinds, from the plugin
        said = " ".join(str(error).split())
        raise AotError(f"topology {target.name!r} is refused by the compiler: {said[:300]}") from error
    found = tuple(described.devices)
    if len(found) != target.devices:
        raise AotError(f"topology {target.name!r}: the compiler knows {len(found)} devices, not {target.devices}")
    return found


def _gpu_text(chip: Chip) -> str:
    """XLA's description of a GPU of the Hopper kind (text form of its GpuTargetConfig)."""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {int(chip.memory_bandwidth)}
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {int(chip.memory_bytes / 0.9)}
  shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: 9 minor: 0 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{chip.description}"
"""
