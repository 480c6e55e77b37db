"""Start-up weights: a tower, a language model and VDIM in the layouts of others become one model to train."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoints import abstract, assert_same_tree, exported, write_checkpoint
from tiny import random_params

import uhd_jax
from uhd_jax import cli
from uhd_jax.checkpoint import load_model
from uhd_jax.config import (
    ChatConfig,
    CompressorConfig,
    ConnectorConfig,
    DecoderConfig,
    ModelConfig,
    PyramidConfig,
    SlicingConfig,
    TowerConfig,
)
from uhd_jax.config.presets import VICUNA_CHAT
from uhd_jax.convert.families import family_named
from uhd_jax.convert.tables import ConvertError, flatten
from uhd_jax.data.tokenizer import byte_tokenizer
from uhd_jax.models import uhd
from uhd_jax.training.start import combine, marks

pytestmark = pytest.mark.usefixtures("unoptimised")

# A tokenizer of 261 ids, of which the last is a mark of the language model's own; four rows are spare.
WORDS = ChatConfig(
    placeholder="<|image_pad|>",
    **dict.fromkeys(("image_start", "image_end", "slice_start", "slice_end"), "<|im_end|>"),
    **dict.fromkeys(("image_id_start", "image_id_end"), "<|im_end|>"),
)
DECODER = DecoderConfig(vocab_size=266, width=32, mlp_width=24, layers=2, heads=4, kv_heads=2, head_dim=8, qk_norm=True)
V4 = ModelConfig(
    decoder=dataclasses.replace(DECODER, vocab_size=270),
    tower=TowerConfig(width=16, mlp_width=24, layers=3, heads=2, patch_size=2, table_side=7),
    compressor=CompressorConfig(after_layer=1),
    slicing=SlicingConfig(scale_resolution=16, max_slices=2),
    dtype="float32",
)
V2 = ModelConfig(
    decoder=dataclasses.replace(DECODER, qk_norm=False, vocab_size=30_000, norm_eps=1e-5, rope_theta=1e4),
    tower=TowerConfig(
        "clip", width=16, mlp_width=24, layers=3, heads=2, patch_size=2, table_side=4, norm_eps=1e-5, skipped_layers=1
    ),
    compressor=CompressorConfig("none"),
    connector=ConnectorConfig("hiwin", heads=4, query_side=2, pyramid=PyramidConfig(5)),
    slicing=SlicingConfig(rule="v1", scale_resolution=8, max_slices=2),
    chat=ChatConfig(**VICUNA_CHAT, layout="A"),
    dtype="float32",
)


def _source(folder: Path, name: str, config: ModelConfig, tokenizer: ChatConfig | None = None) -> tuple[Path, dict]:
    """A checkpoint of random numbers in the layout of a family, and its parameters."""
    family = family_named(name)
    params = random_params(abstract(family, config))
    write_checkpoint(folder, exported(family, config, params), None, shards=2)
    family.write_files(config, None, folder)
    if tokenizer is not None:
        byte_tokenizer(tokenizer).save(folder)
    return folder, params


def _fresh(config: ModelConfig, seed: int) -> dict:
    """Random parameters as training begins with."""
    return jax.jit(lambda: uhd.init_params(config, jax.random.key(seed)))()


def _assert_close(ours: dict, theirs: dict) -> None:
    """Equal but for the last bit, which another program may round otherwise."""
    ours, theirs = flatten(ours), flatten(theirs)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        np.testing.assert_allclose(leaf, theirs[path], rtol=1e-6, atol=1e-8, err_msg=path)


def _siglip(folder: Path) -> tuple[Path, dict]:
    alone = dataclasses.replace(V4, compressor=CompressorConfig("none"), mode="4x")
    return _source(folder, "siglip", dataclasses.replace(alone, tower=dataclasses.replace(V4.tower, table_side=3)))


def _qwen3(folder: Path, **changes) -> tuple[Path, dict]:
    config = dataclasses.replace(V4, decoder=dataclasses.replace(DECODER, **changes))
    return _source(folder, "qwen3", config, WORDS)


@pytest.fixture(scope="module")
def v4(tmp_path_factory):
    """(the tower's parameters, the decoder's, folder of the model, what `combine` says)."""
    folder = tmp_path_factory.mktemp("v4")
    tower, tower_params = _siglip(folder / "tower")
    decoder, decoder_params = _qwen3(folder / "decoder")
    done = combine(V4, folder / "start", tower, decoder, seed=3)
    return tower_params["tower"], decoder_params["decoder"], folder / "start", done


def test_what_is_taken_what_is_made_and_what_is_said(v4):
    tower, decoder, folder, done = v4
    params, config = load_model(folder)
    assert dataclasses.replace(config, chat=V4.chat) == V4
    assert config.decoder.max_positions == 40_960  # of the language model's files
    fresh = _fresh(V4, 3)
    assert {path: leaf.shape for path, leaf in flatten(params).items()} == {
        path: leaf.shape for path, leaf in flatten(fresh).items()
    }
    assert {leaf.dtype for leaf in flatten(params).values()} == {np.dtype(np.float32)}
    for name in ("layers", "patch_embedding", "final_norm"):
        assert_same_tree(params["tower"][name], tower[name])
    for name in ("layers", "final_norm"):
        assert_same_tree(params["decoder"][name], decoder[name])
    _assert_close(params["connector"], fresh["connector"])
    _assert_close(params["tower"]["compressor"], uhd.start_compressor(params, V4)["tower"]["compressor"])
    assert done == {
        "tower": "siglip",
        "decoder": "qwen3",
        "position_table": {"from": [3, 3], "to": [7, 7]},
        "added_marks": ["<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>"],
        "new_rows": 8,
        "parameters": sum(leaf.size for leaf in flatten(fresh).values()),
    }


def test_the_position_table_is_resized_as_torch_does(v4):
    torch = pytest.importorskip("torch")
    tower, _, folder, _ = v4
    table = torch.tensor(np.asarray(tower["position_table"])).reshape(1, 3, 3, -1).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(table, size=(7, 7), mode="bicubic", align_corners=False)
    ours = load_model(folder)[0]["tower"]["position_table"]
    np.testing.assert_allclose(ours, resized[0].permute(1, 2, 0).reshape(49, -1).numpy(), atol=1e-5, rtol=0)


def test_new_marks_begin_as_the_mean(v4):
    """262 ids are the tokenizer's; 262 to 267 become marks; from 266 on the checkpoint has no rows."""
    _, decoder, folder, _ = v4
    params = load_model(folder)[0]["decoder"]
    for name, axis in (("embedding", 0), ("head", 1)):
        old, new = (np.moveaxis(np.asarray(tree[name]), axis, 0) for tree in (decoder, params))
        known = 262
        assert old.shape == (266, 32) and new.shape == (270, 32)
        np.testing.assert_array_equal(new[:known], old[:known])
        np.testing.assert_allclose(new[known:], np.broadcast_to(old[:known].mean(0), (8, 32)), atol=1e-6)


