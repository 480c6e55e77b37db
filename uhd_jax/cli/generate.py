"""Ask a trained model about images.

  uhd-jax generate --checkpoint=runs/quickstart --image=page.png --prompt="Transcribe."

The answer appears while it is made; with --json it is printed whole, as JSON. Several --image are given to the model in
their order, then several --video, before the prompt.
"""

from __future__ import annotations

import argparse
import json
import sys

from uhd_jax.cli.common import above_zero, file_to_write, fraction, not_negative, number, positive, write_json
from uhd_jax.config import MODES, RunConfig

CONFIG = "none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `uhd-jax generate`."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="the folder of a training run or of a model")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the question")
    parser.add_argument("--image", action="append", default=[], metavar="F", help="an image file; may be repeated")
    parser.add_argument(
        "--video", action="append", default=[], metavar="F", help="a video file or an animation; may be repeated"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=number, default=0.0, metavar="X", help="0 always takes the likeliest token (default)"
    )
    parser.add_argument(
        "--top-p", type=fraction, default=1.0, metavar="X", help="likeliest share to sample from; 1: all"
    )
    parser.add_argument("--top-k", type=not_negative, default=0, metavar="N", help="sample from N tokens; 0: from all")
    parser.add_argument("--seed", type=not_negative, default=0, metavar="N", help="seed of sampling")
    parser.add_argument(
        "--repetition-penalty", type=above_zero, default=1.0, metavar="X", help="above 1: against repetitions"
    )
    parser.add_argument("--beams", type=positive, default=1, metavar="N", help="width of a beam search; 1: none")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="the answer ends before it; may be repeated"
    )
    parser.add_argument("--mode", choices=MODES, help="4x leaves the compressor out (default: the model's)")
    parser.add_argument(
        "--thinking", action=argparse.BooleanOptionalAction, help="think before the answer (default: the model's habit)"
    )
    parser.add_argument("--max-slices", type=positive, metavar="N", help="replaces the model's limit")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the bare answer")
    parser.add_argument("--out", type=file_to_write, metavar="F.json", help="also write the JSON to a file")


def run(arguments: argparse.Namespace, config: RunConfig | None) -> None:
    """Loads the model, answers one prompt."""
    import uhd_jax

    answer = uhd_jax.load(arguments.checkpoint).generate(
        arguments.prompt,
        images=arguments.image,
        videos=arguments.video,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        seed=arguments.seed,
        repetition_penalty=arguments.repetition_penalty,
        beams=arguments.beams,
        stop=arguments.stop,
        max_slices=arguments.max_slices,
        mode=arguments.mode,
        thinking=arguments.thinking,
        stream=None if arguments.json else _show,
    )
    result = {"prompt": arguments.prompt, "images": arguments.image, "videos": arguments.video, "answer": answer}
    print(json.dumps(result) if arguments.json else "")
    if arguments.out:
        write_json(arguments.out, result)


def _show(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"  # which may lack letters of the answer
    print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)
