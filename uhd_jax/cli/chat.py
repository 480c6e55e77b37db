"""Talk with a model about images, in the terminal.

  uhd-jax chat --checkpoint=runs/quickstart --image=page.png

A line is a question; its answer appears while it is made. Lines that begin with a slash:

  /image F         shows an image file with the next question; may be repeated
  /slices [F.png]  how the images of this conversation are cut; with a file, drawn
  /reset           begins a new conversation
  /help            says this
  /quit            ends, as does the end of the input
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from uhd_jax.cli.answering import add_answer_arguments, answer_options, show
from uhd_jax.cli.common import whole_file
from uhd_jax.config import RunConfig

CONFIG = "none"
PROMPT = "> "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `uhd-jax chat`."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="the folder of a training run or of a model")
    parser.add_argument("--image", action="append", default=[], metavar="F", help="shown with the first question")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    add_answer_arguments(parser, max_new_tokens=512)


def run(arguments: argparse.Namespace, config: RunConfig | None) -> None:
    """Loads the model, then reads lines until they end."""
    import uhd_jax

    chat = _Chat(uhd_jax.load(arguments.checkpoint), arguments)
    for file in arguments.image:
        chat.show(file)
    if sys.stdin.isatty():
        print("A question, or /image F, /slices, /reset, /help, /quit", flush=True)
    while (line := _read_line()) is not None:
        if not chat.line(line.strip()):
            break


def _read_line() -> str | None:
    """The next line, None at the end. A prompt is shown to people only."""
    try:
        return input(PROMPT if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except UnicodeDecodeError:
        print("error: the line is not UTF-8", flush=True)
        return ""


class _Chat:
    """A conversation: its messages so far, and images that the next question shows."""

    def __init__(self, assistant: Any, arguments: argparse.Namespace):
        self.assistant, self.arguments = assistant, arguments
        self._reset()

    def line(self, line: str) -> bool:
        """Does what a line says; False when it ends the conversation. Errors are said and change nothing."""
        command, _, rest = line.partition(" ")
        actions = {"/image": self.show, "/slices": self._slices, "/reset": self._reset, "/help": self._help}
        if command == "/quit":
            return False
        try:
            if command in actions:
                actions[command](rest.strip())
            elif line.startswith("/"):
                print(f"error: there is no {command}; /help says what there is", flush=True)
            elif line:
                self._ask(line)
        except (ValueError, OSError) as error:  # ImageRefused and PromptError among them
            print(f"error: {' '.join(str(error).split())}", flush=True)
        except KeyboardInterrupt:
            print("\n[stopped; the question is taken back]", flush=True)
        return True

    def show(self, file: str) -> None:
        """Opens an image for the next question."""
        from uhd_jax.slicing.image_io import open_image

        if not file:
            raise ValueError("/image needs the name of a file")
        pixels = open_image(os.path.expanduser(file), self.assistant.config.slicing.limits)
        plan = self._plan(pixels)
        self._waiting.append((file, pixels))
        print(
            f"[{Path(file).name}: {plan.image}, {len(plan.views)} views, {plan.visual_tokens} visual tokens]",
            flush=True,
        )

    def _ask(self, question: str) -> None:
        from uhd_jax.generation.prompt import PromptError

        parts = [{"type": "image", "image": pixels} for _, pixels in self._waiting]
        turn = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
        try:
            answer = self.assistant.generate([*self._messages, turn], **answer_options(self.arguments), stream=show)
        except PromptError as error:
            if "max_length" in str(error):
                raise PromptError(f"{error}; /reset begins anew") from error
            raise
        print(flush=True)
        self._messages += [turn, {"role": "assistant", "content": answer}]
        self._shown += self._waiting
        self._waiting = []

    def _slices(self, file: str = "") -> None:
        """Tells or draws how every image is cut."""
        from uhd_jax.slicing.viewer import draw_slices

        images = [*self._shown, *self._waiting]
        if not images:
            raise ValueError("there is no image in this conversation; /image F shows one")
        target = Path(os.path.expanduser(file)) if file else None
        for place, (name, pixels) in enumerate(images, 1):
            plan = self._plan(pixels)
            cut = f"{plan.grid} slices (rows x cols)" if plan.slices else "not sliced"
            print(f"{place}. {name}: {plan.image}, {cut}, {plan.visual_tokens} visual tokens", flush=True)
            if target is None:
                continue
            path = target if len(images) == 1 else target.with_name(f"{target.stem}-{place}{target.suffix}")
            with whole_file(path) as partial:
                draw_slices(pixels, plan, Path(name).name).save(partial, format="PNG")
            print(f"   drawn in {path}", flush=True)

    def _plan(self, pixels: Any) -> Any:
        from uhd_jax.slicing.plan import Size, plan_image

        arguments = self.arguments
        return plan_image(Size(*pixels.shape[:2]), self.assistant.config, arguments.mode, arguments.max_slices)

    def _reset(self, _: str = "") -> None:
        system = self.arguments.system
        self._messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        self._shown: list[tuple[str, Any]] = []
        self._waiting: list[tuple[str, Any]] = []

    def _help(self, _: str = "") -> None:
        print(__doc__[__doc__.index("A line is") :].rstrip(), flush=True)
