"""What the commands that answer in the terminal share: flags of sampling and slicing, and how an answer is shown."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from uhd_jax.cli.common import above_zero, fraction, not_negative, number, positive
from uhd_jax.config import MODES

_OPTIONS = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "repetition_penalty", "mode", "thinking")
_OPTIONS += ("max_slices",)


def add_answer_arguments(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Adds the flags that say how an answer is made; `max_new_tokens` is the default of its length."""
    parser.add_argument(
        "--max-new-tokens", type=positive, default=max_new_tokens, metavar="N", help="default: %(default)s"
    )
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
    parser.add_argument("--mode", choices=MODES, help="4x leaves the compressor out (default: the model's)")
    parser.add_argument(
        "--thinking", action=argparse.BooleanOptionalAction, help="think before the answer (default: the model's habit)"
    )
    parser.add_argument("--max-slices", type=positive, metavar="N", help="replaces the model's limit")


def answer_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """These flags as `Assistant.generate` takes them."""
    return {name: getattr(arguments, name) for name in _OPTIONS}


def show(text: str) -> None:
    """A piece of an answer, at once; letters that the terminal lacks become question marks."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)