def test_the_result_answers_and_its_tokenizer_has_the_marks(v4):
    model = uhd_jax.load(v4[2])
    assert model.tokenizer.special("</image_id>") == 267
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    prepared = model.prepare("What?", [image])
    assert np.isfinite(model.logits(prepared.token_ids, [image])).all()


def test_clip_vicuna_and_vdim(tmp_path):
    tower, tower_params = _source(tmp_path / "tower", "clip", V2)
    decoder, decoder_params = _source(tmp_path / "decoder", "llama", V2, V2.chat)
    upsampler, upsampler_params = _source(tmp_path / "upsampler", "vdim", V2)
    done = combine(V2, tmp_path / "start", tower, decoder, upsampler)
    params, _ = load_model(tmp_path / "start")
    assert_same_tree(params["tower"], tower_params["tower"])
    assert_same_tree(params["decoder"], decoder_params["decoder"])
    assert_same_tree(params["connector"]["upsampler"], upsampler_params["connector"]["upsampler"])
    fresh = _fresh(V2, 0)["connector"]
    _assert_close(params["connector"] | {"upsampler": {}}, fresh | {"upsampler": {}})
    assert done["added_marks"] == [] and done["new_rows"] == 0


def test_the_class_token_keeps_its_position(tmp_path):
    config = dataclasses.replace(V2, tower=dataclasses.replace(V2.tower, table_side=3))
    tower, tower_params = _source(tmp_path / "tower", "clip", config)
    decoder, _ = _source(tmp_path / "decoder", "llama", V2, V2.chat)
    combine(V2, tmp_path / "start", tower, decoder)
    there, here = tower_params["tower"]["position_table"], load_model(tmp_path / "start")[0]["tower"]["position_table"]
    assert there.shape == (10, 16) and here.shape == (17, 16)
    np.testing.assert_array_equal(here[0], there[0])


