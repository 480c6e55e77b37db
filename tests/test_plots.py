"""The picture of the losses, also of a run that is too short to have a curve."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib import pyplot as plt

from uhd_jax.analysis.plots import losses


def draw(**stages):
    """A figure of stages, each with the losses of its records at the steps 6, 12, 18, ... of the run."""
    records = [{"stage": name, "loss": loss} for name, values in stages.items() for loss in values]
    figure = losses([record | {"step": 6 * number} for number, record in enumerate(records, 1)], "a run")
    figure.canvas.draw()
    return figure


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def inked(panel):
    """Share of a panel's pixels that the strong line or its markers cover."""
    pixels = np.asarray(panel.figure.canvas.buffer_rgba())[::-1, :, :3].astype(int)
    box = panel.get_window_extent()
    inside = pixels[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)]
    return (abs(inside - [0x1F, 0x5F, 0xA8]).sum(axis=-1) < 30).mean()


def visible_ticks(panel):
    low, high = panel.get_xlim()
    return [tick for tick in panel.get_xticks() if low <= tick <= high]


def test_a_single_record_per_stage_is_seen():
    for panel, step in zip(draw(first=[5.6], second=[5.3]).axes, (6, 12), strict=True):
        assert inked(panel) > 2e-4
        assert visible_ticks(panel) == [step]


def test_steps_are_whole_numbers_and_a_stage_without_a_finite_loss_keeps_its_steps():
    figure = draw(first=[3.0, 2.0, 1.5], second=[None], third=list(np.linspace(1, 0.1, 50)))
    for panel, (low, high) in zip(figure.axes, [(6, 18), (24, 24), (30, 324)], strict=True):
        assert panel.get_xlim()[0] < low and high < panel.get_xlim()[1]
        ticks = visible_ticks(panel)
        assert ticks and all(tick == int(tick) for tick in ticks)
    assert [panel.get_title() for panel in figure.axes[:2]] == ["first\nlast 1.5", "second\nlast nan, 1 not finite"]
    assert inked(figure.axes[1]) == 0
    assert not any(line.get_marker() == "o" for line in figure.axes[2].lines)
