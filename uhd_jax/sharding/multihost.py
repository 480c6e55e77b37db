"""Several processes as one run: how they find each other, what they tell each other with every step, how they end.

Every process runs the same program on its own devices. JAX connects them and finds out by itself how under Open MPI,
SLURM (`srun`), on TPU pods, on GKE and in Kubernetes jobs; elsewhere `Launch` or the variables in `BY_HAND` say it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import signal
import threading
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uhd_jax.config import MeshConfig
from uhd_jax.sharding.mesh import AXES, ShardingError
from uhd_jax.sharding.rules import batch_sharding, replicated

# Read where the flag is not given; JAX itself knows only the first.
BY_HAND = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process": "JAX_PROCESS_ID",
}
# Variables by which a launcher says that a process has siblings, and what to do if it was not joined to them.
_SIBLINGS = {
    "SLURM_NTASKS": "start it with srun",
    "OMPI_COMM_WORLD_SIZE": "give --coordinator, --processes and --process: this Open MPI does not tell JAX enough",
    "PMI_SIZE": "give --coordinator, --processes and --process: JAX knows no launcher but Open MPI's and SLURM's",
    "WORLD_SIZE": "give --coordinator, --processes and --process: JAX does not read torchrun's variables",
}

logger = logging.getLogger(__name__)


class MultihostError(RuntimeError):
    """The processes of a run cannot find each other, or are not those that were expected."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """What is known about a run's processes from outside; None is for JAX to find out."""

    coordinator: str | None = None  # HOST:PORT on which process 0 listens
    processes: int | None = None  # of the run; 1 alone: do not look for others
    process: int | None = None  # number of this one, from 0
    devices: int | None = None  # of all processes together; checked
    start_seconds: int = 300  # for which processes wait for each other at the start
    heartbeat_seconds: int = 100  # of silence after which a process counts as dead, and the others end
    shutdown_seconds: int = 300  # for which processes wait for each other at the end


def join(launch: Launch, environ: Mapping[str, str] = os.environ) -> None:
    """Connects this process with the others of its run; before JAX is used for anything else.

    Without flags, variables and a launcher that JAX knows, and with `processes=1`, the process stays alone. So it does
    in a program that has used JAX already.

    Raises:
      MultihostError: the others cannot be found or do not come, or there are fewer or more than expected.
    """
    if jax.distributed.is_initialized():
        return
    given = {name: getattr(launch, name) for name in BY_HAND}
    given |= {name: _read(environ, name) for name, value in given.items() if value is None}
    by_hand = given["coordinator"] is not None or given["process"] is not None
    if given["processes"] == 1 and not by_hand:
        return
    # When the time is over JAX ends the process, with nothing but its own words.
    late = threading.Timer(0.9 * launch.start_seconds, logger.warning, (_who_is_missing(given, launch),))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            given["coordinator"],
            given["processes"] if by_hand else None,  # what the launcher says; `check` compares
            given["process"],
            initialization_timeout=launch.start_seconds,
            heartbeat_timeout_seconds=launch.heartbeat_seconds,
            shutdown_timeout_seconds=launch.shutdown_seconds,
        )
    except Exception as error:
        nothing_found = isinstance(error, ValueError) and "coordinator_address" in str(error)
        in_use = type(error) is RuntimeError and "before any JAX" in " ".join(str(error).split())
        if by_hand or not (nothing_found or in_use):
            raise MultihostError(_why_not(error, given, launch)) from error
    finally:
        late.cancel()
    if threading.current_thread() is threading.main_thread():
        # JAX listens for SIGTERM itself from here on, and keeps it from whoever listened before.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)


def _read(environ: Mapping[str, str], name: str) -> str | int | None:
    text = environ.get(BY_HAND[name]) or None
    if name == "coordinator" or text is None:
        return text
    if not text.isdecimal():
        raise MultihostError(f"{BY_HAND[name]}={text!r} is not a number")
    return int(text)


def _who_is_missing(given: Mapping[str, str | int | None], launch: Launch) -> str:
    return (
        f"not all processes come together within {launch.start_seconds} seconds: start the same command for every one "
        f"of them, and let all reach {given['coordinator'] or 'the first one'}; --start-seconds gives them more time"
    )


def _why_not(error: Exception, given: Mapping[str, str | int | None], launch: Launch) -> str:
    cause = " ".join(str(error).split())
    missing = [f"--{name} (or {BY_HAND[name]})" for name, value in given.items() if value is None]
    if isinstance(error, ValueError) and missing:
        return f"to start by hand, every process needs {', '.join(missing)} as well"
    if isinstance(error, ValueError):
        return f"--process={given['process']} with --processes={given['processes']}: {cause}"
    if "DEADLINE_EXCEEDED" in cause or "timed out" in cause.lower():
        return f"{_who_is_missing(given, launch)}. Cause: {cause[:300]}"
    return (
        f"JAX cannot find the other processes: {cause[:300]}. Mend that, or start by hand: --coordinator=HOST:PORT "
        f"--processes=N --process=I; --processes=1 trains alone"
    )


