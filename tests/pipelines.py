"""A source of numbered samples, the pipeline over it, and what tests ask of its batches."""

import dataclasses

import numpy as np

from uhd_jax.config import (
    CompressorConfig,
    DataConfig,
    DecoderConfig,
    ModelConfig,
    SlicingConfig,
    StageConfig,
    TowerConfig,
    TrainConfig,
)
from uhd_jax.data.chat import ImagePart, Message
from uhd_jax.data.pipeline import make_iterator
from uhd_jax.data.tokenizer import byte_tokenizer
from uhd_jax.slicing.plan import Size

TOKENIZER = byte_tokenizer()
MODEL = ModelConfig(
    decoder=DecoderConfig(vocab_size=288, width=32, mlp_width=64, layers=2, heads=2, kv_heads=2, head_dim=16),
    tower=TowerConfig(width=32, mlp_width=64, layers=3, heads=2),
    compressor=CompressorConfig(after_layer=0),
    slicing=SlicingConfig(scale_resolution=112),
)


class Numbered:
    """Samples that say their number, with images of several sizes."""

    def __init__(self, count=40, images=True, answer="{}"):
        self._count, self._images, self._answer = count, images, answer

    def __len__(self):
        return self._count

    def sizes(self, index):
        return [Size(112, 112 * (1 + index % 3))] if self._images and index % 4 else []

    def messages(self, index):
        parts = tuple(map(ImagePart, range(len(self.sizes(index)))))
        return Message("user", (*parts, f"<{index}>")), Message("assistant", (self._answer.format(index),))

    def images(self, index):
        return [np.random.default_rng(index).integers(0, 256, (*size, 3), np.uint8) for size in self.sizes(index)]


def iterator(source, process=(0, 1), model=MODEL, train=None, dropped=None, together=False, known=None, **stage):
    options = {"packed_length": 160, "rows": 4, "bucket_budget": 2} | stage
    stage = StageConfig(
        name="s",
        data=DataConfig("test"),
        steps=1,
        learning_rate=1.0,
        learning_rate_min=0.0,
        trainable=("tower",),
        **options,
    )
    train = TrainConfig(stages=(stage,), **({"packing_window": 24} | (train or {})))
    return make_iterator(stage, model, train, source, TOKENIZER, process, dropped, together, known)


def numbers_of(batch):
    """The numbers of the samples in a batch, in reading order."""
    found = []
    for tokens, segments in zip(batch.tokens, batch.segments, strict=True):
        for segment in range(1, segments.max() + 1):
            found.append(int(TOKENIZER.decode(tokens[segments == segment]).split("<")[1].split(">")[0]))
    return found


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True))


def take(batches, count):
    return [next(batches) for _ in range(count)]
