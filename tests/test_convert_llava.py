"""Whole checkpoints of LLaVA-UHD v1 and v2 with the official names, fields and file split, through `uhd_jax.load`."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import abstract, assert_same_tree, exported, random_tensors, read_checkpoint, write_checkpoint

import uhd_jax
from uhd_jax.analysis.verify import verify
from uhd_jax.checkpoint import save_model
from uhd_jax.config import ChatConfig, ConnectorConfig, DecoderConfig, ModelConfig, PyramidConfig, TowerConfig
from uhd_jax.config.presets import CLIP_L_14_336, QWEN2_7B, QWEN2_CHAT, VICUNA_7B, VICUNA_13B, VICUNA_CHAT
from uhd_jax.convert.families import family_named
from uhd_jax.convert.llava_uhd import PROJECTOR, TOWER
from uhd_jax.convert.tables import ConvertError, flatten, match_back
from uhd_jax.convert.towers import clip_shapes
from uhd_jax.convert.transfer import export_model
from uhd_jax.data.tokenizer import byte_tokenizer
from uhd_jax.models import uhd
from uhd_jax.models.patches import normalise_patches
from uhd_jax.slicing.pixels import cut_views

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("unoptimised")

GOLDEN = Path(__file__).parent / "golden"
COPY = f"{PROJECTOR}upsampler.model.0.vision_tower.vision_model."
TEXT = dict(
    vocab_size=32_000,  # separators are the Llama ids of "," and newline
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_theta=10_000.0,
)
COMMON = {
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_vision_select_layer": -2,
    "mm_projector_type": "adapt_spatial_resampler",
    "torch_dtype": "float32",
}
# name -> (golden file, prefix of its tensors, width of the tower, fields of config.json, kind of language model)
CASES = {
    "v1": ("a_v1_resampler.npz", "sd/", 24, {"mm_hidden_size": 24}, "llama"),
    "v2 with feature_mode": (
        "e_v2_hiwin.npz",
        "sd7/",
        8,
        {"mm_hidden_size": 8, "feature_mode": "featup_muti_res", "feature_scale_mask": 7},
        "llama",
    ),
    "v2 with model_mode": (
        "e_v2_hiwin.npz",
        "sd5/",
        8,
        {
            "mm_hidden_size": 8,
            "model_mode": "uhd_v2",
            "feature_scale_mask": 5,
            "mm_projector_type": "adapt_spatial_resampler_v2",
        },
        "qwen2",
    ),
}
every_case = pytest.mark.parametrize("name", CASES)


def _alive(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@functools.cache
def _clip(width: int):
    config = dict(hidden_size=width, intermediate_size=40, num_hidden_layers=3, num_attention_heads=1)
    return _alive(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**config, image_size=56, patch_size=14)))


@functools.cache
def _language_model(kind: str):
    name = {"llama": "Llama", "qwen2": "Qwen2"}[kind]
    return _alive(getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**TEXT)))


def _fields(name: str) -> dict:
    _, _, _, fields, kind = CASES[name]
    text = _language_model(kind).config.to_dict()
    for key in ("rope_parameters", "layer_types", "dtype"):  # transformers 4 has none of them
        text.pop(key, None)
    shown = {"llama": ("Llama", "llava_llama"), "qwen2": ("Qwen", "llava_qwen")}[kind]
    text |= {"architectures": [f"Llava{shown[0]}ForCausalLM"], "model_type": shown[1], "rope_theta": 1e4}
    return text | {"rope_scaling": None} | COMMON | fields


def _tensors(name: str) -> dict[str, np.ndarray]:
    """As the checkpoint of the original has them, the second CLIP and the unused queries included."""
    file, prefix, width, _, kind = CASES[name]
    with np.load(GOLDEN / file) as stored:
        tensors = {PROJECTOR + n.removeprefix(prefix): stored[n] for n in stored.files if n.startswith(prefix)}
    clip = {TOWER + n: t.numpy() for n, t in _clip(width).state_dict().items()}
    if name != "v1":
        tower = TowerConfig("clip", width=width, mlp_width=40, layers=3, heads=1, table_side=4)
        assert {n: t.shape for n, t in clip.items()} == clip_shapes(tower, TOWER)
        tensors |= random_tensors(clip_shapes(tower, COPY))
    return tensors | clip | {n: t.numpy() for n, t in _language_model(kind).state_dict().items()}


@pytest.fixture(scope="module", params=CASES)
def folder(request, tmp_path_factory):
    """(name, folder) of a checkpoint with a tokenizer."""
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, _tensors(request.param), _fields(request.param), shards=3)
    chat = VICUNA_CHAT if CASES[request.param][4] == "llama" else QWEN2_CHAT
    byte_tokenizer(ChatConfig(**chat)).save(path)
    return request.param, path


def test_what_the_files_say(folder):
    name, path = folder
    family, config, params = read_checkpoint(path)
    assert family.name == ("llava_uhd_v1" if name == "v1" else "llava_uhd_v2")
    assert config.tower == TowerConfig(
        "clip", width=CASES[name][2], mlp_width=40, layers=3, heads=1, table_side=4, norm_eps=1e-5, skipped_layers=1
    )
    assert config.slicing.rule == "v1" and config.slicing.scale_resolution == 56
    assert config.slicing.max_slices == (7 if name == "v1" else 9)
    assert config.slicing.pre_resize.long_side == 1024
    assert config.slicing.pre_resize.only_enlarge == (name == "v2 with feature_mode")
    assert config.chat.layout == ("B" if name == "v2 with feature_mode" else "A")
    assert config.chat.template == ("chatml" if CASES[name][4] == "qwen2" else "vicuna_v1")
    assert config.connector.kind == ("spatial_resampler" if name == "v1" else "hiwin")
    assert config.connector.queries == 16
    if name != "v1":
        assert config.connector.pyramid.feature_scale_mask == CASES[name][3]["feature_scale_mask"]
    assert set(params) == {"tower", "connector", "decoder"}


def test_the_connector_computes_the_golden_outputs(folder):
    name, path = folder
    _, config, params = read_checkpoint(path, connector={"heads": 4})
    with np.load(GOLDEN / CASES[name][0]) as golden:
        if name == "v1":
            views = [(golden["x_5x9"][0], (5, 9), np.zeros((45, 588)), golden["y_5x9"][0])]
        else:
            mask, views = CASES[name][3]["feature_scale_mask"], []
            for number, (rows, cols) in enumerate(golden["sizes_hw"]):
                cut = golden[f"img_{number}"].reshape(3, rows, 14, cols, 14).transpose(1, 3, 0, 2, 4)
                cells = golden[f"m{mask}_feats"][number, : rows * cols]
                views.append((cells, (rows, cols), cut.reshape(rows * cols, -1), golden[f"m{mask}_out"][number]))
    run = jax.jit(uhd.connector(config).apply)
    for cells, grid, patches, expected in views[:2]:
        ours = run(
            {"params": params["connector"]}, cells[None], jnp.array([grid]), jnp.asarray(patches[None], jnp.float32)
        )
        np.testing.assert_allclose(ours[0], expected, atol=2e-5, rtol=0)


def _expected_logits(name: str, model: uhd_jax.Assistant, ids: np.ndarray, image: np.ndarray, plan) -> np.ndarray:
    """transformers' CLIP, the connector, the visual block of spec v1-v2 section 4.3, transformers' decoder."""
    _, _, width, _, kind = CASES[name]
    views, run = [], jax.jit(uhd.connector(model.config).apply)
    for patches, view in zip(cut_views(image, plan, 14), plan.views, strict=True):
        rows, cols = view.patch_grid
        pixels = np.asarray(normalise_patches(jnp.asarray(patches), model.config.tower))
        picture = pixels.reshape(rows, cols, 3, 14, 14).transpose(2, 0, 3, 1, 4).reshape(1, 3, 14 * rows, 14 * cols)
        with torch.no_grad():
            out = _clip(width)(torch.tensor(picture), interpolate_pos_encoding=True, output_hidden_states=True)
        features = jnp.asarray(out.hidden_states[-2][:, 1:].numpy())
        params = {"params": model.params["connector"]}
        views.append(np.asarray(run(params, features, jnp.array([[rows, cols]]), pixels[None]))[0])
    overview, *slices = views
    language_model, (rows, cols) = _language_model(kind), plan.grid
    words = language_model.get_input_embeddings().weight.detach().numpy()
    comma, newline = words[29892], words[13]
    block = []
    if model.config.chat.layout == "A":
        for number, tokens in enumerate(slices):
            block += [*tokens, newline if (number + 1) % cols == 0 else comma]
    else:
        tiled = np.stack(slices).reshape(rows, cols, 4, 4, -1).transpose(0, 2, 1, 3, 4).reshape(rows * 4, cols * 4, -1)
        for row in tiled:
            block += [*row, newline]
        block.append(comma if cols > 1 else newline)
    block = np.stack([*block, *overview])
    placeholder = model.tokenizer.special(model.config.chat.placeholder)
    places = np.flatnonzero(ids == placeholder)
    assert places[-1] - places[0] + 1 == len(block)
    embedded = np.concatenate([words[ids[: places[0]]], block, words[ids[places[-1] + 1 :]]])
    with torch.no_grad():
        return language_model(inputs_embeds=torch.tensor(embedded)[None]).logits[0].numpy()


def test_logits_are_those_of_the_parts_put_together(folder):
    name, path = folder
    model = uhd_jax.load(path)
    image = np.random.default_rng(1).integers(0, 256, (90, 160, 3), np.uint8)
    prepared = model.prepare("What is this?", [image], max_slices=4)
    assert len(prepared.plans[0].slices) > 1
    ours = model.logits(prepared.token_ids, [image], max_slices=4)
    expected = _expected_logits(name, model, prepared.token_ids, image, prepared.plans[0])
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)


def test_verify_compares_what_transformers_has_classes_for(folder, tmp_path):
    name, path = folder
    report = verify(path, path)
    summary = report.summary()
    assert summary["parts"] == ["tower", "decoder"] and report.problem is None
    assert "the connector" in str(report) and len(summary["not_compared"]) == 2
    assert [c.part for c in report.comparisons] == ["tower"] * 4 + ["decoder"] * 3
    tensors = _tensors(name)
    wrong = f"{TOWER}encoder.layers.0.mlp.fc1.weight"
    write_checkpoint(tmp_path, tensors | {wrong: tensors[wrong][::-1]}, _fields(name))
    assert "features of 'image 1" in verify(path, tmp_path).problem


def test_a_pickle_is_the_same_checkpoint(tmp_path):
    tensors = {n: torch.tensor(t) for n, t in _tensors("v1").items()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(_fields("v1")))
    family, config, params = read_checkpoint(tmp_path, allow_pickle=True)
    assert family.name == "llava_uhd_v1"
    back = exported(family, config, params)
    assert back.keys() == tensors.keys()
    for n, tensor in back.items():
        np.testing.assert_array_equal(tensor, tensors[n].numpy(), err_msg=n)


def test_only_what_is_named_is_dropped(folder):
    name, path = folder
    family, config, params = read_checkpoint(path)
    tensors = _tensors(name)
    back = exported(family, config, params)
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in tensors.items()}
    unused = family.filled(config)
    assert all(n.startswith(COPY) or n.startswith(PROJECTOR) for n in unused)
    assert len(unused) == (
        0 if name == "v1" else len(clip_shapes(config.tower, COPY)) + 4 + 3 * (4 - len(_levels(name)))
    )
    for n, tensor in back.items():
        np.testing.assert_array_equal(tensor, 0 * tensors[n] if n in unused else tensors[n], err_msg=n)


def _levels(name: str) -> tuple[int, ...]:
    return PyramidConfig(CASES[name][3]["feature_scale_mask"]).levels


@pytest.mark.parametrize(
    "extra", ["model.vision_tower_2.bias", f"{PROJECTOR}query_5", f"{PROJECTOR}upsampler.model.2.x"]
)
def test_nothing_else_is(extra, tmp_path):
    name = "v2 with feature_mode"  # the layout with most to drop
    write_checkpoint(tmp_path, _tensors(name) | {extra: np.ones(3, np.float32)}, _fields(name))
    with pytest.raises(ConvertError, match=rf"unexpected {extra} \(3,\)$"):
        read_checkpoint(tmp_path)


# Full size: by shape only.
FULL = {
    "v1 13B": ("llava_uhd_v1", VICUNA_13B, ConnectorConfig("spatial_resampler"), VICUNA_CHAT, "A", 137.84),
    "v2 Vicuna-7B": (
        "llava_uhd_v2",
        VICUNA_7B,
        ConnectorConfig("hiwin", pyramid=PyramidConfig(7)),
        VICUNA_CHAT,
        "B",
        175.59,
    ),
    "v2 Vicuna-13B": (
        "llava_uhd_v2",
        VICUNA_13B,
        ConnectorConfig("hiwin", pyramid=PyramidConfig(5)),
        VICUNA_CHAT,
        "A",
        266.68,
    ),
    "v2 Qwen2-7B": (
        "llava_uhd_v2",
        QWEN2_7B,
        ConnectorConfig("hiwin", pyramid=PyramidConfig(5)),
        QWEN2_CHAT,
        "A",
        137.13,
    ),
}


def _full(name: str) -> tuple[str, ModelConfig, float]:
    family, decoder, connector, chat, layout, millions = FULL[name]
    config = ModelConfig(
        decoder=DecoderConfig(**decoder),
        tower=TowerConfig(**CLIP_L_14_336),
        compressor=uhd_jax.config.CompressorConfig("none"),
        connector=connector,
        chat=ChatConfig(**chat, layout=layout),
    )
    return family, config, millions


@pytest.mark.parametrize("name", FULL)
def test_full_size_layouts(name):
    family_name, config, millions = _full(name)
    family = family_named(family_name)
    infos = flatten(abstract(family, config))
    assert {entry.ours for entry in family.table(config)} >= set(infos)
    shapes = {move.name: move.shape for move in match_back(family.table(config), infos)}
    assert not set(shapes) & set(family.filled(config))
    shapes |= family.filled(config)

    def count(prefix: str, *but: str) -> int:
        return sum(int(np.prod(s)) for n, s in shapes.items() if n.startswith(prefix) and not n.startswith(but))

    upsampler = f"{PROJECTOR}upsampler."
    assert f"{count(PROJECTOR, upsampler) / 1e6:.2f}" == f"{millions:.2f}"
    assert count(TOWER) == 303_507_456
    if family_name == "llava_uhd_v2":
        assert count(f"{upsampler}upsampler.") == 1_062_066
        assert count(COPY) == 303_507_456
        assert shapes[f"{PROJECTOR}query"] == (144, config.decoder.width)
    assert (
        count("", PROJECTOR, TOWER)
        == {
            "v1 13B": 13_015_864_320,
            "v2 Vicuna-7B": 6_738_415_616,
            "v2 Vicuna-13B": 13_015_864_320,
            "v2 Qwen2-7B": 7_615_616_512,
        }[name]
    )


@pytest.mark.parametrize("name", FULL)
def test_export_says_in_config_json_what_an_import_reads(name, tmp_path):
    """At the full size of the queries, which the names of the projector depend on, and of little else."""
    family_name, full, _ = _full(name)
    config = dataclasses.replace(
        full,
        decoder=dataclasses.replace(
            full.decoder, vocab_size=30_000, width=32, mlp_width=8, layers=1, heads=4, kv_heads=4, head_dim=8
        ),
        tower=dataclasses.replace(full.tower, width=16, mlp_width=8, layers=2, heads=1, table_side=2),
        connector=dataclasses.replace(full.connector, heads=1),
    )
    config = dataclasses.replace(config, dtype="float32")
    family, random = family_named(family_name), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), abstract(family, config))
    ours, out = tmp_path / "ours", tmp_path / "out"
    save_model(ours, params, config)
    (ours / "tokenizer").mkdir()
    byte_tokenizer(config.chat).save(ours / "tokenizer")
    done = export_model(ours, out, max_shard_bytes=5 * 10**6)
    assert (done.family, done.dtype, done.rounded) == (family_name, "float32", 0)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    again, read, same = read_checkpoint(out)
    assert again.name == family_name
    assert_same_tree(same, params)
    same_chat = dataclasses.replace(config.chat, tokenizer=str(out))
    assert (read.tower, read.decoder, read.chat) == (config.tower, config.decoder, same_chat)
    assert read.connector == config.connector
    fields = json.loads((out / "config.json").read_text())
    assert fields["architectures"] == ["LlavaQwenForCausalLM" if "Qwen" in name else "LlavaLlamaForCausalLM"]
    assert fields["torch_dtype"] == "float32" and fields["eos_token_id"] == 258
    assert (out / "tokenizer.json").exists() and (out / "tokenizer_config.json").exists()
    if name == "v2 Vicuna-7B":
        assert fields["feature_mode"] == "featup_muti_res" and fields["mm_projector_type"] == "adapt_spatial_resampler"
    elif family_name == "llava_uhd_v2":
        assert fields["model_mode"] == "uhd_v2" and fields["mm_projector_type"] == "adapt_spatial_resampler_v2"


@pytest.mark.parametrize(
    ("name", "part", "change", "message"),
    [
        ("v2 Vicuna-7B", "connector", {"query_sets": 1}, "connector.query_sets: the layout needs 4, the model has 1"),
        ("v2 Vicuna-7B", "connector", {"kind": "perceiver"}, "connector.kind: the layout needs 'hiwin'"),
        ("v1 13B", "chat", {"layout": "B"}, "chat.layout: the layout needs 'A'"),
        ("v1 13B", "connector", {"query_side": 8}, "connector.query_side: the layout needs 12"),
        ("v1 13B", "connector", {"heads": 8}, "connector.heads: the layout needs 40, the model has 8"),
        ("v1 13B", "decoder", {"qk_norm": True}, "have a Llama or Qwen2, the model a qwen3"),
    ],
)
def test_what_the_original_code_cannot_run_is_not_exported(name, part, change, message, tmp_path):
    family_name, config, _ = _full(name)
    config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **change)})
    with pytest.raises(ConvertError, match=message):
        family_named(family_name).write_files(config, None, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_vision_tower": "google/siglip-so400m-patch14-384"}, "mm_vision_tower 'google/siglip.*only CLIP"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is true"),
        ({"mm_projector_type": "mlp2x_gelu"}, "mm_projector_type 'mlp2x_gelu'.*: not known"),
        ({"model_mode": "uhd_v9"}, "model_mode 'uhd_v9': not known"),
        ({"num_attention_heads": None}, "config.json: no 'num_attention_heads'"),
    ],
)
def test_a_config_that_is_not_known(change, message, tmp_path):
    fields = _fields("v1") | change
    fields = {key: value for key, value in fields.items() if value is not None}
    with pytest.raises(ConvertError, match=message):
        read_checkpoint(write_checkpoint(tmp_path, _tensors("v1"), fields))


def test_a_checkpoint_without_its_tower(tmp_path):
    tensors = {name: tensor for name, tensor in _tensors("v1").items() if not name.startswith(TOWER)}
    with pytest.raises(ConvertError, match="no tensor .*class_embedding; it is needed to know the model's sizes"):
        read_checkpoint(write_checkpoint(tmp_path, tensors, _fields("v1")))
