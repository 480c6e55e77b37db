"""LLaVA-UHD v4's own checkpoints, the paper's form and the post-ViT baseline, and VDIM's files."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import abstract, assert_same_tree, exported, random_tensors, read_checkpoint, write_checkpoint
from golden_v4 import GOLDEN, load, padded_views, split_views

import uhd_jax
from uhd_jax.analysis.verify import VerifyError, verify
from uhd_jax.config import CompressorConfig, ConnectorConfig, DecoderConfig, ModelConfig
from uhd_jax.config.presets import QWEN3_8B
from uhd_jax.convert.families import family_named
from uhd_jax.convert.tables import ConvertError, flatten, match_back
from uhd_jax.models import uhd
from uhd_jax.models.pyramid import Pyramid

pytestmark = pytest.mark.usefixtures("unoptimised")
WHOLE = GOLDEN / "v4_full_qwen3_16x"


def _research_name(name: str) -> str:
    """Of a tensor of MiniCPM-V 4.6."""
    for pattern, theirs in (
        (r"model\.vision_tower\.vit_merger\.", "vit_merger."),
        (r"model\.vision_tower\.", "vpm."),
        (r"model\.merger\.mlp\.(\d)\.linear_1\.", r"resampler.mlp.\1.mlp.0."),
        (r"model\.merger\.mlp\.(\d)\.linear_2\.", r"resampler.mlp.\1.mlp.2."),
        (r"model\.merger\.mlp\.", "resampler.mlp."),
        (r"model\.language_model\.", "llm.model."),
        (r"lm_head\.", "llm.lm_head."),
    ):
        new, found = re.subn(f"^{pattern}", theirs, name)
        if found:
            return new
    raise AssertionError(name)


def _fields(**changes) -> dict:
    """config.json: the language model's fields among the others."""
    theirs = json.loads((WHOLE / "config.json").read_text())
    vision = {key: value for key, value in theirs["vision_config"].items() if key != "insert_layer_id"}
    return theirs["text_config"] | {
        "architectures": ["MiniCPMV"],
        "model_type": "minicpmv",
        "insert_layer_id": theirs["insert_layer_id"],
        "vision_config": vision,
        "slice_config": {"max_slice_nums": 9, "patch_size": 14, "scale_resolution": 112},
        "use_image_id": True,
        "torch_dtype": "float32",
        **changes,
    }


def _copies() -> dict[str, np.ndarray]:
    """What the compressor was made of, still beside it."""
    shapes = {"layer_norm2.weight": (32,), "layer_norm2.bias": (32,), "mlp.fc1.weight": (44, 32)}
    shapes |= {"mlp.fc1.bias": (44,), "mlp.fc2.weight": (32, 44), "mlp.fc2.bias": (32,)}
    return random_tensors({f"vit_merger.{name}": shape for name, shape in shapes.items()})


def _paper() -> dict[str, np.ndarray]:
    return {_research_name(n): tensor for n, tensor in load(WHOLE.name, "model").items()} | _copies()


def _baseline() -> dict[str, np.ndarray]:
    vision = {f"model.{n}": tensor for n, tensor in load("v4_vision_16x_times2", "weights").items()}
    text = {n: t for n, t in load(WHOLE.name, "model").items() if "language_model" in n or n.startswith("lm_head")}
    return {_research_name(n): tensor for n, tensor in (vision | text).items() if "vit_merger" not in n}


def _write(folder: Path, tensors: dict[str, np.ndarray], fields: dict) -> Path:
    write_checkpoint(folder, tensors, fields, shards=2)
    shutil.copyfile(WHOLE / "tokenizer.json", folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"unk_token": "<|image_pad|>"}))
    return folder


def test_the_papers_form_answers_as_its_golden_model(tmp_path):
    model, io = uhd_jax.load(_write(tmp_path, _paper(), _fields())), load(WHOLE.name, "io")
    images = sorted(WHOLE.glob("image_*.png"))
    assert model.config.compressor == CompressorConfig("window_attention_reused_mlp", 1)
    np.testing.assert_array_equal(model.prepare("What is this?", images).token_ids, io["input_ids"][0])
    ours = model.logits(io["input_ids"][0], images)
    np.testing.assert_allclose(ours, io["logits_f64"][0], atol=1e-4, rtol=0)


