"""The command line: `uhd-jax COMMAND ...`, one file of this folder per command.

A command's module holds `add_arguments(parser)` and `run(arguments, config)`, which may return an exit status; `CONFIG`
says whether it takes `--config` ("required", "optional" or "none"). Modules are imported only when their command is
called, and import what is heavy inside `run`, so that help and the light commands answer at once.

Exit status: 0; 1 for an error of the project (one line, `--traceback` shows where); 2 for a wrong command line; 130
when interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from uhd_jax.cli import configs
from uhd_jax.cli.common import UsageError

COMMANDS = {
    "train": "train a model through its stages; resumes by itself",
    "generate": "ask a trained model about images",
    "chat": "talk with a model about images, in the terminal",
    "serve": "answer over HTTP, for OpenAI's clients; a page to try it",
    "convert": "read and write checkpoints of PyTorch and transformers",
    "slices": "show how an image is cut: as a table, as JSON, as a picture",
    "look": "draw where a model looks when it answers about an image",
    "data": "look at data, plan buckets for it, pack it into shards",
    "evaluate": "score a trained model on a task",
    "report": "gather a run's results and draw its losses",
    "cost": "parameters, visual tokens, FLOPs and memory of configurations, also as published",
    "compile": "compile a training step for a TPU slice or GPU host that is not there",
    "bench": "how fast the parts of a model are on this machine, also against PyTorch",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Prints the message and leaves with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    Args:
      argv: arguments without the program's name; those of this process by default.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        return _run(argv[0], argv[1:])
    width = max(map(len, COMMANDS))
    table = "\n".join(f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items())
    parser = Parser(
        prog="uhd-jax",
        usage="uhd-jax COMMAND ...",
        description=f"commands:\n{table}\n\n`uhd-jax COMMAND --help` explains one of them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    if argv and not argv[0].startswith("-"):
        parser.error(f"unknown command {argv[0]!r}; known: {', '.join(COMMANDS)}")
    if parser.parse_args(argv).version:
        import uhd_jax

        print(f"uhd-jax {uhd_jax.__version__}")
    else:
        parser.print_help()
    return 0


def _run(name: str, argv: list[str]) -> int:
    command = importlib.import_module(f"uhd_jax.cli.{name}")
    parser = Parser(
        prog=f"uhd-jax {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    if command.CONFIG != "none":
        group = parser.add_argument_group(f"configuration ({command.CONFIG})")
        group.add_argument("--config", metavar="FILE.py[:ARG]", help="a file whose get_config([ARG]) returns the run")
        group.add_argument("--config.KEY", metavar="VALUE", help="replaces a value, e.g. --config.train.seed=1")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")

    show_traceback = "--traceback" in argv
    try:
        config_argv, own_argv = configs.split(argv) if command.CONFIG != "none" else ([], argv)
        arguments = parser.parse_args(own_argv)
        if command.CONFIG == "required" and not config_argv:
            raise UsageError("--config=FILE.py is needed")
        return command.run(arguments, configs.load(config_argv) if config_argv else None) or 0
    except UsageError as error:
        parser.error(str(error))
    except BrokenPipeError:
        # The reader has gone, as `head` does; without this the interpreter complains once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_expected(error):
            raise
        if show_traceback:
            traceback.print_exc()
        print(f"uhd-jax: error: {_one_line(error)}", file=sys.stderr)
        return 1


def _is_expected(error: Exception) -> bool:
    """Whether the error is one the project raises on purpose, or the operating system's: no bug to be traced."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] == "uhd_jax"


def _one_line(error: Exception) -> str:
    """The error in one line; the items of a list, which are indented, keep lines of their own."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    first, *items = str(error).split("\n  ")
    return "\n  ".join([" ".join(first.split()), *(" ".join(item.split()) for item in items)])
