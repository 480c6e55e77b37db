"""Towers and language models alone, as transformers writes them: read here, they compute what transformers' modules do,
and what is exported from here loads there with nothing missing and nothing left over."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import assert_same_tree, exported, read_checkpoint, write_checkpoint
from golden_v4 import load as golden

from uhd_jax.analysis.verify import VerifyError, verify
from uhd_jax.config import ChatConfig
from uhd_jax.convert.families import FAMILIES, family_named
from uhd_jax.convert.tables import ConvertError
from uhd_jax.data.tokenizer import byte_tokenizer
from uhd_jax.models import uhd

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("unoptimised")

SIDE, PATCH = 3, 14
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, patch_size=PATCH)
FIXED = VISION | {"image_size": SIDE * PATCH}
NAFLEX = VISION | {"num_patches": SIDE**2}
WORDS = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
TEXT = dict(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
HYBRID = dict(
    num_hidden_layers=4,
    head_dim=16,
    layer_types=["linear_attention", "full_attention"] * 2,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    rope_parameters={
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
)


def _alive(model):
    """With biases and norms away from 0 and 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _tower(kind: str, whole: bool):
    name = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}[kind]
    vision = NAFLEX if kind == "siglip2" else FIXED
    if whole:
        config = getattr(transformers, f"{name}Config")(vision_config=vision, text_config=WORDS)
        return _alive(getattr(transformers, f"{name}Model")(config))
    return _alive(getattr(transformers, f"{name}VisionModel")(getattr(transformers, f"{name}VisionConfig")(**vision)))


def _tensors(model) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def _fields(model) -> dict:
    """config.json as `save_pretrained` writes it."""
    return model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "float32"}


def _patches(image: np.ndarray) -> np.ndarray:
    """[3, H, W] -> [P, 588], (channel, y, x) inside a patch."""
    cut = image.reshape(3, SIDE, PATCH, SIDE, PATCH).transpose(1, 3, 0, 2, 4)
    return cut.reshape(SIDE**2, -1)


def _expected(kind: str, model, image: np.ndarray) -> np.ndarray:
    vision = getattr(model, "vision_model", model)
    with torch.no_grad():
        if kind == "siglip2":
            flat = _patches(image).reshape(1, SIDE**2, 3, PATCH, PATCH).transpose(0, 1, 3, 4, 2).reshape(1, SIDE**2, -1)
            out = vision(
                torch.tensor(flat),
                torch.ones(1, SIDE**2, dtype=torch.long),
                torch.tensor([[SIDE, SIDE]]),
            )
        else:
            out = vision(torch.tensor(image)[None], output_hidden_states=True)
    return (out.hidden_states[-2][0, 1:] if kind == "clip" else out.last_hidden_state[0]).numpy()


