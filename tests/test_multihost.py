"""Several processes as one run: finding each other, real processes on this machine, signals and kills."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import source_files
import tiny
from command_line import call
from processes import (
    ENDLESS,
    OPTIONS,
    QUICK,
    SLOW,
    curve,
    ended,
    records,
    saved,
    until_step,
    write,
)

from uhd_jax.cli import main
from uhd_jax.config import MeshConfig
from uhd_jax.models import uhd
from uhd_jax.sharding import multihost
from uhd_jax.sharding.mesh import ShardingError, make_mesh
from uhd_jax.sharding.multihost import Launch, MultihostError
from uhd_jax.training.batches import StageBatches
from uhd_jax.training.metrics import Fill, Work

pytestmark = pytest.mark.usefixtures("unoptimised", "compiled_once")

ROOT = Path(__file__).parents[1]


# --- finding each other ---------------------------------------------------------------------------------------------


@pytest.fixture
def initialize(monkeypatch):
    """Stands in for `jax.distributed.initialize`; raises `initialize.error` and notes its arguments."""

    def stand_in(*arguments, **options):
        stand_in.calls.append(arguments)
        if stand_in.error:
            raise stand_in.error

    stand_in.calls, stand_in.error = [], None
    monkeypatch.setattr(jax.distributed, "initialize", stand_in)
    return stand_in


NOTHING_FOUND = ValueError("coordinator_address should be defined.")


def test_alone_where_nothing_is_found_or_nothing_is_looked_for(initialize):
    initialize.error = NOTHING_FOUND
    multihost.join(Launch(), {})
    assert initialize.calls == [(None, None, None)]
    multihost.join(Launch(processes=1), {})
    assert len(initialize.calls) == 1


def test_what_jax_finds_is_not_overruled(initialize):
    multihost.join(Launch(processes=8), {})
    assert initialize.calls == [(None, None, None)]


def test_by_hand_by_flags_or_by_variables(initialize):
    multihost.join(Launch("host:1", 2, 1), {"JAX_PROCESS_ID": "0"})
    variables = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    multihost.join(Launch(), variables)
    assert initialize.calls == [("host:1", 2, 1)] * 2
    with pytest.raises(MultihostError, match="JAX_PROCESS_ID='one' is not a number"):
        multihost.join(Launch(), variables | {"JAX_PROCESS_ID": "one"})


@pytest.mark.parametrize(
    ("launch", "error", "expected"),
    [
        (Launch("host:1"), ValueError("Number of processes must be defined."), "needs --processes .or JAX_NUM_PROC"),
        (Launch("host:1", 2, 2), ValueError("0 <= process_id"), "--process=2 with --processes=2: 0 <= process_id"),
        (Launch("host:1", 2, 1, start_seconds=7), RuntimeError("DEADLINE_EXCEEDED: x"), "within 7 seconds.*host:1"),
        (Launch(), RuntimeError("Retry failed"), "other processes: Retry failed.*--processes=1 trains alone"),
        (Launch("host:1", 2, 0), RuntimeError("must be called before any JAX calls"), "must be called before"),
    ],
)
def test_why_it_did_not_work(initialize, launch, error, expected):
    initialize.error = error
    with pytest.raises(MultihostError, match=expected):
        multihost.join(launch, {})


def test_jax_says_what_is_expected_here(monkeypatch):
    """The words by which `join` tells that JAX has found no launcher, and that it is in use already."""
    for name in ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST", *multihost.BY_HAND.values()):
        monkeypatch.delenv(name, raising=False)
    jax.devices()
    multihost.join(Launch())
    code = "from uhd_jax.sharding.multihost import *; import jax; join(Launch()); assert jax.process_count() == 1"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("launch", "expected"),
    [
        (Launch(processes=4), "--processes=4, but this run has 1: start it through srun"),
        (Launch(devices=16), r"--devices=16, but the 1 processes of this run have 8 \(8 x cpu here\)"),
    ],
)
def test_other_numbers_than_expected_are_refused(launch, expected):
    with pytest.raises(MultihostError, match=expected):
        multihost.check(launch, MeshConfig(), {})


SRUN = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}


@pytest.mark.parametrize(
    ("launch", "mesh", "environ", "expected"),
    [
        (Launch(), MeshConfig(), {}, None),
        (Launch(), MeshConfig(data=8), SRUN, None),
        (
            Launch(),
            MeshConfig(data=2, fsdp=8),
            {},
            "process 0 sees 8 of the 16 devices that mesh dcn_data=1 data=2 fsdp=8",
        ),
        (Launch(), MeshConfig(data=2, fsdp=8), SRUN, "promises; under SLURM JAX gives a task one GPU: use"),
        (Launch(), MeshConfig(), SRUN | {"SLURM_GPUS_ON_NODE": "9", "SLURM_NTASKS_PER_NODE": "1"}, "a node of 9 GPUs"),
        (Launch(), MeshConfig(), {"SLURM_NTASKS": "16"}, "=16, but this process trains alone: start it with srun"),
        (Launch(), MeshConfig(), {"WORLD_SIZE": "2"}, "does not read torchrun's variables; --processes=1 says that"),
        (Launch(processes=1), MeshConfig(), {"WORLD_SIZE": "2"}, None),
    ],
)
def test_warnings_before_the_start(caplog, launch, mesh, environ, expected):
    multihost.check(launch, mesh, environ)
    assert [expected in message for message in caplog.messages] == ([] if expected is None else [True])


def test_fewer_devices_than_asked_for_are_a_warning_that_names_them_and_an_error(caplog):
    with pytest.raises(MultihostError):
        multihost.check(Launch(devices=16), MeshConfig(), {})
    assert "sees 8 of the 16 devices that --devices promises" in caplog.text


@pytest.mark.parametrize(
    ("sizes", "each", "expected"),
    [
        ((1, 8, 1, 1, 1), 2, [0, 1, 2, 3]),
        ((1, 2, 2, 1, 2), 2, [0, 1, 2, 3]),
        ((2, 1, 2, 2, 1), 2, [0, 1, 2, 3]),
        ((1, 2, 1, 2, 2), 2, [0, 0, 1, 1]),  # two processes split the tokens of the same rows
        ((1, 1, 1, 1, 8), 4, [0, 0]),
    ],
)
def test_processes_provide_rows_by_the_mesh(sizes, each, expected):
    mesh = make_mesh(MeshConfig(*sizes))
    shares = multihost._shares(mesh, {device: device.id // each for device in mesh.devices.flat})
    numbers = sorted(set(shares.values()))
    assert [numbers.index(shares[process]) for process in sorted(shares)] == expected
    assert sorted(row for share in numbers for row in share) == list(range(16))
    assert multihost.row_share(mesh) == (0, 1)


def test_rows_that_are_shared_in_part_are_refused():
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    owners = dict(zip(mesh.devices.flat, [0, 0, 0, 1, 1, 1, 2, 2], strict=True))
    with pytest.raises(ShardingError, match="3 processes would share rows in part"):
        multihost._shares(mesh, owners)


def test_what_is_told_adds_up():
    fill = Fill(Work(1, 2, 3, 4, 5, 6), Work(7, 8, 9, 10, 11, 12), 13.0)
    number, counts = multihost.Poll(make_mesh(MeshConfig()))(15, fill.numbers(0.5))
    assert int(number) == 15
    assert Fill.of_numbers([2 * count for count in counts.tolist()]) == fill


# --- real processes -------------------------------------------------------------------------------------------------

# Pages of several sizes and single cells, so that what hosts get of a batch differs; the second stage has two buckets.
PARTS = [
    {"name": task, "source": "digit_pages", "options": {"task": task, "samples": 500}, "weight": weight}
    for task, weight in (("cell", 3.0), ("page", 1.0))
]
MIXED = {"source": "mixture", "options": {"parts": PARTS}}
TWO_STAGES = f"""
    stages=(
        dict(
            stage, rows=16, steps=2, data={MIXED}, packed_length=256,
            buckets=[dict(slots=10, tokens=256, patches=64)],
        ),
        dict(
            stage, rows=16, steps=6, name="second", accumulation=2, data={MIXED}, packed_length=256,
            buckets=[dict(slots=4, tokens=128, patches=64), dict(slots=9, tokens=256, patches=64)],
        ),
    ),
    mesh=dict(fsdp=2),
