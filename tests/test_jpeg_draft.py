"""`train.jpeg_draft`, from the configuration to the batch: other pixels of large JPEGs, and nothing else."""

import dataclasses

import numpy as np
import pytest
import tiny
from image_files import encode
from PIL import Image
from pipelines import MODEL, iterator

from uhd_jax.config import DataConfig, RunConfig, TrainConfig
from uhd_jax.data.sources import Records
from uhd_jax.training.batches import make_batches


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_only_pixels_of_large_jpegs_change(format):
    pixels = np.random.default_rng(0).integers(0, 256, (480, 480, 3), np.uint8)
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Noise."}]
    source = Records([{"messages": turns, "images": [encode(Image.fromarray(pixels), format)]}])
    found = []
    for draft in (False, True):
        batches = iterator(source, max_slices=1, train={"jpeg_draft": draft, "packing_window": 4})
        found.append(next(batches)[0])
        batches.close()
    whole, draft = found
    for field in dataclasses.fields(whole):
        same = np.array_equal(getattr(whole, field.name), getattr(draft, field.name))
        assert same == (field.name != "patches" or format == "PNG")
    assert np.abs(whole.patches.astype(int) - draft.patches).mean() < 20  # noise, averaged in other ways


def test_the_log_of_a_run_says_so_once(caplog, tmp_path):
    stage = tiny.stage(data=DataConfig("size_mix", {"samples": 8}), packed_length=4096, max_slices=1)
    config = RunConfig("draft", MODEL, TrainConfig(stages=(stage,), jpeg_draft=True))
    for workdir in (None, tmp_path):  # a run looks at the data of all stages before the first begins
        with make_batches(config, 0, workdir):
            pass
    assert caplog.text.count("train.jpeg_draft is on") == 1