@pytest.mark.parametrize("layout", ["whole", "vision", "vision, transformers 4"])
@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2"])
def test_towers(kind, layout, tmp_path):
    model = _tower(kind, layout == "whole")
    tensors = _tensors(model)
    if layout.endswith("4"):
        tensors = {f"vision_model.{name}": tensor for name, tensor in tensors.items()}
        tensors["vision_model.embeddings.position_ids"] = np.arange(SIDE**2)[None]
    config = _fields(model)
    write_checkpoint(tmp_path, tensors, config)
    family, found, params = read_checkpoint(tmp_path)
    assert family.name == (f"{kind}_bare" if layout == "vision" else kind)
    assert set(params) == {"tower"}
    image = np.random.default_rng(0).normal(size=(3, SIDE * PATCH, SIDE * PATCH)).astype(np.float32)
    grids = jnp.full((1, 2), SIDE)
    module = uhd.tower(found).clone(dtype=jnp.float32)
    ours, _ = module.apply({"params": params["tower"]}, _patches(image)[None], grids, levels=0, compress=False)
    expected = _expected(kind, model, image)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(ours[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2"])
def test_an_exported_tower_loads_in_transformers(kind, tmp_path):
    model = _tower(kind, False)
    write_checkpoint(tmp_path / "source", _tensors(model), _fields(model))
    _, config, params = read_checkpoint(tmp_path / "source")
    family, out = family_named(kind), tmp_path / "out"
    write_checkpoint(out, exported(family, config, params), None)
    family.write_files(config, None, out)
    again, same_config, same_params = read_checkpoint(out)
    assert (again.name, same_config) == (kind, config)
    assert_same_tree(same_params, params)
    loaded, report = type(model).from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    image = np.random.default_rng(0).normal(size=(3, SIDE * PATCH, SIDE * PATCH)).astype(np.float32)
    np.testing.assert_array_equal(_expected(kind, loaded.eval(), image), _expected(kind, model, image))
    report = verify(tmp_path / "source", out)
    assert report.summary()["parts"] == ["tower"] and report.problem is None
    assert len(report.comparisons) == (4 if kind == "clip" else 2)


@pytest.mark.parametrize("prefix", ["", "vision_tower."])
def test_moonvit(prefix, tmp_path):
    tensors = {prefix + name: tensor for name, tensor in golden("moonvit", "weights").items()}
    vision = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, patch_size=14)
    vision |= dict(init_pos_emb_height=8, init_pos_emb_width=6, merge_kernel_size=[2, 2])
    config = {"model_type": "moonvit", **vision}
    if prefix:
        config = {"model_type": "kimi_vl", "vision_config": vision}
        tensors |= {"language_model.lm_head.weight": np.ones((3, 3)), "multi_modal_projector.linear_1.bias": np.ones(3)}
    write_checkpoint(tmp_path / "source", tensors, config)
    family, config, params = read_checkpoint(tmp_path / "source")
    assert family.name == ("moonvit_in_kimi_vl" if prefix else "moonvit")
    alone, out = family_named("moonvit"), tmp_path / "out"
    back = exported(alone, config, params)
    assert set(back) == {n.removeprefix(prefix) for n in tensors if not n.startswith(("language", "multi"))}
    write_checkpoint(out, back, None)
    alone.write_files(config, None, out)
    again, same_config, same_params = read_checkpoint(out)
    assert (again.name, same_config) == ("moonvit", config)
    assert_same_tree(same_params, params)


def test_a_vision_config_may_leave_out_what_is_usual(tmp_path):
    model = _tower("siglip", True)
    config = json.loads(json.dumps(_fields(model)))
    for key in ("hidden_act", "layer_norm_eps", "num_channels", "attention_dropout"):
        del config["vision_config"][key]
    _, found, _ = read_checkpoint(write_checkpoint(tmp_path, _tensors(model), config))
    assert found.tower.norm_eps == 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, r"config.json: hidden_act 'gelu'"),
        ({"num_patches": 8}, r"num_patches 8 is no square"),
        ({"num_patches": 16}, r"position_embedding.weight has shape \(9, 32\), which does not give .* \(16, 32\)"),
        (
            {"model_type": "bert"},
            r"model_type 'bert', architectures .*'Siglip2VisionModel'.*: not known .*; known families",
        ),
    ],
)
def test_towers_that_are_not_known(change, message, tmp_path):
    model = _tower("siglip2", False)
    write_checkpoint(tmp_path, _tensors(model), _fields(model) | change)
    with pytest.raises(ConvertError, match=message):
        read_checkpoint(tmp_path)


def _text_model(kind: str, tied: bool = False):
    name, extra = {
        "llama": ("Llama", {"rms_norm_eps": 1e-5}),
        "qwen2": ("Qwen2", {}),
        "qwen3": ("Qwen3", {"head_dim": 16}),
        "qwen3_5": ("Qwen3_5", HYBRID),
    }[kind]
    config_class = getattr(transformers, f"{name}TextConfig" if kind == "qwen3_5" else f"{name}Config")
    config = config_class(**(TEXT | extra), tie_word_embeddings=tied)
    return _alive(getattr(transformers, f"{name}ForCausalLM")(config))