def test_a_tower_of_a_whole_model(tmp_path):
    whole, params = _source(tmp_path / "whole", "llava_uhd_v4_research", dataclasses.replace(V4, decoder=DECODER))
    decoder, _ = _qwen3(tmp_path / "decoder")
    plain = dataclasses.replace(V4, compressor=CompressorConfig("none"), connector=ConnectorConfig(rounds=2))
    done = combine(plain, tmp_path / "start", whole, decoder)
    assert done["tower"] == "llava_uhd_v4_research"
    made, _ = load_model(tmp_path / "start")
    assert set(made["tower"]) == set(params["tower"]) - {"compressor"}
    assert_same_tree(made["tower"]["layers"], params["tower"]["layers"])
    np.testing.assert_array_equal(made["tower"]["position_table"], params["tower"]["position_table"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tower": {"width": 32}}, r"tower is not the config's tower \(model.tower.width: 16 there, 32 here\)$"),
        ({"tower": {"layers": 4, "norm_eps": 1e-5}}, r"tower.layers: 3 there, 4 here; tower.norm_eps: 1e-06 there"),
        ({"decoder": {"heads": 8}}, r"decoder is not the config's decoder \(model.decoder.heads: 4 there, 8 here\)$"),
        ({"decoder": {"tied_head": True}}, r"decoder.tied_head: False there, True here"),
        ({"decoder": {"vocab_size": 260}}, r"vocab_size: 260 in the config; .*decoder has 266 rows.* 268 ids; set 268"),
        (
            {"decoder": {"vocab_size": 267}},
            r"267 in the config; .*the added marks <image>, .* 268 ids; set 268 or more",
        ),
    ],
)
def test_sizes_that_are_not_the_configs(change, message, tmp_path):
    tower, _ = _siglip(tmp_path / "tower")
    decoder, _ = _qwen3(tmp_path / "decoder")
    parts = {part: dataclasses.replace(getattr(V4, part), **values) for part, values in change.items()}
    with pytest.raises(ConvertError, match=message):
        combine(dataclasses.replace(V4, **parts), tmp_path / "start", tower, decoder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decoder", "tower"]


def test_what_is_not_there(tmp_path):
    tower, _ = _siglip(tmp_path / "tower")
    decoder, _ = _qwen3(tmp_path / "decoder", layers=1)
    config = dataclasses.replace(V4, decoder=dataclasses.replace(V4.decoder, layers=1))
    with pytest.raises(ConvertError, match="decoder is of the family qwen3, which holds no tower"):
        combine(config, tmp_path / "start", decoder, decoder)
    with pytest.raises(ConvertError, match="tower is of the family siglip, which holds no decoder"):
        combine(config, tmp_path / "start", tower, tower)
    with pytest.raises(ConvertError, match="family siglip, which holds no connector/upsampler"):
        combine(config, tmp_path / "start", tower, decoder, tower)
    (tmp_path / "decoder" / "tokenizer.json").unlink()
    with pytest.raises(ConvertError, match="neither tokenizer.json nor tokenizer.model"):
        combine(config, tmp_path / "start", tower, decoder)
    (tmp_path / "decoder" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConvertError, match="names files that are not there: model-00002"):
        combine(config, tmp_path / "start", tower, decoder)


def test_vdim_of_another_width_or_height(tmp_path):
    tower, _ = _source(tmp_path / "tower", "clip", V2)
    decoder, _ = _source(tmp_path / "decoder", "llama", V2, V2.chat)
    other = dataclasses.replace(V2, connector=dataclasses.replace(V2.connector, pyramid=PyramidConfig(3)))
    upsampler, _ = _source(tmp_path / "upsampler", "vdim", other)
    with pytest.raises(
        ConvertError, match=r"not the config's up-sampler \(mask 5, tower of width 16\).*up2/.*none there"
    ):
        combine(V2, tmp_path / "start", tower, decoder, upsampler)


def test_the_command(tmp_path, capsys):
    tower, _ = _siglip(tmp_path / "tower")
    decoder, _ = _qwen3(tmp_path / "decoder")
    (tmp_path / "plain.py").write_text(CONFIG)
    arguments = ["--config", str(tmp_path / "plain.py"), "--tower", str(tower), "--decoder", str(decoder)]
    out = str(tmp_path / "start")
    assert cli.main(["convert", "combine", *arguments, "--seed=3", "--json", out]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["tower"] == "siglip" and done["new_rows"] == 8
    _assert_close(load_model(out)[0]["connector"], _fresh(V4, 3)["connector"])
    assert cli.main(["convert", "combine", *arguments, out]) == 1
    assert "start is not empty" in capsys.readouterr().err


CONFIG = """
from ml_collections import ConfigDict

def get_config(arg=""):
    return ConfigDict({
        "name": "tiny",
        "model": {
            "decoder": {
                "vocab_size": 270, "width": 32, "mlp_width": 24, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8,
                "qk_norm": True,
            },
            "tower": {"width": 16, "mlp_width": 24, "layers": 3, "heads": 2, "patch_size": 2, "table_side": 7},
            "compressor": {"after_layer": 1},
            "slicing": {"scale_resolution": 16, "max_slices": 2},
            "dtype": "float32",
        },
        "train": {"stages": [{
            "name": "one", "data": {"source": "records", "options": {"path": "x"}},
            "steps": 1, "rows": 8, "packed_length": 64,
            "learning_rate": 1e-3, "learning_rate_min": 1e-3, "trainable": ("connector",),
        }]},
    })
"""


def test_a_full_destination_is_left_alone(tmp_path):
    tower, _ = _siglip(tmp_path / "tower")
    decoder, _ = _qwen3(tmp_path / "decoder")
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "notes.txt").write_text("mine")
    with pytest.raises(ConvertError, match="start is not empty"):
        combine(V4, tmp_path / "start", tower, decoder)
    assert [path.name for path in (tmp_path / "start").iterdir()] == ["notes.txt"]


def test_marks_of_the_prompts():
    assert marks(V2.chat) == ("<unk>", "</s>", "<s>")
    assert "<|im_start|>" in marks(V4.chat) and "<image_id>" in marks(V4.chat)
    assert "<image_id>" not in marks(dataclasses.replace(V4.chat, use_image_id=False))
