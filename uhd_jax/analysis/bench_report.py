"""What `uhd-jax bench` says: everything measured, as a dictionary of JSON types and as text."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Sequence
from typing import Any

import jax

from uhd_jax import cost
from uhd_jax.analysis.aot_report import aligned
from uhd_jax.analysis.aot_targets import GIB
from uhd_jax.analysis.bench import case_of, measure, parts_of, result
from uhd_jax.analysis.bench_step import measure_data, measure_step
from uhd_jax.config import RunConfig, StageConfig

PARTS = ("tower", "connector", "decoder", "step", "data", "pipeline", "generation")
DEFAULT = PARTS[:-2]
PEAK = (
    "utilisation: FLOPs of the model (docs/cost.md; none of padding, recomputation or the optimiser) over time and "
    "peak; peak is dense bfloat16 as published, on a CPU the measured rate of a float32 product of 1,024 x 1,024"
)


def bench(
    config: RunConfig,
    stage: StageConfig,
    parts: Sequence[str] = DEFAULT,
    rows: int | None = None,
    repeats: int = 5,
    against: str | None = None,
    torch_compile: bool = True,
) -> dict[str, Any]:
    """Measures a stage's model on this machine.

    Args:
      config: the run; its mesh is that of the step, parts run on the first device.
      stage: of the run.
      parts: of `PARTS`.
      rows: of one call; None for the stage's.
      repeats: of each measurement, after one to warm up.
      against: "torch" to measure transformers' classes in turns with the parts.
      torch_compile: try `torch.compile` on them.

    Raises:
      BenchError: torch or transformers is missing.
      ShardingError: rows do not divide over the devices.
    """
    devices = jax.devices()
    case = case_of(config.model, stage, rows)
    one, image_views = cost.peak_flops(devices[:1], config.train.peak_flops), stage.max_slices + 1
    report: dict[str, Any] = {
        "name": config.name,
        "stage": stage.name,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "machine": platform.processor() or platform.machine(),
        "peak_flops": one,
        "dtype": config.model.dtype,
        "rows": case.bucket.rows,
        "bucket": {key: getattr(case.bucket, key) for key in ("slots", "tokens", "patches")},
        "view_grid": list(case.grid),
        "image_views": image_views,
        "repeats": repeats,
        "versions": {"jax": jax.__version__},
        "parts": [],
        "against": [],
        "data": None,
        "pipeline": [],
        "generation": None,
    }
    made = parts_of(case, parts)
    others = [None] * len(made)
    if against == "torch":
        from uhd_jax.analysis.bench_torch import counterpart

        others = [counterpart(case, part.name, part.kind, torch_compile) for part in made]
    for part, other in zip(made, others, strict=True):
        timings = measure([part.call] + ([other.call] if other else []), repeats)
        report["parts"].append(result(part, timings[0], one, image_views))
        if other:
            theirs = timings[1]
            report["against"].append(
                {
                    "part": part.name,
                    "pass": part.kind,
                    "class": other.described,
                    "seconds": theirs.seconds,
                    "cpu_seconds": theirs.cpu_seconds,
                    "ratio": theirs.seconds / timings[0].seconds,
                    "cpu_ratio": theirs.cpu_seconds / timings[0].cpu_seconds,
                }
            )
    if "step" in parts:
        peak = cost.peak_flops(devices, config.train.peak_flops)
        report["parts"].append(measure_step(config, case, repeats, peak, image_views))
    if "data" in parts:
        report["data"] = measure_data(config, case, repeats)
    if "pipeline" in parts:
        from uhd_jax.analysis import bench_data

        report["pipeline"] = [dataclasses.asdict(speed) for speed in bench_data.measure(repeats=repeats)]
    if "generation" in parts:
        from uhd_jax.analysis.bench_generation import measure_generation

        report["generation"] = measure_generation(config.model, rows, repeats, against)
    return report


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    bucket, grid = report["bucket"], report["view_grid"]
    lines = [
        f"{report['name']}, {report['stage']}, {report['dtype']}: {report['devices']} x {report['device']}, peak "
        f"{report['peak_flops'] / 1e12:.3g} TFLOP/s each",
        f"{report['rows']} rows of {bucket['tokens']} tokens and {bucket['slots']} views of {grid[0]}x{grid[1]} "
        f"patches; median of {report['repeats']}",
        "",
    ]
    rows = [
        (
            "part",
            "pass",
            "seconds",
            "processor s",
            "views/s",
            "images/s",
            "tokens/s",
            "utilised",
            "GiB",
            "compiled in s",
        )
    ]
    for part in report["parts"]:
        rates = part["per_second"]
        rows.append(
            (
                part["part"],
                part["pass"],
                f"{part['seconds']:.4f}",
                f"{part['cpu_seconds']:.4f}",
                *(f"{rates[name]:,.1f}" if name in rates else "" for name in ("views", "images", "tokens")),
                f"{part['utilisation']:.1%}",
                f"{part['memory_bytes'] / GIB:.3f}",
                f"{part['compile_seconds']:.1f}",
            )
        )
    if report["parts"]:
        lines += aligned(rows)
    if report["against"]:
        rows = [("against", "pass", "class", "seconds", "times ours", "processor times ours")]
        for one in report["against"]:
            ratios = (f"{one['ratio']:.2f}", f"{one['cpu_ratio']:.2f}")
            rows.append((one["part"], one["pass"], one["class"], f"{one['seconds']:.4f}", *ratios))
        lines += ["", *aligned(rows), "above 1: slower than here"]
    if data := report["data"]:
        if "skipped" in data:
            lines += ["", f"data: not measured: {data['skipped']}"]
        else:
            lines += [
                "",
                f"data alone: {data['batches_per_second']:.2f} batches/s, {data['images_per_second']:.1f} images/s; of "
                f"{data['steps']} steps with it, {data['wait_share']:.1%} of the time waits for a batch",
            ]
    if report["pipeline"]:
        from uhd_jax.analysis import bench_data

        lines += ["", bench_data.table([bench_data.Speed(**speed) for speed in report["pipeline"]])]
    if report["generation"]:
        lines += ["", *_generation(report["generation"])]
    lines += [
        "",
        PEAK,
        f"images/s: an image is {report['image_views']} views, cut into as many slices as the stage allows",
    ]
    return "\n".join(lines)


def _generation(found: dict[str, Any]) -> list[str]:
    rows = [("generation", "seconds", "processor s", "theirs", "times ours", "processor times ours")]
    for one in found["speeds"]:
        there = one["against"]
        compared = (f"{there['seconds']:.4f}", f"{there['ratio']:.2f}", f"{there['cpu_ratio']:.2f}") if there else ()
        own = (one["what"], f"{one['seconds']:.4f}", f"{one['cpu_seconds']:.4f}")
        rows.append((*own, *(compared or ("", "", ""))))
    lines = [*aligned(rows), f"of answers of {found['tokens']} tokens"]
    if found["speeds"][0]["against"]:
        said = "the same tokens" if found["same_tokens"] else "OTHER TOKENS"
        lines[-1] += f"; transformers' generate says {said}; above 1: it is slower"
    return lines
