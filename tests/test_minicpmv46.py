"""MiniCPM-V 4.6 live against transformers: configs both ways, imports, exports, logits."""

from __future__ import annotations

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hf46 import copy_tokenizer, make_checkpoint, torch_inputs
from safetensors.numpy import save_file

import uhd_jax
from uhd_jax.checkpoint import save_model
from uhd_jax.config import ChatConfig
from uhd_jax.convert.families import find_family
from uhd_jax.convert.minicpmv46 import MINICPM_V_4_6
from uhd_jax.convert.source import Source, open_source
from uhd_jax.convert.tables import ConvertError, export_tensors, match
from uhd_jax.convert.transfer import export_model
from uhd_jax.data.tokenizer import byte_tokenizer
from uhd_jax.generation.assistant import Assistant, _abstract_params
from uhd_jax.generation.request import AnswerOptions
from uhd_jax.models import uhd

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("unoptimised")

CASES = {
    "qwen3_tied": dict(
        text_type="qwen3", tied=True, insert=0, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3
    ),
    "qwen3_4x": dict(
        text_type="qwen3",
        mode="4x",
        insert=3,
        vision={"num_attention_heads": 2, "image_size": 140, "num_hidden_layers": 5},
        intermediate_size=56,
    ),
    "qwen35": dict(text_type="qwen3_5_text", tied=True),
    "qwen35_4x": dict(
        text_type="qwen3_5_text",
        mode="4x",
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
    ),
}
TOLERANCE = {"qwen3": 5e-5, "qwen3_5_text": 1e-3}  # of logits; transformers' own two forms of Qwen3.5 differ by 2.5e-4
PICTURES = [
    np.random.default_rng(1).integers(0, 256, (90, 200, 3), np.uint8),
    np.random.default_rng(2).integers(0, 256, (40, 30, 3), np.uint8),
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request, tmp_path_factory):
    """A made checkpoint, its PyTorch model, the model loaded from it here, and a prompt with two images."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = make_checkpoint(folder, **CASES[request.param])
    ours = uhd_jax.load(folder)
    return folder, theirs, ours, ours.prepare("What is this?", PICTURES)


def torch_logits(model, prepared, config) -> np.ndarray:
    with torch.no_grad():
        return model(**torch_inputs(prepared, config)).logits[0].numpy()


def tolerance(model) -> float:
    return TOLERANCE[model.config.text_config.model_type]


def test_logits_at_every_position(case):
    folder, theirs, ours, prepared = case
    single = ours.logits(prepared.token_ids, PICTURES)
    expected = torch_logits(theirs, prepared, ours.config)
    assert single.shape == expected.shape and expected.std() > 0.5
    error = np.abs(single - expected).max(axis=-1)
    assert np.quantile(error, 0.95) < tolerance(theirs) / 2
    if theirs.config.text_config.model_type == "qwen3":
        assert error.max() < tolerance(theirs)
        return
    # The gated norm magnifies rounding at single positions, so all of them are compared in float64.
    expected = torch_logits(copy.deepcopy(theirs).double(), prepared, ours.config)
    with jax.enable_x64(True):
        double = uhd_jax.load(folder, dtype="float64").logits(prepared.token_ids, PICTURES)
    np.testing.assert_allclose(double, expected, atol=tolerance(theirs), rtol=0)


def test_greedy_answers_are_the_likeliest_tokens_there(case):
    """Of a batch of two prompts, one much longer; followed through in PyTorch, where near ties may go either way."""
    _, theirs, ours, prepared = case
    short = ours.prepare("Hm?")
    requests = ours.answer([prepared, short], [AnswerOptions(max_new_tokens=6)] * 2, ends=frozenset())
    answers = [request.tokens for request in requests]
    for asked, answer in zip((prepared, short), answers, strict=True):
        inputs = torch_inputs(asked, ours.config)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
        with torch.no_grad():
            logits = theirs(**inputs).logits[0, len(asked.token_ids) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert len(answer) == 6 and (logits.max(dim=1).values - chosen).max() <= 2 * tolerance(theirs)


def test_an_export_is_what_transformers_loads(case, tmp_path):
    _, theirs, ours, prepared = case
    MINICPM_V_4_6.write_files(ours.config, copy_tokenizer(tmp_path / "tokenizer"), tmp_path)
    tensors = export_tensors(MINICPM_V_4_6.table(ours.config), jax.tree.map(np.asarray, ours.params))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    assert model.dtype == torch.float32
    exported, original = model.config.to_dict(), theirs.config.to_dict()
    for unused in ("transformers_version", "image_size", "_name_or_path"):
        exported.pop(unused, None), original.pop(unused, None)
    for key, value in original["text_config"].items():
        if value is not None and key not in ("dtype", "max_window_layers", "initializer_range"):
            assert exported["text_config"][key] == value, key
    for key, value in original["vision_config"].items():
        if value is not None and key != "dtype":
            assert exported["vision_config"][key] == value, key
    nested = {"text_config", "vision_config"}
    assert {k: v for k, v in original.items() if k not in nested and exported.get(k) != v} == {}
    np.testing.assert_allclose(
        torch_logits(model, prepared, ours.config), torch_logits(theirs, prepared, ours.config), atol=1e-6, rtol=0
    )


def test_import_export_import_is_bit_equal(case, tmp_path):
    folder, _, ours, _ = case
    tokenizer = copy_tokenizer(tmp_path / "tokenizer")
    MINICPM_V_4_6.write_files(ours.config, tokenizer, tmp_path)
    tensors = export_tensors(MINICPM_V_4_6.table(ours.config), jax.tree.map(np.asarray, ours.params))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = uhd_jax.load(tmp_path)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, ours.params))
    with open_source(folder) as source:
        original = {name: source.read(name) for name in source.tensors}
    assert set(original) - {"lm_head.weight"} <= set(tensors) and set(tensors) <= set(original)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, original[name], err_msg=name)
    chat = dataclasses.replace(
        again.config.chat, tokenizer=ours.config.chat.tokenizer, template=ours.config.chat.template
    )
    assert dataclasses.replace(again.config, chat=chat) == ours.config


def edited(folder, tmp_path, file, edit):
    """A copy of a checkpoint's small files with one of them changed, and links to its weights."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    values = json.loads((folder / file).read_text())
    edit(values)
    (copy / file).unlink()
    (copy / file).write_text(json.dumps(values))
    return copy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain")
    make_checkpoint(path)
    return path


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("config.json", lambda c: c.update(model_type="llava"), "model_type 'llava'.*known families: minicpm_v_4_6"),
        ("config.json", lambda c: c["vision_config"].update(image_size=140), "image_size: 140 .* 100 rows, .* has 49"),
        ("config.json", lambda c: c["vision_config"].update(image_size=[98, 98]), "vision_config.image_size: .98, 98."),
        ("config.json", lambda c: c["vision_config"].update(hidden_act="gelu"), "vision_config.hidden_act: 'gelu'"),
        ("config.json", lambda c: c["vision_config"].update(window_kernel_size=[4, 4]), "window_kernel_size"),
        ("config.json", lambda c: c.update(merge_kernel_size=[1, 2]), "merge_kernel_size"),
        ("config.json", lambda c: c.update(insert_layer_id=3), "insert_layer_id: 3 is not an index of the tower's 3"),
        ("config.json", lambda c: c.update(insert_layer_id=-1), "insert_layer_id: -1 leaves out the compressor"),
        ("config.json", lambda c: c.update(downsample_mode="8x"), "downsample_mode: '8x'"),
        ("config.json", lambda c: c.update(image_token_id=7), r"image_token_id: 7 is not the id of .*258"),
        ("config.json", lambda c: c.update(image_token_id=None), "image_token_id"),
        ("config.json", lambda c: c.pop("text_config"), "text_config"),
        ("config.json", lambda c: c["text_config"].update(model_type="gemma"), "text_config.model_type: 'gemma'"),
        ("config.json", lambda c: c["text_config"].pop("hidden_size"), "config.json: no 'hidden_size'"),
        ("config.json", lambda c: c.update(merger_times=3), "config.json: merger_times: must be 1 or 2, not 3"),
        ("config.json", lambda c: c.update(insert_layer_id="a"), "insert_layer_id: 'a' is not a whole number"),
        ("config.json", lambda c: c.update(drop_vision_last_layer=True), "drop_vision_last_layer: True is not supp"),
        ("tokenizer.json", lambda c: c.update(added_tokens=5), "tokenizer.json: added_tokens is not a list"),
        ("tokenizer_config.json", lambda c: c.update(image_token={"a": 1}), "image_token: {'a': 1} is not a"),
        ("generation_config.json", lambda c: c.update(eos_token_id=["x"]), "eos_token_id: .'x'. is no id or list"),
        ("preprocessor_config.json", lambda c: c.update(scale_resolution="448"), "scale_resolution: '448' is not of"),
        ("preprocessor_config.json", lambda c: c.update(resample=2), "preprocessor_config.json: resample: 2"),
        ("preprocessor_config.json", lambda c: c.update(image_mean=[0.4, 0.5, 0.5]), "image_mean"),
        ("preprocessor_config.json", lambda c: c.update(patch_size=16), "patch_size: 16"),
    ],
)  # fmt: skip
def test_bad_settings_name_file_and_key(folder, tmp_path, file, edit, message):
    copy = edited(folder, tmp_path, file, edit)
    with pytest.raises(ConvertError, match=message) as error:
        uhd_jax.load(copy)
    assert str(copy) in str(error.value)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "tokenizer.json", "model.safetensors"])
