"""Training a whole MiniCPM-V 4.6: the gradient of the language loss, parameter by parameter, equals PyTorch's."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hf46 import make_checkpoint, torch_inputs

import uhd_jax
from uhd_jax.batch import Bucket
from uhd_jax.convert import minicpmv
from uhd_jax.convert.tables import export_tensors
from uhd_jax.data.chat import ImagePart, Message, encode_chat
from uhd_jax.data.packing import fill_batch
from uhd_jax.generation.assistant import Picture, Prepared
from uhd_jax.models import uhd
from uhd_jax.slicing.pixels import cut_views
from uhd_jax.slicing.plan import Size, plan_image

pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

RNG = np.random.default_rng(3)
PICTURES = [RNG.integers(0, 256, size, np.uint8) for size in ((90, 200, 3), (40, 30, 3))]
MESSAGES = [
    Message("user", (ImagePart(0), "What is this?")),
    Message("assistant", ("A house.",)),
    Message("user", ("And this?", ImagePart(1))),
    Message("assistant", ("A tree, I think.",)),
]


@pytest.mark.parametrize(
    ("text_type", "tied", "mode", "tolerance"),
    [("qwen3", False, "16x", 1e-4), ("qwen3_5_text", True, "16x", 2e-3), ("qwen3_5_text", False, "4x", 2e-3)],
)
def test_gradients_of_every_parameter(tmp_path, text_type, tied, mode, tolerance):
    theirs = make_checkpoint(tmp_path, text_type, tied=tied, mode=mode)
    ours = uhd_jax.load(tmp_path)
    config = ours.config
    plans = [plan_image(Size(*picture.shape[:2]), config) for picture in PICTURES]
    sample = encode_chat(MESSAGES, plans, ours.tokenizer, config.chat)
    views = [view for picture, plan in zip(PICTURES, plans, strict=True) for view in cut_views(picture, plan, 14)]
    patches = max(map(len, views))
    bucket = Bucket(1, len(views), len(sample.tokens) + 7, patches, config.tower.patch_bytes)
    batch = fill_batch([[(sample, views)]], bucket, config.visual_tokens(patches))
    (loss, count), gradient = jax.jit(
        jax.value_and_grad(lambda params: uhd.loss_sums(params, batch, config), has_aux=True)
    )(ours.params)
    assert count == sample.trained.sum() > 20

    pictures = tuple(Picture(*shown, config.mode) for shown in zip(PICTURES, plans, strict=True))
    inputs = torch_inputs(Prepared(sample, pictures, 14), config)
    logits = theirs(**inputs).logits[0]
    labels = torch.tensor(np.where(sample.trained, sample.tokens, -100)[1:].astype(np.int64))
    expected = torch.nn.functional.cross_entropy(logits[:-1], labels, reduction="sum")
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)

    found = export_tensors(minicpmv.table(config), jax.tree.map(np.asarray, gradient))
    parameters = dict(theirs.named_parameters())
    assert set(found) == set(parameters)
    largest = max(
        np.abs(parameter.grad.numpy()).max() for parameter in parameters.values() if parameter.grad is not None
    )
    for name, parameter in parameters.items():
        if parameter.grad is None:  # the compressor in the mode without it
            assert mode == "4x" and "vit_merger" in name and not found[name].any(), name
            continue
        grad = parameter.grad.numpy()
        # Shifting all keys by one vector changes nothing: the gradient of their bias is rounding error on both sides.
        scale = largest if name.endswith("k_proj.bias") else np.abs(grad).max()
        assert scale > 0, name
        np.testing.assert_allclose(found[name], grad, atol=tolerance * scale, rtol=0, err_msg=name)
