"""See where a model looks when it answers about an image.

  uhd-jax look --checkpoint=runs/quickstart --image=page.png --prompt="Transcribe." --out=looked.png

Heat over thumbnail and slices: which patch of its window the compressor weighs most, where the resampler's or the Hiwin
attention's queries look, and where the decoder looks while it says the answer, in the mean and token by token.
"""

from __future__ import annotations

import argparse
import json

from uhd_jax.cli.common import file_to_write, positive, whole_file
from uhd_jax.config import MODES, RunConfig

CONFIG = "none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `uhd-jax look`."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="the folder of a training run or of a model")
    parser.add_argument("--image", required=True, metavar="F", help="an image file")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the question")
    parser.add_argument("--answer", metavar="TEXT", help="look at this answer instead of the model's own")
    parser.add_argument("--out", required=True, type=file_to_write, metavar="F.png", help="the picture")
    parser.add_argument("--max-new-tokens", type=positive, default=32, metavar="N", help="default: %(default)s")
    parser.add_argument("--max-slices", type=positive, metavar="N", help="replaces the model's limit")
    parser.add_argument("--mode", choices=MODES, help="4x leaves the compressor out (default: the model's)")
    parser.add_argument("--json", action="store_true", help="print answer, views and maps as JSON")


def run(arguments: argparse.Namespace, config: RunConfig | None) -> None:
    """Answers, draws, prints the answer."""
    import uhd_jax
    from uhd_jax.analysis import looking, looking_plot

    looked = looking.look(
        uhd_jax.load(arguments.checkpoint),
        arguments.image,
        arguments.prompt,
        answer=arguments.answer,
        max_new_tokens=arguments.max_new_tokens,
        max_slices=arguments.max_slices,
        mode=arguments.mode,
    )
    figure = looking_plot.draw(looked, f"{arguments.image}: {arguments.prompt}")
    with whole_file(arguments.out) as partial:
        figure.savefig(partial, format="png", dpi=110)
    if not arguments.json:
        print(looked.answer)
        return
    maps = {**looked.inside, "answer": looked.answering}
    found = {name: [one.round(4).tolist() for one in views] for name, views in maps.items()}
    print(
        json.dumps(
            {"answer": looked.answer, "visual_share": looked.visual_share, "plan": looked.plan.to_json(), "maps": found}
        )
    )
