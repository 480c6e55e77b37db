"""Show how an image is cut: thumbnail, slices, patches, visual tokens.

  uhd-jax slices photo.jpg                     a table
  uhd-jax slices photo.jpg --out=slices.png    and a picture
  uhd-jax slices --size=1344x896 --json        the same numbers for a size, without an image

Without --config the rule is that of LLaVA-UHD v4: views of about 448x448 pixels, at most 9 slices.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter

from uhd_jax.cli.common import UsageError, file_to_write, positive, size, whole_file
from uhd_jax.config import MODES, RunConfig, SlicingConfig, TowerConfig
from uhd_jax.slicing import image_io
from uhd_jax.slicing.plan import Plan, Size, make_plan, plan_image

CONFIG = "optional"
V4_LEVELS = {"16x": 2, "4x": 1}  # the compressor and one merging round; 4x leaves the compressor out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `uhd-jax slices`."""
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="an image file")
    parser.add_argument("--size", type=size, metavar="HxW", help="height and width in pixels, instead of an image")
    parser.add_argument(
        "--mode", choices=MODES, help="4x leaves the compressor out (default: the configuration's, else 16x)"
    )
    parser.add_argument("--max-slices", type=positive, metavar="N", help="replaces the configuration's limit")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--out", type=file_to_write, metavar="F.png", help="draw the image with its views into it")


def run(arguments: argparse.Namespace, config: RunConfig | None) -> None:
    """Prints the plan and draws it on request."""
    if (arguments.image is None) == (arguments.size is None):
        raise UsageError("give either an IMAGE or --size=HxW")
    if arguments.out and arguments.image is None:
        raise UsageError("--out draws an image: give IMAGE instead of --size")
    slicing = config.model.slicing if config else SlicingConfig()
    # Decoded for the table too, which its header would be enough for: a user wants to know that a file is damaged.
    pixels = None if arguments.size else image_io.open_image(arguments.image, slicing.limits)
    image_size = arguments.size or Size(*pixels.shape[:2])
    if config:
        plan = plan_image(image_size, config.model, arguments.mode, arguments.max_slices)
    else:
        levels = V4_LEVELS[arguments.mode or "16x"]
        plan = make_plan(image_size, slicing, TowerConfig().patch_size, levels, arguments.max_slices)
    if arguments.out:
        from uhd_jax.slicing import viewer

        picture = viewer.draw_slices(pixels, plan, os.path.basename(arguments.image))
        with whole_file(arguments.out) as partial:
            picture.save(partial, format="PNG")
    print(json.dumps(plan.to_json()) if arguments.json else _table(plan))


def _table(plan: Plan) -> str:
    first = f", first resized to {plan.resized}" if plan.resized != plan.image else ""
    grid = f"{plan.grid} slices (rows x cols)" if plan.slices else "not sliced"
    rows = [("", "views", "height x width", "patch grid", "patches", "visual tokens")]
    views = [("thumbnail", 1, plan.thumbnail)] if plan.thumbnail else []
    views += [("slice", count, view) for view, count in Counter(plan.slices).items()]  # of v1_legacy differ
    for name, count, view in views:
        rows.append((name, count, view.size, view.patch_grid, view.patch_grid.area * count, view.visual_tokens * count))
    rows.append(("together", len(plan.views), "", "", plan.patches, plan.visual_tokens))
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join([f"image {plan.image} (height x width){first}: {grid}", *(line.rstrip() for line in lines)])
