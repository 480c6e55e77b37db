"""The decoder against transformers' Llama, Qwen2 and Qwen3, alive, at tiny sizes."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from uhd_jax.batch import Bucket, empty_batch
from uhd_jax.config import CompressorConfig, ModelConfig, TowerConfig
from uhd_jax.convert.decoders import decoder_config, decoder_table
from uhd_jax.convert.tables import import_tensors
from uhd_jax.models import uhd

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=99,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=16)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_logits(kind):
    torch.manual_seed(0)
    theirs = MODELS[kind]().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms away from 0 and 1
            parameter.add_(0.1 * torch.randn_like(parameter))
    config = ModelConfig(
        decoder=decoder_config(theirs.config.to_dict()),
        tower=TowerConfig(width=8, mlp_width=8, layers=1, heads=1, table_side=2),
        compressor=CompressorConfig(after_layer=0),
        dtype="float32",
    )
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    abstract = {"decoder": jax.eval_shape(lambda: uhd.init_params(config, jax.random.key(0)))["decoder"]}
    params = import_tensors(
        decoder_table(config.decoder, "model.", "lm_head.weight"),
        tensors,
        abstract,
        lambda name: config.decoder.tied_head and name == "lm_head.weight",
    )
    ids = np.random.default_rng(0).integers(0, 99, (1, 40))
    batch = empty_batch(Bucket(rows=1, slots=0, tokens=40, patches=16, patch_bytes=784))
    batch.tokens[:], batch.positions[:], batch.segments[:] = ids, np.arange(40), 1
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    ours = uhd.logits(params, batch, config)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(ours, expected, atol=5e-5, rtol=0)