"""
# The model in the first stage, something quicker to compile in the second; what each process gets of a batch is shown.
SEEN = """
import tiny
from uhd_jax.models import uhd
from uhd_jax.training.batches import StageBatches
model, whole = uhd.loss_sums, StageBatches.__next__
def loss_sums(params, batch, config):
    return (model if batch.patches.shape[1] == 10 else tiny.quick_loss_sums)(params, batch, config)
def seen(self):
    batch, info = whole(self)
    print("met", batch.bucket, "with", int((batch.patch_grids > 0).any(-1).sum()), "images", flush=True)
    return batch, info
uhd.loss_sums, StageBatches.__next__ = loss_sums, seen
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The curve of one process, here, with eight devices."""
    folder = tmp_path_factory.mktemp("alone")
    config = write(folder / "config.py", TWO_STAGES)
    with pytest.MonkeyPatch.context() as patch:  # puts back both at the end
        patch.setattr(uhd, "loss_sums", uhd.loss_sums)
        patch.setattr(StageBatches, "__next__", StageBatches.__next__)
        exec(SEEN, {})
        assert main(["train", f"--config={config}", f"--workdir={folder}/run", *OPTIONS]) == 0
    return folder / "run"


RUNS = [(2, 2, ("dcn_data=2", "data=1")), (4, 1, ("data=2",))]
if os.environ.get("UHD_ALL_MESHES"):
    RUNS += [(4, 1, ("data=1", "fsdp=2", f"{axis}=2")) for axis in ("sequence", "tensor")]  # pairs render the same rows


@pytest.mark.parametrize(("processes", "devices", "mesh"), RUNS)
def test_as_many_processes_as_you_like_have_the_losses_of_one(together, tmp_path, alone, processes, devices, mesh):
    """Also where each process has a copy of the parameters, over the slow network."""
    workdir = tmp_path / "run"
    config = write(tmp_path / "config.py", TWO_STAGES)
    argv = [f"--config.train.mesh.{size}" for size in mesh]
    statuses, shown = ended(together(workdir, config, processes, devices, argv, SEEN))
    assert statuses == [0] * processes, shown
    for ours, theirs in zip(curve(workdir), curve(alone), strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2:] == pytest.approx(theirs[2:], rel=1e-5)
    for ours, theirs in zip(records(workdir), records(alone), strict=True):  # of all rows, not of this process's
        rates = [record["images_per_second"] * record["step_seconds"] for record in (ours, theirs)]
        assert rates[0] == pytest.approx(rates[1])
        assert ours["padding_waste_tokens"] == pytest.approx(theirs["padding_waste_tokens"])
    # Logs of the first process only.
    assert f"{processes} processes, {processes * devices} devices (cpu)" in shown[0] and "second step 8/8" in shown[0]
    assert not any("step" in text or "processes, " in text for text in shown[1:]), shown[1:]
    trained = json.loads((workdir / "trained.json").read_text())
    assert trained["processes"] == processes and trained["devices"] == f"{processes * devices} x cpu"
    assert len([*(workdir / "tensorboard").iterdir()]) == 1
    # The same buckets in the same order everywhere, other images in each part of the rows.
    met = [re.findall(r"met (.*) with (\d+) images", text) for text in shown]
    buckets = [[bucket for bucket, _ in of_process] for of_process in met]
    assert all(of_process == buckets[0] for of_process in buckets), buckets
    assert len(buckets[0]) >= 8 and len(set(buckets[0])) == 3
    assert len({tuple(count for _, count in of_process) for of_process in met}) > 1


def test_processes_plan_from_an_index(together, tmp_path, capsys):
    options = source_files.write_llava(tmp_path)
    data = {"source": "json", "options": options}
    config = write(tmp_path / "config.py", f"stages=(dict(stage, data={data}, packed_length=256, max_slices=2),)")
    curves = []
    for name in ("without", "with"):
        statuses, shown = ended(together(tmp_path / name, config, 2))
        assert statuses == [0, 0], shown
        assert ("samples are planned from an index" in shown[0]) == (name == "with")
        curves.append(curve(tmp_path / name))
        assert call(capsys, "data", "index", f"--config={config}")[0] == 0
    assert curves[0] == curves[1]


@pytest.mark.parametrize("of", [(1,), (0, 1)])
def test_a_signal_to_one_or_all_saves_the_same_step_and_one_process_goes_on(
    together, capsys, monkeypatch, tmp_path, of
):
    workdir = tmp_path / "run"
    config = write(tmp_path / "config.py", 'stages=(dict(stage, schedule="constant"),)')
    children = together(workdir, config, 2, argv=ENDLESS, before=QUICK + SLOW)
    until_step(workdir, 2, children)
    asked = time.monotonic()
    for number in of:
        children[number].send_signal(signal.SIGTERM)
    statuses, shown = ended(children)
    print(f"\nfrom the signal to the end of both, all saved: {time.monotonic() - asked:.1f} s")
    assert statuses == [0, 0], shown
    step = saved(workdir)[-1]
    assert f"interrupted: step {step} is saved; start again to continue" in shown[0].splitlines()
    assert "interrupted" not in shown[1] and len(records(workdir)) == step
    if len(of) == 1:
        monkeypatch.setattr(uhd, "loss_sums", tiny.quick_loss_sums)
        last = f"--config.train.stages[0].steps={step + 2}"
        for folder in (workdir, tmp_path / "uninterrupted"):
            assert call(capsys, "train", f"--config={config}", f"--workdir={folder}", *OPTIONS, last)[0] == 0
        assert [record["step"] for record in records(workdir)] == list(range(1, step + 3))
        for ours, theirs in zip(curve(workdir), curve(tmp_path / "uninterrupted"), strict=True):
            assert ours[:2] == theirs[:2] and ours[2:] == pytest.approx(theirs[2:], rel=1e-5)


# Process 1 gets no data any more once all is compiled, and soon notices it.
HANGS = """
from uhd_jax.training.watchdog import Watchdog
alive, hanging = Watchdog.alive, False
def hasty(self, doing):
    global hanging
    hanging = process == 1 and doing == "step 8 waits for its data"
    self._seconds = 3 if hanging else self._seconds
    alive(self, doing)
