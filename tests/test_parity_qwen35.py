"""The Qwen3.5 hybrid decoder against transformers' own, alive and in float64: logits and all gradients."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uhd_jax.batch import Bucket, empty_batch
from uhd_jax.config import CompressorConfig, ModelConfig, TowerConfig
from uhd_jax.convert.decoders import decoder_config, decoder_dropped, decoder_table, text_config
from uhd_jax.convert.tables import export_tensors, flatten, import_tensors
from uhd_jax.models import uhd
from uhd_jax.models.decoder import Decoder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=99,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=24,
    tie_word_embeddings=True,
    rope_parameters=dict(
        rope_type="default",
        rope_theta=10_000.0,
        partial_rotary_factor=0.25,
        mrope_section=[2, 1, 1],
        mrope_interleaved=True,
    ),
)
_ROPE = SIZES["rope_parameters"]
MODELS = {
    "tied, value heads twice key heads": {},
    "untied, two groups of three, one key/value head": dict(
        num_hidden_layers=6,
        full_attention_interval=3,
        num_key_value_heads=1,
        num_attention_heads=2,
        linear_num_key_heads=3,
        linear_num_value_heads=3,
        linear_conv_kernel_dim=2,
        tie_word_embeddings=False,
        rope_parameters=_ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2]},
    ),
    "every second layer full, whole heads rotated": dict(
        num_hidden_layers=4,
        full_attention_interval=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=16,
        linear_num_key_heads=1,
        linear_num_value_heads=5,
        linear_value_head_dim=16,
        rope_parameters=_ROPE | {"partial_rotary_factor": 1.0, "rope_theta": 5e6, "mrope_section": [4, 2, 2]},
    ),
    "full attention only": dict(num_hidden_layers=2, layer_types=["full_attention"] * 2),
}
LENGTH = 75  # more than a chunk of 64, and no multiple


@pytest.fixture
def float64(monkeypatch):
    """transformers computes norms, angles and the delta rule in float32 whatever the weights are; here in float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def made(name):
    """transformers' model in float64, our config, and the same parameters."""
    torch.manual_seed(0)
    theirs = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**(SIZES | MODELS[name]))).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    config = ModelConfig(
        decoder=decoder_config(theirs.config.to_dict()),
        tower=TowerConfig(width=8, mlp_width=8, layers=1, heads=1, table_side=2),
        compressor=CompressorConfig(after_layer=0),
        dtype="float32",
    )
    return theirs.double(), config, ours(theirs.state_dict(), config)


def ours(tensors, config):
    abstract = {"decoder": jax.eval_shape(lambda: uhd.init_params(config, jax.random.key(0)))["decoder"]}
    tied = config.decoder.tied_head
    return import_tensors(
        decoder_table(config.decoder, "model.", "lm_head.weight"),
        {name: tensor.float().numpy() for name, tensor in tensors.items()},
        abstract,
        lambda name: tied and name == "lm_head.weight",
    )


def one_row(ids):
    batch = empty_batch(Bucket(rows=1, slots=0, tokens=len(ids), patches=16, patch_bytes=784))
    batch.tokens[:], batch.positions[:], batch.segments[:] = ids, np.arange(len(ids)), 1
    return batch


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name, float64):
    theirs, config, params = made(name)
    ids = np.random.default_rng(0).integers(0, 99, LENGTH)
    tokens = torch.from_numpy(ids)[None]
    expected = theirs(tokens).logits
    assert expected.dtype == torch.double
    assert expected.abs().max() > 1
    batch = one_row(ids)
    logits = uhd.logits(params, batch, config)
    np.testing.assert_allclose(logits, expected.detach().numpy(), atol=5e-4, rtol=0)

    batch.loss_weights[:, 1:] = np.random.default_rng(1).integers(0, 3, LENGTH - 1)
    losses = torch.nn.functional.cross_entropy(expected[0, :-1], tokens[0, 1:], reduction="none")
    loss = (losses * torch.from_numpy(batch.loss_weights[0, 1:])).sum()
    loss.backward()
    remat = dataclasses.replace(config, decoder_remat="full")
    total, gradients = jax.jit(jax.value_and_grad(lambda p: uhd.loss_sums(p, batch, remat)[0]))(params)
    np.testing.assert_allclose(total, loss.item(), rtol=1e-5)
    of_theirs = flatten(ours({name: p.grad for name, p in theirs.named_parameters()}, config))
    assert set(of_theirs) == set(flatten(gradients))
    for path, gradient in flatten(gradients).items():
        size = np.abs(of_theirs[path]).max()
        assert size > 1e-3, path
        np.testing.assert_allclose(gradient, of_theirs[path], atol=1e-3 * size, rtol=0, err_msg=path)


