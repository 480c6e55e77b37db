"""While the device works on a step, the next batch is read and sent to it."""

import pytest
import tiny
from test_loop import SOON, run

from uhd_jax.training import loop, step_log

pytestmark = pytest.mark.usefixtures("unoptimised", "compiled_once")


def test_a_batch_is_sent_before_the_step_before_it_is_waited_for(tmp_path, monkeypatch):
    events = []
    place, read = loop.place_batch, step_log.StepLog._read

    def placed(batch, mesh):
        events.append("sent")
        return place(batch, mesh)

    def waited(log):
        events.append("waited")  # reading a step's metrics is the only thing that waits for the device
        return read(log)

    monkeypatch.setattr(loop, "place_batch", placed)
    monkeypatch.setattr(step_log.StepLog, "_read", waited)
    run(tmp_path, tiny.run(**SOON))
    assert events[:5] == ["sent", "sent", "waited", "sent", "waited"]  # then a checkpoint, which waits for its step
