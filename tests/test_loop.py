"""The loop: stages, resume, signals, kills, bad steps, logs."""

import dataclasses
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import train_tiny
from checkpoints import exported, write_checkpoint

from uhd_jax.checkpoint import (
    Checkpointer,
    CheckpointError,
    ConfigMismatch,
    load_model,
    load_model_config,
    save_model,
)
from uhd_jax.config import ConfigError, MeshConfig
from uhd_jax.convert.families import family_named
from uhd_jax.models import uhd
from uhd_jax.sharding.mesh import ShardingError
from uhd_jax.training.loop import TrainingError, train
from uhd_jax.training.workdir import WorkdirError

pytestmark = pytest.mark.usefixtures("unoptimised", "compiled_once")

RUNNER = Path(__file__).with_name("train_tiny.py")
SOON = {"stages": [tiny.stage(steps=4, trainable=("connector",))]}


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    """(stage, step, loss); the floats are compared exactly."""
    return [(record["stage"], record["step"], record["loss"]) for record in records(workdir)]


def run(workdir, config=None, batches=None, devices=1):
    """Trains with the quick loss; returns the result and what was shown."""
    stream = io.StringIO()
    made = batches or (lambda config, index: tiny.RandomBatches(number=100 * index))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uhd, "loss_sums", tiny.quick_loss_sums)
        result = train(config or tiny.run(**SOON), workdir, made, devices=jax.devices()[:devices], stream=stream)
    return result, stream.getvalue()


def two_stages(steps=4, **changes):
    first = tiny.stage(name="first", steps=steps, trainable=("connector",))
    return tiny.run([first, tiny.stage(name="second", steps=steps, trainable=("decoder",))], **changes)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    result, shown = run(workdir, two_stages())
    return workdir, result, shown


def test_a_whole_run(uninterrupted):
    workdir, result, shown = uninterrupted
    assert result.finished and result.exit_status == 0 and result.step == 8
    lines = records(workdir)
    assert [(line["stage"], line["step"], line["stage_step"]) for line in lines] == [
        *(("first", n, n) for n in (1, 2, 3, 4)),
        *(("second", n, n - 4) for n in (5, 6, 7, 8)),
    ]
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines)
    # Every third batch is of a second bucket.
    assert [line["compilations"] for line in lines] == [1, 1, 2, 2, 1, 2, 2, 2]
    assert "first step 1/8  loss " in shown and "\r" not in shown
    assert any(path.name.startswith("events.") for path in (workdir / "tensorboard").iterdir())


def test_what_is_logged(uninterrupted):
    line = records(uninterrupted[0])[-1]
    assert 0.0 < line["flop_utilisation"] < 1.0
    assert 0.0 <= line["data_wait_fraction"] <= 1.0
    assert line["padding_waste_slots"] == 0.5
    assert line["padding_waste_patches"] == 0.5
    assert line["padding_waste_tokens"] == pytest.approx(1 / 8)  # two of sixteen
    assert line["tokens_per_second"] == pytest.approx(8 * 14 / line["step_seconds"])
    assert line["views_per_second"] == line["images_per_second"] == pytest.approx(8 / line["step_seconds"])
    assert line["data/dropped"] == 104.0
    assert line["skipped_total"] == line["skipped_in_a_row"] == 0
    assert line["trained_tokens"] == np.count_nonzero(tiny.batch(103).loss_weights)


def test_only_the_trained_part_of_each_stage_changes(uninterrupted):
    checkpointer = Checkpointer(uninterrupted[0])
    assert checkpointer.latest_step() == 8
    params, config = load_model(uninterrupted[0])
    assert config == tiny.MODEL
    jax.tree.map(np.testing.assert_array_equal, params["tower"], tiny.params()["tower"])
    for part in ("connector", "decoder"):
        pairs = zip(jax.tree.leaves(params[part]), jax.tree.leaves(tiny.params()[part]), strict=True)
        assert all((a != b).any() for a, b in pairs)


def test_a_finished_run_does_nothing_when_started_again(uninterrupted):
    before = (uninterrupted[0] / "metrics.jsonl").read_bytes()

    def no_data(config, index):
        raise AssertionError("opened data")

    result, shown = run(uninterrupted[0], two_stages(), no_data)
    assert result.finished and result.step == 8
    assert "resuming" in shown
    assert (uninterrupted[0] / "metrics.jsonl").read_bytes() == before