def test_the_baseline_computes_the_golden_features(tmp_path):
    family, config, params = read_checkpoint(_write(tmp_path, _baseline(), _fields(insert_layer_id=-1)))
    assert family.name == "llava_uhd_v4_research"
    assert (config.compressor.kind, config.connector.rounds, config.mode) == ("none", 2, "16x")
    inputs, golden = load("v4_vision_16x_times2", "inputs"), load("v4_vision_16x_times2", "outputs")
    grids = inputs["target_sizes"]
    patches = padded_views(split_views(inputs["pixel_values"], grids), grids, 2, room=128)
    run = jax.jit(uhd.tower(config).apply, static_argnames=("levels", "compress"))
    features, _ = run({"params": params["tower"]}, patches, jnp.asarray(grids), levels=2, compress=True)
    tokens = uhd.connector(config).apply({"params": params["connector"]}, features)
    for index, grid in enumerate(grids):
        expected = golden[f"features_view_{index}"]
        np.testing.assert_allclose(tokens[index, : np.prod(grid) // 16], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["paper", "baseline"])
def test_there_and_back(form, tmp_path):
    tensors, layer = (_paper(), 1) if form == "paper" else (_baseline(), -1)
    source = _write(tmp_path / "source", tensors, _fields(insert_layer_id=layer))
    family, config, params = read_checkpoint(source)
    back = exported(family, config, params)
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in tensors.items()}
    for n, tensor in back.items():
        np.testing.assert_array_equal(tensor, 0 * tensor if n in _copies() else tensors[n], err_msg=n)
    out = write_checkpoint(tmp_path / "out", back, None)
    family.write_files(config, source, out)
    again, same, same_params = read_checkpoint(out)
    assert again.name == family.name
    assert same == dataclasses.replace(config, chat=dataclasses.replace(config.chat, tokenizer=str(out)))
    assert_same_tree(same_params, params)


def test_a_hybrid_decoder_has_no_place_in_the_layout(tmp_path):
    _, config, _ = read_checkpoint(GOLDEN / "v4_full_qwen35_16x")
    with pytest.raises(ConvertError, match="decoder: the layout has Llama, Qwen2 or Qwen3, the model Qwen3.5"):
        family_named("llava_uhd_v4_research").write_files(config, None, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["paper", "baseline"])
def test_verify_runs_it_as_minicpm_v_4_6(form, tmp_path):
    pytest.importorskip("transformers")
    tensors, layer = (_paper(), 1) if form == "paper" else (_baseline(), -1)
    source = _write(tmp_path / "source", tensors, _fields(insert_layer_id=layer))
    report = verify(source, source, prompts=["What is this?"])
    assert report.problem is None and report.summary()["parts"] == ["model"] and report.comparisons[0].images == 2
    name = "resampler.mlp.0.mlp.0.weight"
    wrong = _write(tmp_path / "wrong", tensors | {name: tensors[name][::-1]}, _fields(insert_layer_id=layer))
    assert "logits of 'What is this?' differ" in verify(source, wrong, prompts=["What is this?"]).problem


def test_files_without_a_place_for_the_compressor_mean_the_papers(tmp_path):
    """Training's flag is -1 by default; a checkpoint that holds the compressor had another."""
    fields = _fields()
    del fields["insert_layer_id"]
    tensors = _paper()
    for name in [name for name in tensors if ".layers.0." in name and name.startswith("vpm")]:
        for layer in range(5, 8):
            tensors[name.replace(".layers.0.", f".layers.{layer}.")] = tensors[name]
    fields["vision_config"]["num_hidden_layers"] = 8
    assert read_checkpoint(_write(tmp_path, tensors, fields))[1].compressor.after_layer == 6


def test_the_language_model_may_have_its_own_object(tmp_path):
    text = json.loads((WHOLE / "config.json").read_text())["text_config"]
    fields = {key: value for key, value in _fields().items() if key not in text} | {"model_type": "minicpmv"}
    _, config, _ = read_checkpoint(_write(tmp_path / "own", _paper(), fields | {"llm_config": text}))
    _, expected, _ = read_checkpoint(_write(tmp_path / "flat", _paper(), _fields()))
    assert config.decoder == expected.decoder and config.decoder.qk_norm


@pytest.mark.parametrize("extra", ["vit_merger.layer_norm3.weight", "vit_merger.mlp.fc3.bias", "vpm.head.weight"])
def test_nothing_but_the_copies_is_dropped(extra, tmp_path):
    with pytest.raises(ConvertError, match=f"unexpected {extra}"):
        read_checkpoint(_write(tmp_path, _paper() | {extra: np.ones(3, np.float32)}, _fields()))


@pytest.mark.parametrize(("rounds", "total", "copies"), [(1, 8_753_160_624, 6), (2, None, 0)])
def test_full_size(rounds, total, copies):
    family = family_named("llava_uhd_v4_research")
    inserted = "window_attention_reused_mlp" if rounds == 1 else "none"
    config = ModelConfig(
        decoder=DecoderConfig(**QWEN3_8B),
        compressor=CompressorConfig(inserted),
        connector=ConnectorConfig(rounds=rounds),
    )
    moves = match_back(family.table(config), flatten(abstract(family, config)))
    shapes = {move.name: move.shape for move in moves}
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    assert total is None or count == total
    assert shapes[f"resampler.mlp.{rounds - 1}.mlp.2.weight"] == (4096, 4608)
    assert (rounds == 1) == ("vit_merger.linear_1.weight" in shapes)
    filled = family.filled(config)
    assert len(filled) == copies and not set(filled) & set(shapes)
    assert sum(int(np.prod(shape)) for shape in filled.values()) == (9_924_176 if copies else 0)


# VDIM


def _lightning() -> dict[str, np.ndarray]:
    """As golden c's up-sampler, with all else that the pre-training saves (names of golden d)."""
    with np.load(GOLDEN / "c_v2_jbu4x.npz") as stored:
        tensors = {"upsampler." + n.removeprefix("sd/"): stored[n] for n in stored.files if n.startswith("sd/")}
    with np.load(GOLDEN / "d_v2_mlr_loss.npz") as stored:
        names = {n.removeprefix("sd/"): stored[n] for n in stored.files if n.startswith("sd/")}
    others = {n: tensor for n, tensor in names.items() if not n.startswith("upsampler.")}
    assert set(names) - set(others) == set(tensors) and len(others) > 10
    clip = {"model.0.vision_tower.vision_model.post_layernorm.bias": np.ones(3, np.float32)}
    return tensors | others | clip | {f"validation_{n}": tensor for n, tensor in clip.items()}


def _check_vdim(params: dict) -> None:
    with np.load(GOLDEN / "c_v2_jbu4x.npz") as golden:
        cells, image, expected = golden["lowres_3x5"], golden["img_3x5"], golden["feat4x_3x5"]
    patches = image.reshape(3, 3, 14, 5, 14).transpose(1, 3, 0, 2, 4).reshape(1, 15, 588)
    module = Pyramid(ConnectorConfig("hiwin", pyramid=uhd_jax.config.PyramidConfig(7)).pyramid, jnp.float32)
    levels = jax.jit(module.apply)(
        {"params": params["connector"]["upsampler"]},
        cells[0].reshape(1, 6, 15).swapaxes(1, 2),
        jnp.array([[3, 5]]),
        patches,
    )
    np.testing.assert_allclose(levels[2][0][0], expected[0].reshape(6, -1).T, atol=2e-5, rtol=0)


def test_a_lightning_file(tmp_path):
    torch = pytest.importorskip("torch")
    state = {name: torch.tensor(tensor) for name, tensor in _lightning().items()}
    file = tmp_path / "clip-large-vdim.ckpt"
    torch.save({"state_dict": state, "epoch": 0, "global_step": 2000, "hyper_parameters": {"lr": 1e-3}}, file)
    family, config, params = read_checkpoint(file, allow_pickle=True)
    assert family.name == "vdim" and config.connector.pyramid.levels == (0, 1, 2) and config.tower.width == 6
    assert set(params) == {"connector"} and set(params["connector"]) == {"upsampler"}
    _check_vdim(params)


def test_vdim_there_and_back(tmp_path):
    tensors = _lightning()
    family, config, params = read_checkpoint(write_checkpoint(tmp_path / "source", tensors, None))
    back = exported(family, config, params)
    assert set(back) == {name for name in tensors if name.startswith("upsampler.")}
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)
    again, same, same_params = read_checkpoint(write_checkpoint(tmp_path / "out", back, None))
    assert (again.name, same) == ("vdim", config)
    assert_same_tree(same_params, params)
    with pytest.raises(VerifyError, match="transformers has no class for vdim; import and export are exact"):
        verify(tmp_path / "source", tmp_path / "out")
    assert sum(tensor.size for tensor in back.values()) == 1_062_066 - 1024 * 1025 + 6 * 7


def test_vdim_with_something_else(tmp_path):
    tensors = _lightning() | {"upsampler.model.weight": np.ones(3, np.float32)}
    with pytest.raises(ConvertError, match=r"unexpected upsampler.model.weight \(3,\)$"):
        read_checkpoint(write_checkpoint(tmp_path, tensors, None))


def test_a_file_without_a_config(tmp_path):
    with pytest.raises(ConvertError, match="there is no config.json, and the tensors' names are of no known file"):
        read_checkpoint(write_checkpoint(tmp_path, {"up.weight": np.ones(3, np.float32)}, None))
