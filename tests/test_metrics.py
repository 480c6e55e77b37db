"""Writers, console and meter."""

import fcntl
import io
import json
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
import textwrap

import pytest
import tiny
from tensorboardX.proto.event_pb2 import Event

from uhd_jax.cost import Work
from uhd_jax.training.metrics import Console, Fill, JsonlWriter, Meter, TensorBoardWriter

RECORD = {
    "stage": "one",
    "step": 3,
    "loss": 0.1,
    "learning_rate": 1e-4,
    "grad_norm": 2.0,
    "tokens_per_second": 10.0,
    "images_per_second": 1.0,
}


def test_jsonl_keeps_floats_exactly_and_knows_no_nan(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path, 0)
    third = 1 / 3
    writer.write(RECORD | {"loss": third, "grad_norm": float("inf"), "learning_rate": float("nan")})
    line = json.loads(path.read_text())  # without close: a kill would lose nothing
    assert line["loss"] == third
    assert line["grad_norm"] is None and line["learning_rate"] is None
    writer.close()


def test_jsonl_drops_what_will_be_done_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    writer = JsonlWriter(path, 2)
    writer.write({"step": 3, "again": True})
    writer.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "again": True},
    ]


def tensorboard_events(folder):
    (path,) = folder.iterdir()
    data = path.read_bytes()
    while data:
        length = int.from_bytes(data[:8], "little")
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_tensorboard_scalars_and_purge_on_resume(tmp_path):
    writer = TensorBoardWriter(tmp_path, restored_step=2)
    writer.write(RECORD)
    writer.close()
    events = list(tensorboard_events(tmp_path))
    scalars = {value.tag: (event.step, value.simple_value) for event in events for value in event.summary.value}
    assert scalars["loss"] == (3, pytest.approx(0.1))
    assert set(scalars) == set(RECORD) - {"stage", "step"}
    assert [event.step for event in events if event.session_log.status] == [3]  # hides older events from here on


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_off_a_terminal():
    stream = io.StringIO()
    console = Console(10, 2, stream)
    console.step("one")
    console.write(RECORD)
    console.say("hello")
    console.close()
    assert stream.getvalue() == "one step 3/10  loss 0.1000  lr 1.00e-04  grad 2.00  10 tok/s  1.0 img/s\nhello\n"


def test_a_bar_on_a_terminal():
    stream = Terminal()
    console = Console(10, 2, stream)
    console.write(RECORD)
    console.step("one")
    console.say("hello")
    console.close()
    shown = stream.getvalue()
    assert "\r" in shown and "hello\n" in shown
    assert "one" in shown.splitlines()[-1] and "loss 0.1000" in shown
    assert "3/10" in shown


@pytest.mark.parametrize(("columns", "bar"), [(0, False), (80, True)])
def test_a_terminal_without_width_gets_plain_lines(columns, bar):
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(follower, "w") as stream:
        console = Console(10, 2, stream)
        console.step("one")
        console.write(RECORD)
        console.close()
        shown = os.read(leader, 4096).decode()
    os.close(leader)
    assert ("one step 3/10  loss 0.1000" in shown) is not bar
    assert ("/10 [" in shown) is bar


def test_what_is_logged_is_said_above_the_bar_and_nowhere_else(caplog):
    stream = Terminal()
    logger = logging.getLogger("uhd_jax.data.pipeline")
    console = Console(10, 2, stream)
    logger.warning("%s: no image", "a.jsonl:3")
    logger.info("planned")
    console.close()
    logger.warning("later")
    logger.info("much later")
    assert "\ra.jsonl:3: no image\n" in stream.getvalue() and "later" not in stream.getvalue()
    assert "planned\n" in stream.getvalue()
    assert caplog.messages == ["later"]


def test_a_level_that_is_set_is_kept():
    logger, stream = logging.getLogger("uhd_jax"), Terminal()
    logger.setLevel(logging.ERROR)
    try:
        console = Console(10, 2, stream)
        logger.warning("not wanted")
        console.close()
        assert logger.level == logging.ERROR and "not wanted" not in stream.getvalue()
    finally:
        logger.setLevel(logging.NOTSET)


def test_meter_sums_and_starts_anew():
    meter = Meter()
    fill = Fill.of(tiny.batch(0), {"images": 8})
    assert fill.used.patches == 8 * 16 and fill.room.patches == 8 * 32
    for _ in range(2):
        meter.add(fill, flops=100.0, wait_seconds=0.5, seconds=2.0)
    rates = meter.take(peak=1000.0)
    assert rates["step_seconds"] == 2.0
    assert rates["tokens_per_second"] == 2 * 8 * 14 / 4
    assert rates["images_per_second"] == rates["views_per_second"] == 4.0
    assert rates["data_wait_fraction"] == 0.25
    assert rates["flop_utilisation"] == pytest.approx(200 / 4 / 1000)
    assert rates["padding_waste_patches"] == rates["padding_waste_slots"] == 0.5
    assert rates["padding_waste_tokens"] == pytest.approx(1 / 8)
    assert meter.take(peak=1000.0)["tokens_per_second"] == 0.0


def test_text_only_batches_waste_no_slots():
    fill = Fill(Work(tokens=5), Work(tokens=10))
    assert fill.waste() == {"padding_waste_slots": 0.0, "padding_waste_patches": 0.0, "padding_waste_tokens": 0.5}


def test_a_full_disk_is_a_typed_error_and_no_hang(tmp_path):
    script = textwrap.dedent(
        """
        import resource, sys
        from pathlib import Path
        from uhd_jax.training.metrics import JsonlWriter, MetricsError, TensorBoardWriter

        folder = Path(sys.argv[1])
        writers = [JsonlWriter(folder / "metrics.jsonl", 0), TensorBoardWriter(folder / "tensorboard", 0)]
        # No file may grow beyond 2 KiB: writes fail as they do on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        for writer in writers:
            try:
                for step in range(1000):
                    writer.write({"step": step, "loss": 1.0})
            except MetricsError as error:
                print(error, "at", step)
        """
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    first, second = done.stdout.splitlines()[:2]
    assert f"cannot write {tmp_path}/metrics.jsonl: File too large. Free some space" in first, done.stderr
    assert f"cannot write {tmp_path}/tensorboard" in second