class Interrupting(tiny.RandomBatches):
    """Sends itself a signal around batch `at`: while it is waited for, though moved on, or once it is there."""

    def __init__(self, number, at, sent, waiting=False):
        super().__init__(number)
        self.at, self.sent, self.waiting = at, sent, waiting

    def __next__(self):
        made = super().__next__()
        if self.waiting and self.number == self.at + 1:
            os.kill(os.getpid(), self.sent)
        return made

    def get_state(self):
        if not self.waiting and self.number == self.at + 1:
            os.kill(os.getpid(), self.sent)
            os.kill(os.getpid(), signal.SIGTERM)  # impatient managers send it again
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # the next one ends the process
        return super().get_state()


@pytest.mark.parametrize(
    ("at", "sent", "waiting", "step"),
    [
        (2, signal.SIGTERM, False, 3),
        (100, signal.SIGINT, False, 5),
        (2, signal.SIGINT, True, 2),
        (100, signal.SIGTERM, True, 4),
        (101, signal.SIGTERM, True, 5),
    ],
)
def test_a_signal_saves_and_the_next_start_goes_on(tmp_path, uninterrupted, at, sent, waiting, step):
    handler = signal.getsignal(sent)
    result, shown = run(tmp_path, two_stages(), lambda _, index: Interrupting(100 * index, at, sent, waiting))
    assert (result.finished, result.interrupted_by, result.step) == (False, sent, step)
    assert result.exit_status == (130 if sent == signal.SIGINT else 0)
    assert signal.getsignal(sent) is handler
    assert f"interrupted: step {step} is saved" in shown
    assert Checkpointer(tmp_path).latest_step() == step
    result, shown = run(tmp_path, two_stages())
    assert result.finished and f"at step {step}" in shown
    assert losses(tmp_path) == losses(uninterrupted[0])


def test_a_signal_before_the_first_step(tmp_path):
    def open_batches(config, index):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not left at once")

    result, shown = run(tmp_path, batches=open_batches)
    assert (result.step, result.finished, result.exit_status) == (0, False, 0)
    assert "interrupted: nothing to save yet" in shown


def test_a_signal_ends_the_waiting_for_data_that_does_not_come(tmp_path):
    class Stuck(tiny.RandomBatches):
        closed = False

        def __next__(self):
            if self.number < 2:
                return super().__next__()
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            assert not threading.Event().wait(60), "not left"

        def __exit__(self, *_):
            Stuck.closed = True

    result, _ = run(tmp_path, batches=lambda *_: Stuck())
    assert (result.step, result.interrupted_by) == (2, signal.SIGTERM)
    assert Checkpointer(tmp_path).latest_step() == 2 and Stuck.closed


def in_another_process(workdir, steps, log_lines, sent, programs):
    """Trains until so many steps are logged, then sends a signal; returns the exit status."""
    environment = os.environ | {
        "PYTHONPATH": str(RUNNER.parents[1]),
        "JAX_COMPILATION_CACHE_DIR": programs,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    arguments = [sys.executable, str(RUNNER), str(workdir), str(steps), "0.03"]
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)
    path = workdir / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and len(path.read_text().splitlines()) >= log_lines):
        time.sleep(0.005)
    process.send_signal(sent)
    shown = process.communicate(timeout=120)[1]
    assert process.returncode in (0, -sent), shown
    return process.returncode


def test_killed_and_resumed_has_the_same_losses_bit_for_bit(tmp_path, compiled_once):
    steps = 7
    train_tiny.main(tmp_path / "whole", steps, 0)
    workdir = tmp_path / "killed"
    killed_at, stopped_at = random.randint(1, steps + 2), random.randint(steps + 3, 2 * steps - 2)
    assert in_another_process(workdir, steps, killed_at, signal.SIGKILL, compiled_once) == -signal.SIGKILL
    assert in_another_process(workdir, steps, stopped_at, signal.SIGTERM, compiled_once) == 0
    train_tiny.main(workdir, steps, 0)
    assert len(losses(workdir)) == 2 * steps
    assert losses(workdir) == losses(tmp_path / "whole")


def test_no_step_is_in_a_checkpoint_before_it_is_in_the_log(tmp_path):
    """Or a kill between the two would leave a gap."""

    seen = []

    def save(self, step, *arguments):
        seen.append((step, len(records(tmp_path))))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpointer, "save", save)
        run(tmp_path)
    assert seen == [(3, 3), (4, 4)]


