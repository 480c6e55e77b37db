"""The configuration file for records of one's own."""

import json
from pathlib import Path

import pytest
from image_files import photo

from uhd_jax.cli import configs
from uhd_jax.config import ConfigError
from uhd_jax.data.pipeline import make_iterator
from uhd_jax.data.sources import make_source

FILE = Path(__file__).parents[1] / "configs" / "records.py"


def test_it_trains_on_a_file_named_after_the_colon(tmp_path):
    photo(300, 450).save(tmp_path / "a.png")
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What changed?"}]},
        {"role": "assistant", "content": "Nothing."},
    ]
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"images": ["a.png", "a.png"], "messages": turns}) + "\n")
    config = configs.load([f"--config={FILE}:{path}"])
    (stage,) = config.train.stages
    assert stage.max_slices == config.model.slicing.max_slices  # else answers would see finer grids than the training
    batches = make_iterator(stage, config.model, config.train, make_source(stage.data))
    _, info = next(batches)
    batches.close()
    # Two images in 2 x 2 slices and a thumbnail each, in every row.
    assert (info.samples, info.views) == (stage.rows, stage.rows * 2 * 5) and not any(info.counters.values())


def test_without_a_file_it_says_what_to_write():
    with pytest.raises(ConfigError, match=r"configs/records\.py:data/train\.jsonl"):
        configs.load([f"--config={FILE}"])
