"""How full rows are: the recipe's packed lengths on photographs, page scans and log-uniform sizes in equal parts."""

import dataclasses

import pytest

from uhd_jax.analysis import data_stats
from uhd_jax.config import DataConfig, DecoderConfig, ModelConfig, StageConfig, TrainConfig, from_config_dict
from uhd_jax.config.presets import QWEN3_8B
from uhd_jax.data.index import open_index
from uhd_jax.data.sources import make_source
from uhd_jax.data.sources.size_mix import KINDS, draw_sizes
from uhd_jax.training.stages import recipe

MIX = DataConfig("size_mix", {"samples": 1500})
MODEL = ModelConfig(decoder=DecoderConfig(**QWEN3_8B))


@pytest.fixture(scope="module")
def index():
    return open_index(MIX, [MODEL.chat])[0]


@pytest.mark.parametrize(("name", "length"), [("stage1", 1700), ("stage2", 8192), ("stage3", 10240), ("stage4", 4900)])
def test_four_programs_of_the_recipe_are_filled(index, name, length, monkeypatch):
    """The same with 12,000 samples and 64 rows, by a command: docs/data.md."""
    stages = [from_config_dict(stage, StageConfig, "stage") for stage in recipe("in_house", [MIX.__dict__] * 4, 16)]
    (stage,) = (stage for stage in stages if stage.name == name)
    monkeypatch.setattr(data_stats, "PACKED", 2500)
    data = data_stats.StageData(index, stage, MODEL, TrainConfig(stages=(stage,)))
    fit = data.fit()
    waste = data.waste(fit)
    assert stage.packed_length == length and len(fit.buckets) <= 4 and waste.rows >= 100
    assert fit.counters == {} and fit.kept.all()
    assert 1 - waste.tokens >= 0.95 and 1 - waste.slots >= 0.90 and 1 - waste.patches >= 0.88


def test_the_mix_is_of_equal_parts_and_its_images_have_the_sizes_announced():
    assert all(draw_sizes(kind, 50) == draw_sizes(kind, 50) != draw_sizes(kind, 50, seed=1) for kind in KINDS)
    source = make_source(dataclasses.replace(MIX, options={"samples": 31}))
    drawn = [draw_sizes(kind, 11) for kind in KINDS]
    assert [source.sizes(i)[0] for i in range(31)] == [drawn[i % 3][i // 3] for i in range(31)]
    assert source.images(2)[0].shape == (*source.sizes(2)[0], 3)
    assert max(max(size) / min(size) for size in drawn[2]) <= 10
    answers = [source.messages(i)[1].parts[0] for i in range(31)]
    assert len(set(map(len, answers))) > 15 and answers == [source.messages(i)[1].parts[0] for i in range(31)]