def test_the_log_ends_where_the_checkpoint_does(tmp_path):
    """Lines of steps that are done again, and a half-written one, do not stay."""
    run(tmp_path, tiny.run(**SOON, checkpoint_every=100), lambda *_: Interrupting(0, 1, signal.SIGTERM))
    path = tmp_path / "metrics.jsonl"
    kept = path.read_text()
    path.write_text(kept + json.dumps({"stage": "only", "step": 3, "loss": 1.0}) + '\n{"stage": "on')
    run(tmp_path)
    assert path.read_text().startswith(kept)
    assert [line["step"] for line in records(tmp_path)] == [1, 2, 3, 4]


class Poisoned(tiny.RandomBatches):
    """Batches from number `start` to before `stop` have a weight of NaN."""

    start, stop = 1, 3

    def __next__(self):
        batch, info = super().__next__()
        if self.start < self.number <= self.stop:
            batch.loss_weights[0, 5] = np.inf
        return batch, info


def test_bad_steps_are_skipped_counted_and_shown(tmp_path):
    result, shown = run(tmp_path, tiny.run(**SOON, max_bad_steps=3), lambda *_: Poisoned())
    lines = records(tmp_path)
    assert result.finished
    assert [line["skipped_total"] for line in lines] == [0, 1, 2, 2]
    assert [line["skipped_in_a_row"] for line in lines] == [0, 1, 2, 0]
    assert lines[1]["loss"] is None and lines[3]["loss"] > 0
    assert "step 3: loss or gradient is not finite, skipped (2 in a row)" in shown


def test_too_many_bad_steps_end_the_run_with_the_last_good_parameters_saved(tmp_path):
    run(tmp_path / "good", tiny.run([tiny.stage(steps=1, trainable=("connector",))]))
    with pytest.raises(TrainingError, match="2 steps in a row .* train.init_from"):
        run(tmp_path / "bad", tiny.run([tiny.stage(steps=8, trainable=("connector",))], max_bad_steps=2), Poisoned_)
    saved = load_model(tmp_path / "bad")[0]
    assert [line["skipped_total"] for line in records(tmp_path / "bad")][:3] == [0, 1, 2]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved))


def Poisoned_(config, index):
    return Poisoned()


class Empty(tiny.RandomBatches):
    """Nothing to train on in the batches with these numbers."""

    def __init__(self, *numbers):
        super().__init__()
        self.empty = numbers

    def __next__(self):
        batch, info = super().__next__()
        if self.number - 1 in self.empty:
            batch.loss_weights[:] = 0
        return batch, info


def test_steps_with_nothing_to_train_on_are_skipped_and_counted_apart(tmp_path):
    result, shown = run(tmp_path, tiny.run(**SOON, max_bad_steps=3), lambda *_: Empty(1, 2))
    lines = records(tmp_path)
    assert result.finished
    assert [line["empty_total"] for line in lines] == [0, 1, 2, 2]
    assert [line["empty_in_a_row"] for line in lines] == [0, 1, 2, 0]
    assert lines[-1]["skipped_total"] == lines[2]["skipped_in_a_row"] == 0
    assert lines[1]["loss"] is None and lines[3]["loss"] > 0
    assert "step 3: nothing to train on, skipped (2 in a row)" in shown and "finite" not in shown


@pytest.mark.parametrize(("steps", "limit"), [(8, 3), (3, 10)])
def test_nothing_but_unusable_data_ends_the_run_and_says_so(tmp_path, steps, limit):
    config = tiny.run([tiny.stage(steps=steps, trainable=("connector",))], max_bad_steps=limit, checkpoint_every=2)
    with pytest.raises(TrainingError) as caught:
        run(tmp_path, config, lambda *_: Empty(*range(8)))
    assert "step 3: 3 steps in a row had nothing to train on" in str(caught.value)
    # Of the batch that was read last, and where to look.
    assert "dropped 3" in str(caught.value) and "stage 'only', source 'random' {}" in str(caught.value)
    # The count goes on over a restart, and data that was mended is trained on from the last checkpoint.
    with pytest.raises(TrainingError, match="step 3: 3 steps in a row"):
        run(tmp_path, config, lambda *_: Empty(*range(8)))
    result, _ = run(tmp_path, config)
    assert result.finished and [line["empty_total"] for line in records(tmp_path)][-1] == 2


def test_data_that_ends_is_an_error_with_numbers(tmp_path):
    class Two(tiny.RandomBatches):
        def __next__(self):
            if self.number == 2:
                raise StopIteration
            return super().__next__()

    with pytest.raises(TrainingError, match="data of stage 'only' ended after 2 of 4 steps"):
        run(tmp_path, batches=lambda *_: Two())


