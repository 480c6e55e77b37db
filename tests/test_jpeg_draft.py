"""`train.jpeg_draft`, from the configuration to the batch: other pixels of large JPEGs, and nothing else."""

import dataclasses

import numpy as np
import pytest
from image_files import encode
from PIL import Image
from test_pipeline import iterator

from uhd_jax.data.sources import Records


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_only_pixels_of_large_jpegs_change_and_the_log_says_so(caplog, format):
    pixels = np.random.default_rng(0).integers(0, 256, (480, 480, 3), np.uint8)
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Noise."}]
    source = Records([{"messages": turns, "images": [encode(Image.fromarray(pixels), format)]}])
    found = []
    for draft in (False, True):
        batches = iterator(source, max_slices=1, train={"jpeg_draft": draft, "packing_window": 4})
        found.append(next(batches)[0])
        batches.close()
        assert ("train.jpeg_draft is on" in caplog.text) == draft
    whole, draft = found
    for field in dataclasses.fields(whole):
        same = np.array_equal(getattr(whole, field.name), getattr(draft, field.name))
        assert same == (field.name != "patches" or format == "PNG")
    assert np.abs(whole.patches.astype(int) - draft.patches).mean() < 20  # noise, averaged in other ways