def run_decoder(params, config, ids, positions, segments):
    """Logits float32[B, T, V] of any positions."""
    module, tree = Decoder(config.decoder), {"params": params["decoder"]}
    x = module.apply(tree, jnp.asarray(ids), method="embed")
    hidden, _ = module.apply(tree, x, jnp.asarray(positions), jnp.asarray(segments))
    return hidden @ module.apply(tree, method="head_kernel")


def test_left_padding_and_positions_on_three_axes(float64):
    theirs, config, params = made("tied, value heads twice key heads")
    random = np.random.default_rng(0)
    ids, mask = random.integers(0, 99, (2, 20)), np.ones((2, 20), int)
    mask[1, :7] = 0
    positions = random.integers(0, 50, (3, 2, 20))
    given = dict(input_ids=ids, attention_mask=mask, position_ids=positions)
    with torch.no_grad():
        expected = theirs(**{name: torch.from_numpy(array) for name, array in given.items()}).logits.numpy()
    logits = run_decoder(params, config, ids, positions, mask)
    np.testing.assert_allclose(logits[0], expected[0], atol=5e-4, rtol=0)
    np.testing.assert_allclose(logits[1, 7:], expected[1, 7:], atol=5e-4, rtol=0)
    alone = run_decoder(params, config, ids[1:, 7:], positions[:, 1:, 7:], mask[1:, 7:])
    np.testing.assert_allclose(logits[1:, 7:], alone, atol=1e-4, rtol=0)
    plain, equal = (run_decoder(params, config, ids, p, mask) for p in (positions[0], positions[[0, 0, 0]]))
    np.testing.assert_array_equal(plain, equal)
    assert np.abs(plain - logits).max() > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_names_and_sizes_there_and_back(name):
    theirs, config, params = made(name)
    weights = {
        n: t for n, t in theirs.float().state_dict().items() if n != "lm_head.weight" or not config.decoder.tied_head
    }
    back = export_tensors(decoder_table(config.decoder, "model.", "lm_head.weight"), params)
    assert set(back) == set(weights)
    for n, tensor in weights.items():
        np.testing.assert_array_equal(back[n], tensor.numpy(), err_msg=n)
    text = text_config(config.decoder)
    assert decoder_config(text) == config.decoder
    again = transformers.Qwen3_5TextConfig(**text)
    assert decoder_config(again.to_dict()) == config.decoder


def test_tensors_dropped_on_purpose():
    config = decoder_config(transformers.Qwen3_5TextConfig(**SIZES).to_dict())
    dropped = [pattern for pattern, reason in decoder_dropped(config, "lm_head.weight") if reason]

    def is_dropped(name):
        return any(re.fullmatch(pattern, name) for pattern in dropped)

    assert is_dropped("mtp.layers.0.self_attn.q_proj.weight") and is_dropped("mtp.fc.weight")
    assert is_dropped("lm_head.weight") and not is_dropped("model.layers.0.mlp.up_proj.weight")
    untied = dataclasses.replace(config, tied_head=False)
    assert "lm_head" not in "".join(pattern for pattern, _ in decoder_dropped(untied, "lm_head.weight"))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(layer_types=["linear_attention", "full_attention", "full_attention", "linear_attention"]), "layer_types"),
        (dict(layer_types=["linear_attention"] * 4), "layer_types"),
        (dict(attention_bias=True), "attention_bias: True is not supported"),
        (dict(attn_output_gate=False), "attn_output_gate: False is not supported"),
        (dict(hidden_act="gelu"), "hidden_act: 'gelu' is not supported"),
        (dict(model_type="mamba"), "'mamba' is none of llama, qwen2"),
        (dict(rope_parameters=_ROPE | {"rope_type": "yarn"}), "rope_type: 'yarn' is not supported"),
        (dict(rope_scaling={"type": "linear", "factor": 4.0}), "type: 'linear' is not supported"),
        (dict(rope_parameters=_ROPE | {"mrope_section": [5, 5, 5]}), "mrope_sections"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_the_decoder_cannot_do_is_refused(changes, message):
    text = transformers.Qwen3_5TextConfig(**SIZES).to_dict()
    with pytest.raises(ValueError, match=message):
        decoder_config(text | changes)
