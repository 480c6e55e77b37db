"""Train a model through the stages of a configuration.

  uhd-jax train --config=configs/demo.py --workdir=runs/demo

The folder gets checkpoints, metrics.jsonl, TensorBoard files and, once all stages are done, trained.json. If it holds a
checkpoint, training goes on from there. SIGTERM saves and leaves with status 0, Ctrl-C saves and leaves with 130.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import threading
from pathlib import Path

from uhd_jax.cli.common import folder, write_json
from uhd_jax.config import RunConfig

CONFIG = "required"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `uhd-jax train`."""
    parser.add_argument(
        "--workdir", type=folder, required=True, metavar="DIR", help="where everything goes; made if absent"
    )


def run(arguments: argparse.Namespace, config: RunConfig | None) -> int:
    """Trains; the status says how it ended."""
    import jax

    from uhd_jax import __version__
    from uhd_jax.checkpoint import newest_step
    from uhd_jax.training.batches import make_batches
    from uhd_jax.training.loop import train

    workdir = arguments.workdir
    summary = workdir / "trained.json"
    if newest_step(workdir) is None:
        for index in range(len(config.train.stages)):
            with make_batches(config, index):
                pass  # what is wrong with the data of the last stage is better known now than when it begins

    @contextlib.contextmanager
    def opened(config: RunConfig, stage_index: int):
        with make_batches(config, stage_index) as batches:
            # Not earlier: a run that is refused leaves the folder as it was.
            summary.unlink(missing_ok=True)
            _keep_tokenizer(config, workdir)
            yield batches

    result = train(config, workdir, opened)
    if result.interrupted_by:
        _leave_if_held_up(result.exit_status)
    _keep_tokenizer(config, workdir)
    if result.finished:
        device = jax.devices()[0]
        write_json(
            summary,
            {
                "name": config.name,
                "seed": config.train.seed,
                "steps": result.step,
                "train_seconds": round(result.elapsed_seconds, 1),
                "devices": f"{jax.device_count()} x {device.device_kind}",
                "versions": {"uhd_jax": __version__, "jax": jax.__version__},
            },
        )
    return result.exit_status


def _keep_tokenizer(config: RunConfig, workdir: Path) -> None:
    """What answers later needs the tokenizer of the training, which may be gone from its own place by then."""
    from uhd_jax.checkpoint import newest_step
    from uhd_jax.data.tokenizer import load_tokenizer

    kept = workdir / "tokenizer"
    if newest_step(workdir) is None or not (kept / "tokenizer.json").is_file():
        kept.mkdir(parents=True, exist_ok=True)
        load_tokenizer(config.model.chat.tokenizer, config.model.chat).save(kept)


def _leave_if_held_up(status: int) -> None:
    """Ends the process at once if samples are still being read. Everything is saved; Python would wait for them."""
    from uhd_jax.data.pipeline import CLOSING

    def still_closing(seconds: float) -> bool:
        for thread in closing:
            thread.join(seconds)
        return any(thread.is_alive() for thread in closing)

    closing = [thread for thread in threading.enumerate() if thread.name == CLOSING]
    workers = multiprocessing.active_children()
    if workers and still_closing(2.0):  # they end one after the other, unless one hangs
        for worker in workers:
            worker.kill()
    if still_closing(0.5 if workers else 0.0):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
