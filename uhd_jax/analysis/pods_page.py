"""docs/pods.md as text, from what was compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from uhd_jax.analysis.aot_ceiling import project
from uhd_jax.analysis.aot_report import effort_text, mesh_text, verdict
from uhd_jax.analysis.aot_targets import CHIPS, GIB, parse_target
from uhd_jax.analysis.pods_recipes import PROJECTED, RECIPES

PAGE = """\
# Slices and hosts

What the full-size recipes need on TPU slices and GPU hosts, from the real compilers with no accelerator behind them:
nothing on this page was run on a TPU or a GPU. It is written by `python -m uhd_jax.analysis.pods write` from the JSON
files in `docs/pods/`, which `python -m uhd_jax.analysis.pods compile` makes, with `pip install 'uhd-jax[aot]'`. One
recipe and machine of your own:

```bash
uhd-jax compile --config=configs/uhd_v4.py:stage4 --topology=v5p:4x4x4
uhd-jax compile --config=configs/uhd_v1.py --stage=stage2 --topology=8xh100 \\
  --config.train.stages[1].accumulation=8 --json
```

## How to read it

- **Memory** is what the compiled step needs on each device: arguments, outputs that are not written over arguments,
  what is alive in between, and the program. A TPU compiler refuses what does not fit, and says what it would need; for
  a GPU nine tenths of the device's memory are compared with. `--json` has it as `peak_memory_bytes`, and `fits`.
- **Shapes.** No data is looked at. A row has views of the largest size that images are cut into, and so many that four
  fifths of its tokens are visual, unless the stage names `buckets` or `slots`; what a data set needs says
  `uhd-jax data plan`.
- **Over the wire** is what leaves each device in a step, read from the compiled program: of n devices that take part,
  (n - 1) / n of the bytes gathered or scattered, twice that of those summed everywhere. Collectives in loops count as
  often as the loop runs. `--json` has them by kind. On a torus of three sides (v5p) the compiler gathers parameters as
  sums of pieces among zeros, which moves twice the bytes. A step that a compiler refuses has no program to read: its
  cells are empty.
- **TFLOPs** per device and step are those of the model ([cost.md](cost.md)), with every slot a view and every row one
  sample; the compiler's own count passes a loop's body once and is not used.
- **Ceiling**: useful FLOPs over peak FLOP/s, at most. The least time of each resource is work over its published speed:
  FLOPs with what remat makes again; bytes to and from memory (state once, parameters in bfloat16 once each way and once
  more with remat, kept activations twice); bytes over the links. The higher figure lets all of it overlap, the lower
  one nothing. Both leave out all that a real run loses besides: a bound, not a forecast.
- **Attention** on TPUs is JAX's splash kernel with segments, forward and backward, in tower and decoder. On GPUs
  cuDNN's would be used; it plans its kernels on a device, and `jax.nn.dot_product_attention(implementation="cudnn")`
  refuses to lower where there is none, so for GPUs the steps here are compiled with plain attention in blocks, which
  takes more memory and time.

## Devices

@CHIPS@

Peak is dense bfloat16. Links: out of one device over all its links, half of what is published for both directions.
Network: to other slices or hosts, per device.

## Recipes

Choices that all share: float32 state split over `fsdp`, which is the whole slice where the table says nothing else;
bfloat16 computation; remat `full`, that is, each layer keeps its input alone. Micro-batches where a step's rows would
not fit at one time.

@RECIPES@

## What effort changes

TPU compilers take 10 to 40 minutes of two cores for such a step, almost all of it in the code generator.
`--effort=-1` (`jax_exec_time_optimization_effort`) takes less of it, for a program that would run slower; rows above
say "effort -1" where it was used. Both, for the same steps:

@EFFORT@

Memory came out within 3 %, and what travels too but for MiniCPM-V, whose parameters the compiler gathers more often
when it takes its time: rows with "effort -1" may say too little there.

Times are those of two CPU cores that had other work beside it. The step of a small model (that of `tests/test_aot.py`)
compiles for `v5e:2x2`, for two such slices (`2xv5e:2x2` with `mesh.dcn_data=2`), for `tpu7x:2x2x1` and for `h100:8`.

## Projection: v4 stage 4 on more chips

**A projection, not a measurement**, of 64, 256 and 1,024 devices from the programs above, each device with the rows
that it has there. Parameters are split over devices with fast links (a
pod of v5e or v6e has 256, v5p up to 6,144, a GPU host 8), 128 at most, as SigLIP 2's width of 2^7 x 9 allows
(`mesh.fsdp`), and copied over the rest of these (`mesh.data`) and over groups of them (`mesh.dcn_data`). With m
devices that split, d copies in a group, s groups, B the bytes over the links as compiled for n devices, P the trained
parameters:

    compute  = FLOPs with remat / peak              memory  = as compiled / memory speed
    links    = (B (m - 1) / m / ((n - 1) / n) + 2 (d - 1) / d * 4 P / m) / link speed
    network  = 2 (s - 1) / s * 4 P / m / network speed
    utilisation = FLOPs / peak / (sum or largest of the four)