def test_missing_files_are_named(folder, tmp_path, file):
    copy = edited(folder, tmp_path, "config.json", lambda c: None)
    (copy / file).unlink()
    with pytest.raises(ConvertError, match=file.replace("model.", "model.*")):
        uhd_jax.load(copy)


def test_settings_of_processors_are_read(folder, tmp_path):
    def config(**values):
        copy = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        copy.mkdir()
        found = edited(folder, copy, "preprocessor_config.json", lambda c: c.update(values.get("image", {})))
        for name in ("video_preprocessor_config", "processor_config", "generation_config"):
            if name in values:
                (found / f"{name}.json").unlink(missing_ok=True)
                (found / f"{name}.json").write_text(json.dumps(values[name]))
        with open_source(found) as source:
            return find_family(source).config(source)

    image = {"max_slice_nums": 4, "use_image_id": False, "scale_resolution": 224}
    plain = config(image=image)
    assert (plain.slicing.max_slices, plain.slicing.scale_resolution, plain.chat.use_image_id) == (4, 224, False)
    assert config(image={"slice_mode": False}).slicing.max_slices == 1
    clip = {"max_num_frames": 16, "stack_frames": 3, "max_slice_nums": 2}
    assert dataclasses.astuple(config(video_preprocessor_config=clip).video) == (16, 3, 2)
    both = config(processor_config={"image_processor": image, "video_processor": clip})
    assert (both.slicing.max_slices, both.video.stack_frames) == (4, 3)
    assert config(generation_config={"eos_token_id": [256, 268]}).chat.stop == ("</think>",)
    assert plain.chat.stop == ()


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("compressor", {"kind": "none"}, "model.compressor.kind: 'none'"),
        ("connector", {"kind": "mlp"}, "model.connector.kind: 'mlp'"),
        ("slicing", {"rule": "v1"}, "model.slicing.rule: 'v1'"),
        ("chat", {"template": "vicuna_v1"}, "model.chat.template: 'vicuna_v1'"),
        ("chat", {"placeholder": "<pad>"}, "tokenizer.json: has no token '<pad>'"),
    ],
)
def test_what_the_layout_has_no_place_for(folder, tmp_path, part, changes, message):
    with open_source(folder) as source:
        config = dataclasses.replace(MINICPM_V_4_6.config(source), mode="4x")
    config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **changes)})
    with pytest.raises(ConvertError, match=message):
        MINICPM_V_4_6.write_files(config, copy_tokenizer(tmp_path / "tokenizer"), tmp_path)