def test_a_run_of_another_config_is_refused_before_anything_is_touched(tmp_path, uninterrupted):
    workdir = uninterrupted[0]
    log = (workdir / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigMismatch, match=r"train\.seed: 0 there, 1 here"):
        run(workdir, two_stages(seed=1))
    assert (workdir / "metrics.jsonl").read_bytes() == log


def test_what_the_config_shows_to_be_wrong_comes_before_the_folder(tmp_path):
    workdir = tmp_path / "run"
    stages = [tiny.stage(name="first"), tiny.stage(name="second", trainable=("connector_positions",))]
    with pytest.raises(ConfigError, match="no parameters in the parts .'connector_positions',"):
        run(workdir, tiny.run(stages))
    with pytest.raises(CheckpointError, match="holds no model"):
        run(workdir, tiny.run(**SOON, init_from=str(tmp_path)))
    assert not workdir.exists()


def test_two_trainings_do_not_share_a_folder(tmp_path):
    def open_batches(config, index):
        with pytest.raises(WorkdirError, match=f"{tmp_path}: another training is at work there"):
            run(tmp_path)
        return tiny.RandomBatches()

    assert run(tmp_path, batches=open_batches)[0].finished
    assert run(tmp_path)[0].finished  # the lock is gone, whatever is left of its file


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(WorkdirError, match=f"{workdir} is a file, or lies below one"):
            run(workdir)


def test_starting_from_a_saved_model(tmp_path):
    params = jax.tree.map(lambda leaf: leaf + 0.01, tiny.params())
    save_model(tmp_path / "model", params, tiny.MODEL)
    run(tmp_path / "run", tiny.run(**SOON, init_from=str(tmp_path / "model")))
    trained = load_model(tmp_path / "run")[0]
    jax.tree.map(np.testing.assert_array_equal, trained["decoder"], params["decoder"])
    assert load_model_config(tmp_path / "run").decoder.max_positions == tiny.BUCKET.tokens  # its longest row
    other = dataclasses.replace(tiny.MODEL, tower=dataclasses.replace(tiny.MODEL.tower, heads=4))
    save_model(tmp_path / "model", params, other)
    with pytest.raises(ConfigMismatch, match=r"model\.tower\.heads: 4 there, 2 here"):
        run(tmp_path / "again", tiny.run(**SOON, init_from=str(tmp_path / "model")))
    with pytest.raises(CheckpointError, match="holds no model"):
        run(tmp_path / "again", tiny.run(**SOON, init_from=str(tmp_path)))


def test_starting_from_a_foreign_checkpoint_on_a_mesh(tmp_path):
    """Read tensor by tensor into the mesh's shardings; the longest input is that of its files."""
    decoder = dataclasses.replace(tiny.MODEL.decoder, max_positions=99)
    config = dataclasses.replace(tiny.MODEL, decoder=decoder)
    params = jax.tree.map(lambda leaf: leaf + 0.01, tiny.params())
    family, folder = family_named("llava_uhd_v4_research"), tmp_path / "theirs"
    write_checkpoint(folder, exported(family, config, jax.tree.map(np.asarray, params)), None)
    family.write_files(config, None, folder)
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    run(tmp_path / "run", tiny.run(**SOON, init_from=str(folder), mesh=mesh), devices=8)
    trained, config = load_model(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, trained["decoder"], params["decoder"])
    assert config.decoder.max_positions == 99
    with pytest.raises(ConfigMismatch, match=r"model\.tower\.heads: 2 there, 4 here"):
        other = dataclasses.replace(tiny.MODEL, tower=dataclasses.replace(tiny.MODEL.tower, heads=4))
        run(tmp_path / "again", dataclasses.replace(tiny.run(**SOON, init_from=str(folder)), model=other))


def test_rows_that_do_not_spread_are_refused_before_compiling(tmp_path):
    with pytest.raises(ShardingError, match="rows=12 .* multiple of 8"):
        train(tiny.run([tiny.stage(rows=12)]), tmp_path, lambda *_: tiny.RandomBatches(), stream=io.StringIO())


def test_begun_on_eight_devices_and_resumed_on_one(tmp_path, uninterrupted):
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    run(tmp_path, two_stages(mesh=mesh), lambda _, index: Interrupting(100 * index, 100, signal.SIGTERM), devices=8)
    assert len(losses(tmp_path)) == 5
    run(tmp_path, two_stages())
    for (stage, step, loss), expected in zip(losses(tmp_path), losses(uninterrupted[0]), strict=True):
        assert (stage, step) == expected[:2]
        assert loss == pytest.approx(expected[2], rel=1e-5)
