"""What `uhd-jax compile` says of a step: a dictionary of JSON types, and the same as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from uhd_jax import cost
from uhd_jax.analysis import aot_ceiling, aot_compile
from uhd_jax.analysis.aot_hlo import collectives_by_kind, count_calls, read_collectives
from uhd_jax.analysis.aot_targets import GIB, Target
from uhd_jax.config import RunConfig

KERNEL_CALLS = {"splash": "tpu_custom_call"}  # how kernels show in a program


def compile_report(
    config: RunConfig, target: Target, stage_name: str | None = None, effort: float = 0.0
) -> dict[str, Any]:
    """Compiles a stage's step for a machine and gathers what is known then; docs/pods.md explains the keys.

    `effort` is as of `compile_step`.

    Raises:
      AotError: an unknown stage, a missing compiler, or one that fails for another reason than memory.
      ShardingError: rows or parameters do not divide over the devices.
    """
    stage = aot_compile.stage_of(config, stage_name)
    made = aot_compile.compile_step(config, stage, target, effort)
    chip, model, mesh = target.chip, config.model, aot_compile.mesh_sizes(made.mesh)
    counts = cost.parameter_counts(model)
    flops = aot_ceiling.step_flops(model, stage, made.bucket, target.devices)
    report: dict[str, Any] = {
        "name": config.name,
        "stage": stage.name,
        "topology": target.name,
        "chip": target.chip_name,
        "devices": target.devices,
        "groups": target.groups,
        "mesh": mesh,
        "rows": stage.rows,
        "accumulation": stage.accumulation,
        "bucket": {key: getattr(made.bucket, key) for key in ("slots", "tokens", "patches")},
        "tower_remat": model.tower_remat,
        "decoder_remat": model.decoder_remat,
        "attention": made.attention,
        "fits": made.fits,
        "peak_memory_bytes": made.peak_memory_bytes,
        "device_memory_bytes": chip.memory_bytes,
        "memory": made.memory,
        "effort": effort,
        "lower_seconds": round(made.lower_seconds, 1),
        "compile_seconds": round(made.compile_seconds, 1),
        "parameters": sum(counts.values()),
        "trained_parameters": sum(counts[part] for part in stage.trainable),
        "flops_per_device": dataclasses.asdict(flops),
        "collectives": {},
        "kernel_calls": 0,
        "seconds": None,
        "utilisation_ceiling": None,
        "versions": {"jax": jax.__version__},
    }
    if made.text:
        collectives = read_collectives(made.text, target.devices, target.per_group)
        moved = aot_ceiling.memory_bytes(model, stage, made.bucket, mesh, made.memory)
        times = aot_ceiling.seconds(flops, moved, collectives, chip)
        report |= {
            "collectives": collectives_by_kind(collectives),
            "kernel_calls": count_calls(made.text, KERNEL_CALLS.get(made.attention, "")),
            "seconds": times,
            "utilisation_ceiling": aot_ceiling.utilisation(flops.useful, times, chip),
        }
    return report


def verdict(report: dict[str, Any]) -> str:
    """Fits, or by how much it does not."""
    peak, room = report["peak_memory_bytes"], report["device_memory_bytes"]
    used = f"{peak / GIB:.2f} of {room / GIB:.2f} GiB per device"
    return f"fits: {used}" if report["fits"] else f"does not fit by {(peak - room) / GIB:.2f} GiB: {used}"


def effort_text(report: Mapping[str, Any]) -> str:
    """With which effort it was compiled, in parentheses; nothing where it is that of training."""
    return f" (effort {effort:g})" if (effort := report.get("effort", 0)) else ""


def mesh_text(sizes: Mapping[str, int]) -> str:
    """The axes over which something is split, as they are set."""
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    bucket = report["bucket"]
    lines = [
        f"{report['name']}, {report['stage']}, for {report['topology']}: {report['devices']} devices, mesh "
        f"{mesh_text(report['mesh'])}",
        f"rows {report['rows']} in {report['accumulation']} micro-batches, each row {bucket['tokens']} tokens and "
        f"{bucket['slots']} views of {bucket['patches']} patches",
        f"remat: tower {report['tower_remat']}, decoder {report['decoder_remat']}; attention: {report['attention']}"
        + (f", {report['kernel_calls']} kernel calls" if report["kernel_calls"] else ""),
        "",
        verdict(report),
    ]
    if report["memory"]:
        pieces = ", ".join(f"{name} {size / GIB:.2f}" for name, size in report["memory"].items())
        lines.append(f"  GiB: {pieces}")
    lines.append(
        f"lowered in {report['lower_seconds']} s, compiled in {report['compile_seconds']} s{effort_text(report)}"
    )
    useful, executed = (report["flops_per_device"][key] for key in ("useful", "executed"))
    lines += ["", f"per device and step: {useful / 1e12:.2f} TFLOPs of the model, {executed / 1e12:.2f} with remat"]
    if report["collectives"]:
        rows = [("collective", "instructions", "runs", "payload GB", "over the wire GB")]
        rows += [
            (
                kind,
                f"{sums['instructions']}",
                f"{sums['count']}",
                f"{sums['payload_bytes'] / 1e9:.3f}",
                f"{sums['wire_bytes'] / 1e9:.3f}",
            )
            for kind, sums in report["collectives"].items()
        ]
        lines += ["", *aligned(rows)]
    if report["seconds"]:
        times = ", ".join(f"{name} {time:.3f}" for name, time in report["seconds"].items())
        best = report["utilisation_ceiling"]
        lines += [
            "",
            f"least seconds of a step: {times}",
            f"utilisation can be at most {best['overlapped']:.0%} where all of it overlaps, "
            f"{best['one_after_another']:.0%} where nothing does",
        ]
    return "\n".join(lines)


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns of equal width, the first one to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        padded = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]))
    return lines
