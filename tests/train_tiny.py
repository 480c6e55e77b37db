"""Trains the tiny model in a process of its own, to be killed: WORKDIR STEPS_PER_STAGE SECONDS_PER_BATCH."""

import sys
import time

import conftest  # noqa: F401  (the tests' devices and compiler flags)
import jax
import tiny

from uhd_jax.training.loop import TrainResult, train


def main(workdir: str, steps: int, seconds: float) -> TrainResult:
    class SlowBatches(tiny.RandomBatches):
        def __next__(self):
            time.sleep(seconds)
            return super().__next__()

    stages = [
        tiny.stage(name="first", steps=steps, trainable=tiny.ADAPTER),
        tiny.stage(name="second", steps=steps, accumulation=2),
    ]
    one_device = jax.devices()[:1]
    return train(
        tiny.run(stages), workdir, lambda config, index: SlowBatches(100 * index, (tiny.BUCKET,)), devices=one_device
    )


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    sys.exit(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])).exit_status)
