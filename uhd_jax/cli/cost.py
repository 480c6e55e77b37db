"""What a configuration costs for one image: parameters, visual tokens, FLOPs, and the state that training keeps.

  uhd-jax cost --config=configs/demo.py --image-size=224x336

The first table is of the model itself, a stage is counted with its own slicing. One multiply-accumulate is 2 FLOPs;
only products with weights and in attention count, padding and recomputation do not.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from uhd_jax.cli.common import not_negative, size
from uhd_jax.config import MODES, RunConfig
from uhd_jax.slicing.plan import Size, plan_image

CONFIG = "required"
CONVENTION = "2 FLOPs per multiply-accumulate of products with weights and in attention; no padding, no recomputation"
STATE = "parameters, gradients and the optimiser's two moments, all float32 and over all devices; no activations"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `uhd-jax cost`."""
    parser.add_argument("--image-size", type=size, required=True, metavar="HxW", help="height and width in pixels")
    parser.add_argument("--text-tokens", type=not_negative, default=0, metavar="N", help="tokens of text (default 0)")
    parser.add_argument("--mode", choices=MODES, help="4x leaves the compressor out (default: the configuration's)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(arguments: argparse.Namespace, config: RunConfig | None) -> None:
    """Prints the cost of one image with its text."""
    costs = costs_of(config, arguments.image_size, arguments.text_tokens, arguments.mode)
    print(json.dumps(costs) if arguments.json else _tables(costs))


def costs_of(config: RunConfig, image: Size, text_tokens: int = 0, mode: str | None = None) -> dict[str, Any]:
    """Everything the command prints, with JSON types only."""
    from uhd_jax import cost

    model = config.model
    plan = plan_image(image, model, mode)
    parameters = cost.parameter_counts(model)
    forward = cost.forward_flops(model, cost.plan_work(plan, text_tokens), mode)
    stages = []
    for stage in config.train.stages:
        stage_plan = plan_image(image, model.for_stage(stage), mode, stage.max_slices)
        work = cost.plan_work(stage_plan, text_tokens)
        stages.append(
            {
                "name": stage.name,
                "views": len(stage_plan.views),
                "visual_tokens": stage_plan.visual_tokens,
                "train_flops": cost.train_flops(model, work, stage.trainable, mode),
                "state_bytes": cost.state_bytes(model, stage.trainable),
            }
        )
    return {
        "plan": plan.to_json(),
        "text_tokens": text_tokens,
        "mode": mode or model.mode,
        "parameters": {**parameters, "total": sum(parameters.values())},
        "forward_flops": {**forward, "total": sum(forward.values())},
        "stages": stages,
        "flops_convention": CONVENTION,
        "state_bytes_convention": STATE,
    }


def _tables(costs: dict[str, Any]) -> str:
    plan, parameters, flops = costs["plan"], costs["parameters"], costs["forward_flops"]
    height, width = plan["image"]
    lines = [
        f"image {height}x{width} (height x width), {costs['mode']}: {plan['views']} views, {plan['patches']} patches, "
        f"{plan['visual_tokens']} visual tokens, {costs['text_tokens']} other tokens",
        "",
        f"{'part':19}  {'parameters':>14}  {'forward GFLOPs':>14}",
        *(
            f"{part:19}  {parameters[part]:>14,}  {flops[part] / 1e9:>14,.3f}"
            for part in parameters
            if parameters[part]
        ),
        "",
        f"{'stage':19}  {'views':>5}  {'visual tokens':>13}  {'training GFLOPs':>15}  {'parameters':>13}  "
        f"{'gradients':>13}  {'moments':>13}",
    ]
    for stage in costs["stages"]:
        state = "  ".join(f"{count / 2**20:>9,.1f} MiB" for count in stage["state_bytes"].values())
        lines.append(
            f"{stage['name']:19}  {stage['views']:>5}  {stage['visual_tokens']:>13}  "
            f"{stage['train_flops'] / 1e9:>15,.3f}  {state}"
        )
    return "\n".join([*lines, "", f"FLOPs: {CONVENTION}.", f"MiB: {STATE}."])