def test_an_export_needs_a_tokenizer(folder, tmp_path):
    with open_source(folder) as source:
        config = MINICPM_V_4_6.config(source)
    with pytest.raises(ConvertError, match="needs the model's tokenizer"):
        MINICPM_V_4_6.write_files(config, None, tmp_path)


FULL_VISION = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16)
FULL_TEXT = {
    "qwen3_5_text": dict(
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=16,
        vocab_size=248_094,
        tie_word_embeddings=True,
    ),
    "qwen3": dict(
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
        tie_word_embeddings=False,
    ),
}


@pytest.mark.parametrize(("kind", "parameters"), [("qwen3_5_text", 1_300_428_016), ("qwen3", 8_753_160_624)])
def test_released_sizes_by_shape_alone(folder, tmp_path, kind, parameters):
    text = {"model_type": kind, **FULL_TEXT[kind]}
    config = transformers.MiniCPMV4_6Config(
        text_config=text,
        vision_config=FULL_VISION | {"image_size": 980, "patch_size": 14},
        image_token_id=258,
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    with torch.device("meta"):
        theirs = transformers.MiniCPMV4_6ForConditionalGeneration(config)
    config.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "preprocessor_config.json"):
        (tmp_path / file).write_text((folder / file).read_text())
    source = Source(tmp_path, {})
    ours = MINICPM_V_4_6.config(source)
    infos = {name: jax.ShapeDtypeStruct(p.shape, np.float32) for name, p in theirs.named_parameters()}
    abstract = _abstract_params(ours)
    match(MINICPM_V_4_6.table(ours), infos, abstract)
    assert sum(np.prod(info.shape) for info in infos.values()) == parameters
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == parameters