@PROJECTION@
"""


Reports = Mapping[str, Mapping[str, Any]]  # by file name


def page(reports: Reports, quick: Reports = MappingProxyType({})) -> str:
    """docs/pods.md.

    Args:
      reports: the table's.
      quick: of some of the same steps, compiled with less effort.
    """
    page, texts = PAGE, {"CHIPS": _chips(), "RECIPES": _recipes(reports), "PROJECTION": _projection(reports)}
    for name, text in (texts | {"EFFORT": _effort(reports, quick)}).items():
        page = page.replace(f"@{name}@", text)
    return page


def _chips() -> str:
    rows = [("name", "device", "memory GiB", "peak TFLOP/s", "memory GB/s", "links GB/s", "network GB/s", "source")]
    for name, chip in CHIPS.items():
        speeds = (chip.memory_bandwidth, chip.link_bandwidth, chip.network_bandwidth)
        rows.append(
            (
                name,
                chip.description,
                f"{chip.memory_bytes / GIB:.2f}",
                f"{chip.peak_flops / 1e12:.0f}",
                *(f"{speed / 1e9:.4g}" for speed in speeds),
                chip.source,
            )
        )
    return _table(rows)


def _recipes(reports: Reports) -> str:
    lines = []
    for recipe in RECIPES:
        lines += [f"### {recipe.title}", "", f"`{recipe.config}`. {recipe.why}", ""]
        rows = [
            (
                "machine",
                "mesh",
                "rows x micro-batches",
                "tokens, views x patches",
                "remat (tower, decoder)",
                "memory",
                "over the wire",
                "TFLOPs",
                "ceiling",
                "compiled in",
            )
        ]
        not_yet = []
        for topology in recipe.machines:
            report = reports.get(recipe.file(topology))
            if report is None:
                not_yet.append(topology)
                continue
            rows.append(_row(topology, report))
        if len(rows) > 1:
            lines += [_table(rows), ""]
        if not_yet:
            lines += [f"Not compiled: {', '.join(not_yet)}.", ""]
    return "\n".join(lines).rstrip()


def _row(topology: str, report: Mapping[str, Any]) -> tuple[str, ...]:
    bucket, best = report["bucket"], report["utilisation_ceiling"]
    wire = _wire(report)
    return (
        topology,
        mesh_text(report["mesh"]),
        f"{report['rows'] // report['accumulation']} x {report['accumulation']}",
        f"{bucket['tokens']}, {bucket['slots']} x {bucket['patches']}",
        f"{report['tower_remat']}, {report['decoder_remat']}",
        verdict(dict(report)),
        f"{wire / 1e9:.1f} GB" if report["collectives"] else "",
        f"{report['flops_per_device']['useful'] / 1e12:.1f}",
        f"{best['one_after_another']:.0%} to {best['overlapped']:.0%}" if best else "",
        f"{report['compile_seconds']:.0f} s{effort_text(report)}",
    )


def _effort(reports: Reports, quick: Reports) -> str:
    names = ("memory GiB", "over the wire GB", "compiled in")
    rows = [("recipe", "machine", *(f"{name}{more}" for name in names for more in ("", ", effort -1")))]
    for recipe in RECIPES:
        for topology in recipe.machines:
            name = recipe.file(topology)
            both = [reports.get(name, {}), quick.get(name, {})]
            if [one.get("effort", 0 if one else None) for one in both] == [0, -1]:
                memory = [f"{one['peak_memory_bytes'] / GIB:.2f}" for one in both]
                wire = [f"{_wire(one) / 1e9:.1f}" for one in both]
                seconds = [f"{one['compile_seconds']:.0f} s" for one in both]
                rows.append((recipe.title, topology, *memory, *wire, *seconds))
    return _table(rows) if len(rows) > 1 else "Nothing is compiled with both yet."


def _wire(report: Mapping[str, Any]) -> float:
    return sum(sums["wire_bytes"] for sums in report["collectives"].values())


def _projection(reports: Reports) -> str:
    title, counts = PROJECTED
    recipe = next(recipe for recipe in RECIPES if recipe.title == title)
    rows = [("compiled for", "devices", "mesh", "compute s", "memory s", "links s", "network s", "utilisation")]
    for topology in recipe.machines:
        report = reports.get(recipe.file(topology))
        if report is None or not report["seconds"]:
            continue
        for count in counts:
            projected = project(report, parse_target(topology), count)
            times, best = projected["seconds"], projected["utilisation"]
            rows.append(
                (
                    topology,
                    str(count),
                    mesh_text(projected["mesh"]),
                    *(f"{times[name]:.3f}" for name in ("compute", "memory", "links", "network")),
                    f"{best['one_after_another']:.0%} to {best['overlapped']:.0%}",
                )
            )
    return _table(rows) if len(rows) > 1 else "Nothing is compiled yet to project from."


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])