def _logits(model, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "qwen3_5"])
def test_language_models_there_and_back(kind, tied, tmp_path):
    model = _text_model(kind, tied)
    tensors = _tensors(model) | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    write_checkpoint(tmp_path / "source", tensors, _fields(model), shards=3)
    family, config, params = read_checkpoint(tmp_path / "source")
    assert family.name == kind and config.dtype == "float32"
    ids = np.random.default_rng(0).integers(0, TEXT["vocab_size"], (2, 9))
    module, variables = uhd.decoder(config), {"params": params["decoder"]}
    x = module.apply(variables, ids, method="embed")
    hidden = module.apply(variables, x, jnp.broadcast_to(jnp.arange(9), ids.shape))[0]
    ours = hidden @ module.apply(variables, method="head_kernel")
    expected = _logits(model, ids)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)

    out = tmp_path / "out"
    write_checkpoint(out, exported(family, config, params), None)
    family.write_files(config, None, out)
    again, same_config, same_params = read_checkpoint(out)
    assert (again.name, same_config.decoder) == (kind, config.decoder)
    longest = json.loads((out / "config.json").read_text())["max_position_embeddings"]
    assert longest == config.decoder.max_positions == model.config.max_position_embeddings
    assert_same_tree(same_params, params)
    loaded, report = type(model).from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_array_equal(_logits(loaded.eval(), ids), expected)
    report = verify(tmp_path / "source", out)
    assert report.summary()["parts"] == ["decoder"] and report.problem is None
    assert report.summary()["top1_agreement"] == 1


def test_verify_finds_other_parts(tmp_path):
    model, other = _text_model("llama"), _tower("clip", False)
    tensors = _tensors(model)
    source = write_checkpoint(tmp_path / "source", tensors, _fields(model))
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][::-1]
    damaged = write_checkpoint(tmp_path / "damaged", tensors, _fields(model))
    assert "logits of '75 random ids' differ at position" in verify(source, damaged).problem
    tower = write_checkpoint(tmp_path / "tower", _tensors(other), _fields(other))
    with pytest.raises(VerifyError, match="tower has no decoder to compare with that of .*source"):
        verify(source, tower)
    wider = write_checkpoint(tmp_path / "wider", _tensors(_text_model("qwen3")), _fields(_text_model("qwen3")))
    with pytest.raises(VerifyError, match="not the same decoder: .*decoder.qk_norm: False in the source, True here"):
        verify(source, wider)
    byte_tokenizer(ChatConfig()).save(source)
    with pytest.raises(VerifyError, match=r"its tokenizer makes of 'What is shown.* id \d+, the decoder has 50"):
        verify(source, source)


def test_qwen3_5_with_its_vision_tower(tmp_path):
    """The published checkpoints hold one, and layers for speculative decoding; neither is taken."""
    model = _text_model("qwen3_5", tied=True)
    tensors = _tensors(model)
    text = _fields(model)
    _, expected, params = read_checkpoint(write_checkpoint(tmp_path / "alone", tensors, text))
    whole = {n.replace("model.", "model.language_model.", 1): tensor for n, tensor in tensors.items()}
    whole |= {"model.visual.patch_embed.proj.weight": np.ones((3, 3)), "mtp.norm.weight": np.ones(3)}
    fields = {"model_type": "qwen3_5", "text_config": text, "tie_word_embeddings": True, "dtype": "float32"}
    family, config, same = read_checkpoint(write_checkpoint(tmp_path / "whole", whole, fields))
    assert family.name == "qwen3_5_with_vision" and config.decoder == expected.decoder
    assert_same_tree(same, params)
    assert verify(tmp_path / "whole", tmp_path / "alone", prompts=["Hm?"]).problem is None


def test_a_layout_of_another_language_model(tmp_path):
    model = _text_model("qwen3")
    _, config, _ = read_checkpoint(write_checkpoint(tmp_path, _tensors(model), _fields(model)))
    with pytest.raises(ConvertError, match="the layout is of a llama, the model has a qwen3"):
        family_named("llama").write_files(config, None, tmp_path)


def test_a_config_without_a_size_is_named(tmp_path):
    model = _text_model("llama")
    config = {k: v for k, v in _fields(model).items() if k != "intermediate_size"}
    with pytest.raises(ConvertError, match="config.json: no 'intermediate_size'"):
        read_checkpoint(write_checkpoint(tmp_path, _tensors(model), config))


def test_names_of_families_are_unique_and_known():
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    with pytest.raises(ConvertError, match="'vicuna' is not known; known: .*llama"):
        family_named("vicuna")


def test_no_family_fills_more_than_the_model_has():
    for family in FAMILIES:
        assert set(family.parts) <= {"tower", "connector", "connector/upsampler", "decoder"}, family.name