def stuck(self):
    time.sleep(1000 if hanging else 0)
    return slowly(self)
Watchdog.alive, StageBatches.__next__ = hasty, stuck
"""


def test_one_hangs_and_ends_and_then_the_other_ends(together, tmp_path):
    """What is killed by others, and how both go on: test_survival.py."""
    workdir, config = tmp_path / "run", write(tmp_path / "config.py")
    argv = [*ENDLESS, "--config.train.hang_exits=True"]
    children = together(workdir, config, 2, argv=argv, before=QUICK + SLOW + HANGS)
    assert children[1].wait(timeout=600) == 1
    alone = time.monotonic()
    (status,), (shown,) = ended(children[:1], seconds=90)  # heartbeat, and what a loaded machine adds
    print(f"\nfrom the end of one process to that of the other: {time.monotonic() - alone:.1f} s")
    assert status not in (0, None), shown
    assert "cannot go on, most likely because another one ended" in shown or "another task died" in shown, shown
    assert saved(workdir)[-1] >= 3
    _, (shown,) = ended(children[1:])
    assert re.search(r"process 1 hangs: .* since step 8 waits for its data; .* It ends now", shown), shown
    assert "in stuck" in (workdir / "stacks-process-1.txt").read_text()


def test_processes_that_do_not_come_are_named(together, tmp_path):
    child, other = together(tmp_path / "run", write(tmp_path / "config.py"), 2, argv=["--start-seconds=3"])
    other.kill()
    (status,), (shown,) = ended([child])
    assert status != 0
    assert "not all processes come together within 3 seconds: start the same command for every one" in shown, shown


def test_a_folder_that_is_not_shared_is_refused(together, tmp_path):
    config = write(tmp_path / "config.py")
    own = "import sys\nsys.argv = [part + sys.argv[-1][-1] if 'workdir' in part else part for part in sys.argv]\n"
    hurry = "from uhd_jax.training import workdir\nworkdir.SEE_SECONDS = 1.0\n"
    children = together(tmp_path / "run", config, 2, argv=["--heartbeat-seconds=10"], before=QUICK + hurry + own)
    statuses, shown = ended(children)
    assert all(statuses), shown
    assert "run1: process 1 does not see there what process 0 wrote" in shown[1]
