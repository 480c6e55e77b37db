"""What a run survives: damaged checkpoints, kills while one is written, devices that disagree, and hangs."""

import os
import random
import threading

import pytest
import tiny
from faulty import disagree_at
from processes import ENDLESS, QUICK, ended, records, saved, seconds_between_ends, seconds_to_step, write
from test_loop import losses, run, two_stages

from uhd_jax.checkpoint import Checkpointer, CheckpointError
from uhd_jax.config import MeshConfig
from uhd_jax.training import watchdog
from uhd_jax.training.loop import TrainingError
from uhd_jax.training.watchdog import Watchdog

pytestmark = pytest.mark.usefixtures("unoptimised", "compiled_once")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    run(workdir, two_stages())
    return losses(workdir)


def until(workdir, step):
    """Trains as far as `step`, which is saved, as is every third step before it."""
    run(workdir, two_stages(), lambda _, index: Leaving(100 * index, step))
    assert saved(workdir)[-1] == step


class Leaving(tiny.RandomBatches):
    """Is sent SIGTERM with the batch of a step."""

    def __init__(self, number, step):
        super().__init__(number)
        self.at = step

    def get_state(self):
        if self.number == self.at:
            os.kill(os.getpid(), 15)
        return super().get_state()


def flip_a_bit(checkpoint):
    """Of the largest file, where only the parameters' values are."""
    largest = max((path for path in (checkpoint / "params").rglob("*") if path.is_file()), key=os.path.getsize)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1 << random.randrange(8)
    largest.write_bytes(content)


def empty(checkpoint):
    for path in (checkpoint / "training").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [flip_a_bit, empty])
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_goes_on(tmp_path, uninterrupted, spoil):
    until(tmp_path, 4)
    assert saved(tmp_path) == [3, 4]
    newest = tmp_path / "checkpoints" / "4"
    spoil(newest)
    kept = {path.relative_to(newest): path.read_bytes() for path in newest.rglob("*") if path.is_file()}
    result, shown = run(tmp_path, two_stages())
    assert f"checkpoint 4 is damaged and lies in {newest}.damaged-1 now; going on from 3. {newest}" in shown
    assert "at step 3" in shown and result.finished and losses(tmp_path) == uninterrupted
    aside = newest.with_name("4.damaged-1")
    assert {path.relative_to(aside): path.read_bytes() for path in aside.rglob("*") if path.is_file()} == kept
    assert "is damaged" not in run(tmp_path, two_stages())[1]


def test_where_no_checkpoint_can_be_read_nothing_is_touched(tmp_path):
    until(tmp_path, 4)
    for step in (3, 4):
        empty(tmp_path / "checkpoints" / str(step))
    with pytest.raises(CheckpointError, match=r"checkpoints/4 cannot be read; delete .*/4 to go on from checkpoint 3"):
        run(tmp_path, two_stages())
    assert saved(tmp_path) == [3, 4]


def test_checkpoints_of_before_there_were_checksums_are_read(tmp_path, uninterrupted):
    with pytest.MonkeyPatch.context() as patch:
        save = Checkpointer.save
        patch.setattr(
            Checkpointer, "save", lambda self, *given: save(self, *given[:-1], {**given[-1], "checksums": None})
        )
        until(tmp_path, 4)
    run(tmp_path, two_stages())
    assert losses(tmp_path) == uninterrupted


def test_eight_devices_then_four_then_one(tmp_path, uninterrupted):
    for devices, mesh, step in ((8, MeshConfig(data=2, fsdp=2, tensor=2), 2), (4, MeshConfig(fsdp=4), 5)):
        batches = lambda _, index: Leaving(100 * index, step)  # noqa: E731, B023
        if step > 4:
            batches = lambda _, index: Leaving(100 * index, 101)  # noqa: E731
        run(tmp_path, two_stages(mesh=mesh), batches, devices=devices)
        assert saved(tmp_path)[-1] == step
    run(tmp_path, two_stages())
    for ours, theirs in zip(losses(tmp_path), uninterrupted, strict=True):
        assert ours[:2] == theirs[:2] and ours[2] == pytest.approx(theirs[2], rel=1e-5)


