"""Train a model through the stages of a configuration.

  uhd-jax train --config=configs/demo.py --workdir=runs/demo

The folder gets checkpoints, metrics.jsonl, TensorBoard files and, once all stages are done, trained.json. If it holds a
checkpoint, training goes on from there. SIGTERM saves and leaves with status 0, Ctrl-C saves and leaves with 130.
"""

from __future__ import annotations

import argparse

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

    from uhd_jax import __version__, checkpoint
    from uhd_jax.data.tokenizer import load_tokenizer
    from uhd_jax.training.batches import make_batches
    from uhd_jax.training.loop import train

    workdir = arguments.workdir
    if not any((workdir / checkpoint.FOLDER).glob("*")):
        # What answers later needs the tokenizer of the training, which may be gone from its own place by then.
        tokenizer = load_tokenizer(config.model.chat.tokenizer, config.model.chat)
        (workdir / "tokenizer").mkdir(parents=True, exist_ok=True)
        tokenizer.save(workdir / "tokenizer")
    summary = workdir / "trained.json"

    def opened(config: RunConfig, stage_index: int):
        summary.unlink(missing_ok=True)  # not earlier: a run that is refused leaves the folder as it was
        return make_batches(config, stage_index)

    result = train(config, workdir, opened)
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
