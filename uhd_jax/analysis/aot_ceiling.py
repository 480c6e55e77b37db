"""How well a compiled step could use its devices at best, and at other numbers of them: bounds, not measurements.

The formulas are those of docs/pods.md. Everything is per device and per step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from uhd_jax import cost
from uhd_jax.analysis.activations import activations
from uhd_jax.analysis.aot_hlo import Collective
from uhd_jax.analysis.aot_targets import Chip, Target
from uhd_jax.batch import Bucket
from uhd_jax.config import ModelConfig, StageConfig
from uhd_jax.training import vdim

# Chips whose fast links reach each other: a pod of v5e or v6e, the largest job of v5p, a host of GPUs.
LARGEST_GROUP = {"v5e": 256, "v6e": 256, "v5p": 6144, "tpu7x": 9216 * 2, "h100": 8, "h200": 8}
LARGEST_SHARDS = 128  # fsdp at most: `sharding.rules.check_params` wants it to divide SigLIP 2's width of 2^7 x 9


@dataclasses.dataclass(frozen=True)
class Flops:
    """Per device and step."""

    useful: float  # of the model: forward and backward pass of a full bucket, each row one sample
    executed: float  # with what rematerialisation makes again


def step_flops(model: ModelConfig, stage: StageConfig, bucket: Bucket, devices: int) -> Flops:
    """FLOPs of a step by the analytic model (docs/cost.md); the compiler's own count passes loop bodies once."""
    work = cost.bucket_work(bucket)
    if stage.objective == "reconstruction":
        useful = vdim.step_flops(model, work, stage.reconstruction) / devices
        return Flops(useful, useful)
    useful = cost.train_flops(model, work, stage.trainable)
    again = 0.0
    policies = {"decoder": model.decoder_remat}
    if set(stage.trainable) & set(cost.GROUPS["tower"]):
        policies["tower"] = model.tower_remat
    for stretch in cost.forward_stretches(model, work):
        policy = policies.get(stretch.part, "none")
        if policy != "none":
            again += 2 * (stretch.pair_macs + (stretch.weight_macs if policy == "full" else 0.0))
    return Flops(useful / devices, (useful + again) / devices)


def memory_bytes(
    model: ModelConfig, stage: StageConfig, bucket: Bucket, mesh: Mapping[str, int], memory: Mapping[str, int]
) -> float:
    """Bytes to and from a device's memory, at least.

    The state is read and written once. In each micro-batch all parameters are read in bfloat16, once forward, once
    backward and once to make activations again, and the activations kept are written and read.
    """
    rows = mesh.get("dcn_data", 1) * mesh["data"] * mesh["fsdp"] * mesh.get("sequence", 1)
    local = dataclasses.replace(bucket, rows=max(1, bucket.rows // stage.accumulation // rows))
    passes = 2 + (model.decoder_remat != "none")
    weights = passes * 2 * sum(cost.parameter_counts(model).values()) / mesh["tensor"]
    kept = 0
    if stage.objective == "language":
        kept = activations(dataclasses.replace(model, attention="xla"), local, stage.trainable).kept
    return memory["arguments"] + memory["outputs"] + stage.accumulation * (weights + 2 * kept)


def seconds(flops: Flops, moved_bytes: float, collectives: Sequence[Collective], chip: Chip) -> dict[str, float]:
    """The least time that each resource needs for a step: matrix units, memory, links, and the network of hosts."""
    wires = {
        crosses: sum(one.count * one.wire_bytes for one in collectives if one.crosses == crosses)
        for crosses in (False, True)
    }
    return {
        "compute": flops.executed / chip.peak_flops,
        "memory": moved_bytes / chip.memory_bandwidth,
        "links": wires[False] / chip.link_bandwidth,
        "network": wires[True] / chip.network_bandwidth,
    }


def utilisation(useful: float, times: Mapping[str, float], chip: Chip) -> dict[str, float]:
    """Useful FLOPs over peak: where everything runs beside everything else, and where nothing does."""
    ideal = useful / chip.peak_flops
    return {"overlapped": ideal / max(times.values()), "one_after_another": ideal / sum(times.values())}


def project(report: Mapping[str, Any], target: Target, devices: int) -> dict[str, Any]:
    """A projection of a compiled step to another number of devices, each with as many rows as before.

    Parameters are split over as many devices of a group with fast links as the sharding rules allow, and copied over
    the rest of the group and over groups. Bytes over the links grow as (m - 1) / m with m shards; among d copies in a
    group and between s groups gradients are summed in float32, which moves 2 (d - 1) / d and 2 (s - 1) / s times those
    that a device holds.
    """
    chip, before = target.chip, report["devices"] // report["groups"]
    group = min(devices, LARGEST_GROUP[target.chip_name])
    groups = -(-devices // group)
    shards = min(LARGEST_SHARDS, group & -group)  # a power of two that divides the group
    copies = group // shards
    gradients = 4 * report["trained_parameters"] / shards
    times = dict(report["seconds"])
    times["links"] *= ((shards - 1) / shards) / ((before - 1) / before)
    times["links"] += 2 * (copies - 1) / copies * gradients / chip.link_bandwidth
    times["network"] = 2 * (groups - 1) / groups * gradients / chip.network_bandwidth
    return {
        "devices": devices,
        "mesh": {"dcn_data": groups, "data": copies, "fsdp": shards},
        "seconds": times,
        "utilisation": utilisation(report["flops_per_device"]["useful"], times, chip),
    }
