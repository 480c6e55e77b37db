"""Train a model through the stages of a configuration.

  uhd-jax train --config=configs/demo.py --workdir=runs/demo

The folder gets checkpoints, metrics.jsonl, TensorBoard files and, once all stages are done, trained.json. If it holds a
checkpoint, training goes on from there. SIGTERM saves and leaves with status 0, Ctrl-C saves and leaves with 130.

The same command in every process of a TPU pod, of srun or of mpirun trains together; docs/launch.md has all ways.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from uhd_jax.cli.common import folder, not_negative, positive, write_json
from uhd_jax.config import RunConfig

if TYPE_CHECKING:
    from uhd_jax.training.loop import TrainResult

CONFIG = "required"
LEAVE_SECONDS = 5.0  # in which a process that has failed ends, whatever its siblings do


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `uhd-jax train`."""
    parser.add_argument(
        "--workdir", type=folder, required=True, metavar="DIR", help="where everything goes; made if absent"
    )
    group = parser.add_argument_group("several processes (all optional: JAX finds out by itself where it can)")
    group.add_argument("--processes", type=positive, metavar="N", help="of this run, checked; 1: look for no others")
    group.add_argument("--devices", type=positive, metavar="N", help="of all processes together, checked")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="by hand: where process 0 listens")
    group.add_argument("--process", type=not_negative, metavar="I", help="by hand: number of this one, from 0")
    for name, seconds, of in (
        ("start", 300, "waiting for each other at the start"),
        ("heartbeat", 100, "silence after which a process counts as dead and the others end"),
        ("shutdown", 300, "waiting for each other at the end"),
    ):
        explained = f"seconds of {of} (default {seconds})"
        group.add_argument(f"--{name}-seconds", type=positive, default=seconds, metavar="S", help=explained)


def run(arguments: argparse.Namespace, config: RunConfig | None) -> int:
    """Trains; the status says how it ended."""
    import jax

    from uhd_jax.sharding import multihost

    fields = [field.name for field in dataclasses.fields(multihost.Launch)]
    launch = multihost.Launch(**{name: getattr(arguments, name) for name in fields})
    multihost.join(launch)
    try:
        multihost.check(launch, config.train.mesh)
        if jax.process_count() > 1 and jax.process_index() == 0:
            print(multihost.describe(), file=sys.stderr, flush=True)
        result = _train(arguments.workdir, config)
        multihost.wait_for_all()
    except BaseException:
        if jax.process_count() > 1:
            multihost.leave_within(LEAVE_SECONDS, 1)
        raise
    if result.interrupted_by:
        _leave_if_held_up(result.exit_status)
    return result.exit_status


def _train(workdir: Path, config: RunConfig) -> TrainResult:
    import jax

    from uhd_jax import __version__
    from uhd_jax.checkpoint import newest_step
    from uhd_jax.sharding import multihost
    from uhd_jax.training.batches import make_batches
    from uhd_jax.training.loop import train

    is_first = jax.process_index() == 0
    summary = workdir / "trained.json"
    if multihost.all_agree(newest_step(workdir) is None):  # of storage that was just written they may see other states
        for index in range(len(config.train.stages)):
            with make_batches(config, index):
                pass  # what is wrong with the data of the last stage is better known now than when it begins

    @contextlib.contextmanager
    def opened(config: RunConfig, stage_index: int):
        with make_batches(config, stage_index, workdir) as batches:
            if is_first:  # not earlier: a run that is refused leaves the folder as it was
                summary.unlink(missing_ok=True)
                _keep_tokenizer(config, workdir)
            yield batches

    result = train(config, workdir, opened)
    if is_first:
        _keep_tokenizer(config, workdir)
    if is_first and result.finished:
        device = jax.devices()[0]
        write_json(
            summary,
            {
                "name": config.name,
                "seed": config.train.seed,
                "steps": result.step,
                "train_seconds": round(result.elapsed_seconds, 1),
                "devices": f"{jax.device_count()} x {device.device_kind}",
                "processes": jax.process_count(),
                "versions": {"uhd_jax": __version__, "jax": jax.__version__},
            },
        )
    return result


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