@pytest.mark.parametrize(
    ("model", "dtype"), [(tiny.MODEL, "bfloat16"), (tiny.HYBRID, "float32")], ids=["qwen3", "hybrid"]
)
def test_a_model_trained_here_is_one_for_transformers(tmp_path, model, dtype):
    """With the built-in tokenizer, which has no mark for videos."""
    decoder = dataclasses.replace(model.decoder, vocab_size=280)
    tower = dataclasses.replace(model.tower, patch_size=14)
    slicing = dataclasses.replace(model.slicing, scale_resolution=112)
    config = dataclasses.replace(
        model, decoder=decoder, tower=tower, slicing=slicing, dtype=dtype, chat=ChatConfig(empty_think=True)
    )
    params = jax.jit(uhd.init_params, static_argnums=0)(config, jax.random.key(0))
    if dtype == "bfloat16":
        params = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), params)
    save_model(tmp_path / "trained", params, config)
    (tmp_path / "trained" / "tokenizer").mkdir()
    byte_tokenizer(config.chat).save(tmp_path / "trained" / "tokenizer")
    assert export_model(tmp_path / "trained", tmp_path / "export").family == "minicpm_v_4_6"
    theirs, info = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "export", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    assert str(theirs.dtype) == f"torch.{dtype}" and theirs.config.video_token_id is None
    exact = dataclasses.replace(config, dtype="float32")
    ours = Assistant(exact, params, byte_tokenizer(config.chat))
    prepared = ours.prepare("What?", PICTURES)
    again = uhd_jax.load(tmp_path / "export")
    assert again.prepare("What?", PICTURES).token_ids.tolist() == prepared.token_ids.tolist()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Hm?"}], add_generation_prompt=True)
    assert list(asked["input_ids"]) == ours.prepare("Hm?").token_ids.tolist()
    expected = torch_logits(theirs.float(), prepared, exact)
    np.testing.assert_allclose(ours.logits(prepared.token_ids, PICTURES), expected, atol=1e-4, rtol=0)