def check(launch: Launch, mesh: MeshConfig, environ: Mapping[str, str] = os.environ) -> None:
    """Compares processes and devices with what was expected, before anything is compiled.

    Warns when this process sees fewer devices than its part of `mesh`, of `launch.devices` or of the node's GPUs.

    Raises:
      MultihostError: other numbers than `launch` says.
    """
    processes, here = jax.process_count(), jax.local_device_count()
    expected = launch.processes or _read(environ, "processes")
    if expected not in (None, processes):
        raise MultihostError(
            f"--processes={expected}, but this run has {processes}: start it through srun, mpirun, a TPU pod's workers "
            f"or a JobSet with so many processes, or by hand with --coordinator=HOST:PORT --process=I in each"
        )
    if processes == 1 and launch.processes is None:
        for variable, advice in _SIBLINGS.items():
            if (count := environ.get(variable, "")).isdecimal() and int(count) > 1:
                logger.warning(
                    "%s=%s, but this process trains alone: %s; --processes=1 says that it is meant",
                    variable,
                    count,
                    advice,
                )
    promised, by = _promised(launch, mesh, processes, environ)
    if here < promised:
        slurm = "SLURM_PROCID" in environ and jax.default_backend() != "tpu"
        advice = "under SLURM JAX gives a task one GPU: use --ntasks-per-node=GPUS_PER_NODE, or JAX_LOCAL_DEVICE_IDS"
        logger.warning(
            "process %d sees %d of the %d devices that %s promises%s",
            jax.process_index(),
            here,
            promised,
            by,
            f"; {advice}" if slurm else "",
        )
    if launch.devices not in (None, jax.device_count()):
        raise MultihostError(
            f"--devices={launch.devices}, but the {processes} processes of this run have {jax.device_count()} "
            f"({here} x {jax.local_devices()[0].device_kind} here)"
        )


def _promised(launch: Launch, mesh: MeshConfig, processes: int, environ: Mapping[str, str]) -> tuple[int, str]:
    """How many devices this process should see at least, and who says so."""
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    known = math.prod(size for size in sizes.values() if size > 0)
    asked = " ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 0)
    promises = [(known // processes, f"mesh {asked}"), ((launch.devices or 0) // processes, "--devices")]
    gpus, tasks = environ.get("SLURM_GPUS_ON_NODE", ""), environ.get("SLURM_NTASKS_PER_NODE", "")
    if gpus.isdecimal() and tasks.isdecimal():
        promises.append((int(gpus) // int(tasks), f"a node of {gpus} GPUs for {tasks} tasks"))
    return max(promises)


def describe() -> str:
    """The run's processes and devices, in a line."""
    kinds = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    return f"{jax.process_count()} processes, {jax.device_count()} devices ({kinds})"


def row_share(mesh: Mesh) -> tuple[int, int]:
    """Which part of a batch's rows this process provides: its number, and the number of equal parts.

    Processes whose devices split tokens or layers (mesh axes sequence, tensor), not rows, provide the same rows.

    Raises:
      ShardingError: the rows of two processes overlap in part.
    """
    shares = _shares(mesh, {device: device.process_index for device in mesh.devices.flat})
    numbers = sorted(set(shares.values()))
    return numbers.index(shares[jax.process_index()]), len(numbers)


def _shares(mesh: Mesh, owners: Mapping[jax.Device, int]) -> dict[int, tuple[int, ...]]:
    """Process -> numbers of the rows it provides, of twice as many as there are devices."""
    rows = 2 * mesh.size
    owned: dict[int, set[int]] = {}
    for device, (part, *_) in batch_sharding(mesh).devices_indices_map((rows,)).items():
        owned.setdefault(owners[device], set()).update(range(*part.indices(rows)))
    different = set(map(frozenset, owned.values()))
    if sum(map(len, different)) != rows or len(set(map(len, different))) != 1:
        raise ShardingError(
            f"mesh {dict(mesh.shape)}: its {len(owned)} processes would share rows in part; choose sizes whose "
            f"product sequence x tensor divides the devices of a process, or is a multiple of them"
        )
    return {process: tuple(sorted(numbers)) for process, numbers in owned.items()}


class Poll:
    """What processes tell each other with every step, by a reduction beside it: read a step later, it costs no waiting.

    All read the same of a step, and so may act on it at the same step.
    """

    def __init__(self, mesh: Mesh):
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._local = len(mesh.local_devices)
        self._reduce = jax.jit(
            lambda told: (told[:, 0].max(), told[:, 1:].sum(axis=0)), out_shardings=(replicated(mesh),) * 2
        )

    def __call__(self, number: int, counts: Sequence[float]) -> tuple[jax.Array, jax.Array]:
        """float32[] largest of all processes' numbers, float32[C] sum of their counts."""
        told = np.zeros((self._local, 1 + len(counts)), np.float32)
        told[:, 0] = number
        told[0, 1:] = counts
        try:
            return self._reduce(jax.make_array_from_process_local_data(self._sharding, told))
        except ValueError as error:  # what a connection that broke since the last step is called on its next use
            raise jax.errors.JaxRuntimeError(str(error)) from error


def all_agree(here: bool) -> bool:
    """Whether `here` is true in every process. Each has to call it; returns when all have."""
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.process_allgather(np.int32(here)).all())


def as_first(numbers: Sequence[int]) -> list[int]:
    """The numbers that the first process gives here, in every process. Each has to call it."""
    if jax.process_count() == 1:
        return list(numbers)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    own = np.resize(np.array(numbers, np.int32), length)  # all have to bring the same shape
    return multihost_utils.broadcast_one_to_all(own).tolist() if length else []


def wait_for_all() -> None:
    """Returns when every process has come here, and lets go of the connection; nothing for a process that is alone."""
    if not jax.distributed.is_initialized():
        return
    try:
        jax.distributed.shutdown()
    except jax.errors.JaxRuntimeError as error:
        logger.warning("the processes did not end together: %s", " ".join(str(error).split())[:300])


def leave_within(seconds: float, status: int) -> None:
    """Ends this process after so long, if it has not ended by itself: one that has failed must not wait for others."""
    timer = threading.Timer(seconds, os._exit, (status,))
    timer.daemon = True
    timer.start()
