"""Ask a trained model about images.

  uhd-jax generate --checkpoint=runs/quickstart --image=page.png --prompt="Transcribe."

The answer appears while it is made; with --json it is printed whole, as JSON. Several --image are given to the model in
their order, then several --video, before the prompt.
"""

from __future__ import annotations

import argparse
import json

from uhd_jax.cli.answering import add_answer_arguments, answer_options, show
from uhd_jax.cli.common import file_to_write, positive, write_json
from uhd_jax.config import RunConfig

CONFIG = "none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `uhd-jax generate`."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="the folder of a training run or of a model")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the question")
    parser.add_argument("--image", action="append", default=[], metavar="F", help="an image file; may be repeated")
    parser.add_argument(
        "--video", action="append", default=[], metavar="F", help="a video file or an animation; may be repeated"
    )
    add_answer_arguments(parser, max_new_tokens=256)
    parser.add_argument("--beams", type=positive, default=1, metavar="N", help="width of a beam search; 1: none")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="the answer ends before it; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the bare answer")
    parser.add_argument("--out", type=file_to_write, metavar="F.json", help="also write the JSON to a file")


def run(arguments: argparse.Namespace, config: RunConfig | None) -> None:
    """Loads the model, answers one prompt."""
    import uhd_jax

    answer = uhd_jax.load(arguments.checkpoint).generate(
        arguments.prompt,
        images=arguments.image,
        videos=arguments.video,
        **answer_options(arguments),
        beams=arguments.beams,
        stop=arguments.stop,
        stream=None if arguments.json else show,
    )
    result = {"prompt": arguments.prompt, "images": arguments.image, "videos": arguments.video, "answer": answer}
    print(json.dumps(result) if arguments.json else "")
    if arguments.out:
        write_json(arguments.out, result)
