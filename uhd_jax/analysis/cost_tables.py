"""Costs as text: tables of one configuration, and of several side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from uhd_jax.analysis.costs import ACTIVATIONS, STATE, WEIGHTS
from uhd_jax.cost import groups
from uhd_jax.slicing.plan import Size


def tables(cost: dict[str, Any]) -> str:
    """What `costs.costs_of` says of one configuration and size, with its stages where there are any."""
    parameters, flops = cost["parameters"], cost["forward_flops"]
    what = f"view {Size(*cost['view'])}" if cost["view"] else f"image {Size(*cost['image'])}"
    counts = {key: cost[key] for key in ("views", "patches", "visual_tokens", "text_tokens") if cost[key] is not None}
    counted = ", ".join(f"{key.replace('_', ' ')} {count}" for key, count in counts.items())
    lines = [f"{what} (height x width), {cost['mode']}: {counted}", ""]
    if flops:
        rows = [("part", "parameters", "forward GFLOPs")]
        rows += [(part, f"{count:,}", f"{flops[part] / 1e9:,.3f}") for part, count in parameters.items() if count]
    else:
        rows = [("part", "parameters")] + [(part, f"{count:,}") for part, count in parameters.items() if count]
    lines += [*_aligned(rows), "", f"forward GFLOPs: {_groups(cost)}"]
    if cost["overhead_gflops"]:
        lines.append(
            f"executed and not counted: {cost['overhead_gflops']:,.3f} of resizing and pooling as dense products"
        )
    lines += _published(cost)
    weights = ", ".join(f"{_mebibytes(count)} in {dtype}" for dtype, count in cost["weight_bytes"].items())
    lines.append(f"weights: {weights}")
    if cost["stages"]:
        rows = [("stage", "views", "visual tokens", "training GFLOPs")]
        rows[0] += ("parameters", "gradients", "moments", "kept", "worked on")
        for stage in cost["stages"]:
            state = [_mebibytes(count) for count in stage["state_bytes"].values()]
            if stage["train_flops"] is None:
                program = ["not counted"] * 3
            else:
                program = [f"{stage['train_flops'] / 1e9:,.3f}", *map(_mebibytes, stage["activation_bytes"].values())]
            name, views, visual = stage["name"], str(stage["views"]), str(stage["visual_tokens"])
            rows.append((name, views, visual, program[0], *state, *program[1:]))
        lines += ["", *_aligned(rows)]
    lines += ["", *_wrapped("FLOPs", cost["flops_convention"]), *_wrapped("weights", WEIGHTS)]
    if cost["stages"]:
        lines += [*_wrapped("parameters, gradients, moments", STATE), *_wrapped("kept, worked on", ACTIVATIONS)]
    return "\n".join(lines)


def comparison(costs: Sequence[dict[str, Any]]) -> str:
    """A line for each configuration and size."""
    rows = [("", "parameters", "tower", "connector", "decoder", "bfloat16 weights")]
    for cost in {cost["name"]: cost for cost in costs}.values():
        counts = cost["parameters"]
        apart = (f"{count:,}" for count in groups(counts).values())
        rows.append((cost["name"], f"{counts['total']:,}", *apart, _mebibytes(cost["weight_bytes"]["bfloat16"])))
    lines = [*_aligned(rows), ""]
    rows = [("image", "", "views", "visual tokens", "tower", "connector", "decoder", "GFLOPs together")]
    for cost in costs:
        shown = Size(*(cost["image"] or cost["view"]))
        gflops = (cost[f"{group}_gflops"] for group in ("tower", "connector", "decoder", "total"))
        numbers = ("not counted" if value is None else f"{value:,.1f}" for value in gflops)
        visual = "not counted" if cost["visual_tokens"] is None else str(cost["visual_tokens"])
        rows.append((str(shown), cost["name"], str(cost["views"]), visual, *numbers))
    lines += _aligned(rows, left=2)
    for cost in costs:
        lines += _published(cost, f"{cost['name']}, ")
    lines.append("")
    for text in dict.fromkeys(cost["flops_convention"] for cost in costs):
        names = ", ".join(dict.fromkeys(cost["name"] for cost in costs if cost["flops_convention"] == text))
        lines += _wrapped(f"FLOPs of {names}", text)
    return "\n".join(lines)


def _groups(cost: dict[str, Any]) -> str:
    gflops = {group: cost[f"{group}_gflops"] for group in ("tower", "connector", "decoder", "total")}
    return ", ".join(f"{group} {value:,.3f}" for group, value in gflops.items() if value is not None)


def _published(cost: dict[str, Any], name: str = "") -> list[str]:
    lines = []
    for figure in cost["published"]:
        ours = cost[f"{figure['counted']}_gflops"]
        difference = round(100 * (ours / figure["gflops"] - 1), 2) + 0.0  # no -0.0
        text = (
            f"{figure['system']}, {figure['counted']} {figure['gflops']:,.1f} ({figure['source']}); here "
            f"{ours:,.1f}, {difference:+.2f} %" + (f"; {figure['note']}" if figure["note"] else "")
        )
        lines += _wrapped(f"{name}published", text)
    return lines


def _aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(f"{name}: {text}.", 110, subsequent_indent="  ", break_on_hyphens=False)


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
