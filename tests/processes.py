"""`uhd-jax train` in several real processes on this machine, for tests that signal and kill them."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from command_line import CONFIG

ROOT = Path(__file__).parents[1]
QUICK = "import tiny\nfrom uhd_jax.models import uhd\nuhd.loss_sums = tiny.quick_loss_sums\n"
SLOW = """
import time
from uhd_jax.training.batches import StageBatches
quickly = StageBatches.__next__
def slowly(self):
    time.sleep(0.1)
    return quickly(self)
StageBatches.__next__ = slowly
"""
OPTIONS = [f"--config.train.{option}" for option in ("peak_flops=1e12", "log_every=1", "checkpoint_every=3")]


def free_port():
    with socket.socket() as listening:
        listening.bind(("", 0))
        return listening.getsockname()[1]


def ended(children, seconds=300):
    """Exit statuses, and what each process has shown."""
    statuses = [child.wait(timeout=seconds) for child in children]
    return statuses, [Path(child.log.name).read_text() for child in children]


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def curve(workdir):
    return [(record["stage"], record["step"], record["loss"], record["grad_norm"]) for record in records(workdir)]


def write(path, stages="stages=(stage,)"):
    config = CONFIG.replace("model=dict(", 'model=dict(dtype="float32", ').replace("stages=(stage,)", stages)
    path.write_text(config)
    return path


class Processes:
    """Starts processes; what is left of them at the end is killed."""

    def __init__(self, folder, programs):
        self._folder, self._programs, self._started = folder, programs, []

    def __call__(self, workdir, config, processes, devices=1, argv=(), before=QUICK):
        """The processes of one run; `before` is Python that each runs first, `process` its number."""
        environment = os.environ | {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COMPILATION_CACHE_DIR": self._programs,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        script = f"import sys\nprocess = int(sys.argv[-1].split('=')[1])\n{before}"
        script += "\nfrom uhd_jax.cli import main\nsys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", script, "train", f"--config={config}", f"--workdir={workdir}", *OPTIONS]
        command += [f"--coordinator=localhost:{free_port()}", f"--processes={processes}", *argv]
        for process in range(processes):
            log = open(self._folder / f"{len(self._started)}.log", "w+")
            child = subprocess.Popen(
                [*command, f"--process={process}"], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            child.log = log
            self._started.append(child)
        return self._started[-processes:]

    def kill(self):
        for child in self._started:
            child.kill()
            child.log.close()


def until_step(workdir, step, children):
    """Waits for a step's record."""
    path = workdir / "metrics.jsonl"
    while not (path.exists() and len(path.read_text().splitlines()) >= step):
        assert all(child.poll() is None for child in children), ended(children)
        time.sleep(0.02)


def seconds_between_ends(children):
    """How long the last process lives after the first one's end."""
    ends, started = {}, time.monotonic()
    while len(ends) < len(children):
        assert time.monotonic() < started + 600, ends
        ends |= {child: time.monotonic() for child in children if child not in ends and child.poll() is not None}
        time.sleep(0.02)
    return max(ends.values()) - min(ends.values())


def seconds_to_step(workdir, step, children):
    """From now to the record of a step, in a log that goes on from an earlier step than it held."""
    path, started = workdir / "metrics.jsonl", time.monotonic()
    before = path.stat().st_mtime_ns
    while path.stat().st_mtime_ns == before or len(path.read_text().splitlines()) < step:
        assert all(child.poll() is None for child in children), ended(children)
        time.sleep(0.02)
    return time.monotonic() - started


def saved(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


ENDLESS = ["--config.train.stages[0].steps=1000", "--heartbeat-seconds=10"]