def test_devices_that_disagree_end_the_run_before_it_is_saved(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        disagree_at(patch, 5)
        with pytest.raises(TrainingError) as caught:
            run(tmp_path, tiny.run([tiny.stage()], checksum_every=5, mesh=MeshConfig(data=4, fsdp=2)), devices=8)
    assert "step 5: devices that should hold the same do not: cpu:2 of process 0" in str(caught.value)
    assert "in params/decoder/final_norm/scale" in str(caught.value) and "goes on from checkpoint 3" in str(
        caught.value
    )
    assert saved(tmp_path) == [3]


class Stuck(tiny.RandomBatches):
    """The third batch takes long."""

    def __next__(self):
        if self.number == 2:
            threading.Event().wait(1.5)
        return super().__next__()


def test_a_hang_is_told_with_what_all_threads_do(tmp_path):
    result, shown = run(tmp_path, tiny.run([tiny.stage(steps=4)], hang_seconds=0.5), lambda *_: Stuck())
    assert result.finished
    file = tmp_path / "stacks-process-0.txt"
    assert "process 0 hangs: nothing has moved for" in shown and "since step 3 waits for its data; what its" in shown
    assert str(file) in shown and "train.hang_seconds" in shown
    text = file.read_text()
    assert "s since step 3 waits for its data" in text and "test_survival.py" in text and "in __next__" in text
    assert threading.active_count() == len(threading.enumerate())
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())


def test_a_hang_ends_the_process_where_that_is_wanted(tmp_path, monkeypatch, caplog):
    left = threading.Event()
    monkeypatch.setattr(watchdog.os, "_exit", lambda status: left.set() if status == 1 else None)
    with Watchdog(tmp_path / "gone", 0.05, ends=True).watching() as dog:
        dog.alive("the saving of step 3")
        assert left.wait(20)
    assert "since the saving of step 3" in caplog.text and "It ends now" in caplog.text
    assert "stands above" in caplog.text and "No such file or directory" in caplog.text  # the folder is not there


def test_no_watching_where_it_is_switched_off(tmp_path):
    before = threading.active_count()
    with Watchdog(tmp_path, 0).watching() as dog:
        dog.alive("nothing")
        assert threading.active_count() == before


# --- real processes -------------------------------------------------------------------------------------------------

KILLED_IN_SAVE = """
import os
from orbax.checkpoint._src.path import atomicity
finalize = atomicity.AtomicRenameTemporaryPath.finalize
async def die(self):
    if self._final_path.name == "9":
        os.kill(os.getpid(), 9)
    await finalize(self)
atomicity.AtomicRenameTemporaryPath.finalize = die
"""
# Process 1 does not even see it at first, and would go on from another checkpoint if it did not ask the others.
ONE_CANNOT_READ = """
from uhd_jax.checkpoint import Checkpointer, CheckpointError
restore, steps, reload, late = Checkpointer.restore, Checkpointer.steps, Checkpointer.reload, [process == 1]
Checkpointer.steps = lambda self: [step for step in steps(self) if not any(late) or step < 6]
Checkpointer.reload = lambda self: late.clear() or reload(self)
def fail(self, step, *given):
    if step == 6 and process == 1:
        raise CheckpointError("6 cannot be read here")
    return restore(self, step, *given)
Checkpointer.restore = fail
"""
ONE_DIFFERS = """
import faulty
class Patch:
    setattr = staticmethod(setattr)
faulty.disagree_at(Patch, 8, index=1)
"""


def test_killed_while_saving_then_one_cannot_read_then_one_differs(together, tmp_path):
    workdir, config = tmp_path / "run", write(tmp_path / "config.py")
    children = together(workdir, config, 2, argv=ENDLESS, before=QUICK + KILLED_IN_SAVE)
    print(f"\nfrom a kill to the end of the other process: {seconds_between_ends(children):.1f} s")
    statuses, shown = ended(children)
    assert -9 in statuses and 0 not in statuses, shown
    assert saved(workdir) == [3, 6]
    assert [path.name for path in (workdir / "checkpoints").glob("9*")] != ["9"]

    argv = [*ENDLESS, "--config.train.checksum_every=1"]
    children = together(workdir, config, 2, argv=argv, before=QUICK + ONE_CANNOT_READ + ONE_DIFFERS)
    print(f"from the restart to the first new step: {seconds_to_step(workdir, 4, children):.1f} s")
    statuses, shown = ended(children)
    assert statuses == [1, 1], shown
    assert f"resuming {workdir} at step 3" in shown[0]
    assert "checkpoint 6 is damaged" in shown[0] and "6.damaged-1 now; going on from 3" in shown[0]
    for text in shown:
        assert "step 8: devices that should hold the same do not" in text and "of process 1 differ" in text, text
    assert saved(workdir) in ([3], [3, 6]) and len(records(workdir)) == 7  # step 6 is being saved when the run ends
