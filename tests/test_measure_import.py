"""The measurement of an import, of a small model; its figures at full size are in docs/convert.md."""

import json
import math
import sys

import jax

from uhd_jax.analysis import measure_import
from uhd_jax.config import ChatConfig, CompressorConfig, ConnectorConfig, DecoderConfig, ModelConfig, TowerConfig
from uhd_jax.config.presets import VICUNA_7B, VICUNA_CHAT

SMALL = ModelConfig(
    decoder=DecoderConfig(vocab_size=32_000, width=128, mlp_width=200, layers=3, heads=4, kv_heads=4, head_dim=32),
    tower=TowerConfig("clip", 64, 96, 2, 1, 14, 24, norm_eps=1e-5, skipped_layers=1),
    compressor=CompressorConfig("none"),
    connector=ConnectorConfig("spatial_resampler", query_side=12),
    chat=ChatConfig(**VICUNA_CHAT, layout="A"),
)


def test_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure_import, "model_of_size", lambda nbytes: SMALL)
    monkeypatch.setattr(sys, "argv", ["measure_import", f"--folder={tmp_path / 'new'}", "--dtype=as-is"])
    measure_import.main()
    figures = json.loads(capsys.readouterr().out)
    leaves = jax.tree.leaves(measure_import.abstract_of(SMALL))
    assert figures["parameters"] == sum(math.prod(leaf.shape) for leaf in leaves)
    assert figures["checkpoint_bytes"] == 2 * figures["parameters"] <= figures["made_bytes"]
    assert figures["largest_stacked_bytes"] == 2 * max(math.prod(leaf.shape) for leaf in leaves)
    assert 50e6 < figures["peak_bytes"] < figures["allowed_bytes"] == figures["largest_stacked_bytes"] + 2**30
    assert figures["import_seconds"] > 0 < figures["copy_seconds"] and figures["import_processor_seconds"] > 0
    assert figures["import_to_copy"] > 0 < figures["import_processor_seconds_per_gb"]
    assert list(tmp_path.iterdir()) == []


def test_sizes():
    assert measure_import.model_of_size(10**9).decoder.layers == 1
    assert 10 < measure_import.model_of_size(6 * 2**30).decoder.layers < 16
    whole = measure_import.model_of_size(14 * 2**30)
    assert whole.decoder == DecoderConfig(**VICUNA_7B)
