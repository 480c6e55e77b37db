"""A model of a few thousand parameters and random batches for it, for tests of training."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from uhd_jax.batch import Batch, Bucket, empty_batch
from uhd_jax.config import (
    CompressorConfig,
    ConnectorConfig,
    DataConfig,
    DecoderConfig,
    ModelConfig,
    PyramidConfig,
    RunConfig,
    StageConfig,
    TowerConfig,
    TrainConfig,
)
from uhd_jax.models import uhd

MODEL = ModelConfig(
    decoder=DecoderConfig(
        vocab_size=64, width=32, mlp_width=48, layers=2, heads=4, kv_heads=2, head_dim=8, qk_norm=True
    ),
    tower=TowerConfig(width=16, mlp_width=24, layers=3, heads=2, patch_size=2, table_side=8),
    compressor=CompressorConfig(after_layer=0),
    dtype="float32",
    loss_chunk=16,
)

_TOWER = TowerConfig("moonvit", width=16, mlp_width=24, layers=3, heads=2, patch_size=2, table_side=8)
_CLIP = dataclasses.replace(_TOWER, kind="clip", skipped_layers=1)
_CONNECTORS = {
    "mlp": ConnectorConfig("mlp"),
    "bilinear_mlp": ConnectorConfig("bilinear_mlp", pyramid=PyramidConfig(15, "deconvolution")),
    "perceiver": ConnectorConfig("perceiver", pyramid=PyramidConfig(15)),
    "spatial_resampler": ConnectorConfig("spatial_resampler"),
    "hiwin": ConnectorConfig("hiwin", pyramid=PyramidConfig(15)),
    "hiwin, one set of queries": ConnectorConfig("hiwin", query_sets=1),
}
# Every kind of tower, connector and pyramid beyond the above.
KINDS = {"moonvit": dataclasses.replace(MODEL, tower=_TOWER)} | {
    name: dataclasses.replace(
        MODEL,
        tower=_CLIP,
        compressor=CompressorConfig("none"),
        connector=dataclasses.replace(connector, query_side=2, heads=4),
    )
    for name, connector in _CONNECTORS.items()
}
# Qwen3.5's decoder: two groups of two gated delta layers and a full-attention layer.
HYBRID = dataclasses.replace(
    MODEL,
    decoder=dataclasses.replace(
        MODEL.decoder,
        layers=6,
        full_attention_interval=3,
        gated_attention=True,
        zero_centred_norm=True,
        delta_key_heads=2,
        delta_value_heads=4,
        delta_key_dim=8,
        delta_value_dim=12,
    ),
)
EVERYTHING = ("tower", "patch_embedding", "position_table", "compressor", "connector", "decoder")
ADAPTER = ("connector", "compressor", "position_table")
BUCKET = Bucket(rows=8, slots=2, tokens=16, patches=16, patch_bytes=MODEL.tower.patch_bytes)


def stage(**changes) -> StageConfig:
    values = dict(
        name="only",
        data=DataConfig("random"),
        steps=8,
        rows=BUCKET.rows,
        packed_length=BUCKET.tokens,
        learning_rate=1e-2,
        learning_rate_min=1e-3,
        trainable=EVERYTHING,
        warmup_steps=2,
        schedule="cosine",
    )
    return StageConfig(**(values | changes))


def run(stages=(stage(),), **changes) -> RunConfig:
    values = dict(stages=tuple(stages), checkpoint_every=3, log_every=1, peak_flops=1e12)
    return RunConfig("tiny", MODEL, TrainConfig(**(values | changes)))


def batch(seed: int, bucket: Bucket = BUCKET) -> Batch:
    """Each row: a view and a half-masked answer; the second half of the slots stays empty."""
    random = np.random.default_rng(seed)
    made = empty_batch(bucket)
    used = bucket.tokens - 2
    made.tokens[:, :used] = random.integers(1, 64, (bucket.rows, used))
    made.positions[:, :used] = np.arange(used)
    made.segments[:, :used] = 1
    made.loss_weights[:, 4:used] = random.integers(0, 3, (bucket.rows, used - 4)) / 2
    made.visual_index[:, 1] = 0
    made.patches[:, 0] = random.integers(0, 256, made.patches[:, 0].shape)
    made.patch_grids[:, 0] = 4
    return made


def random_params(shapes):
    """Parameters of the shapes of a tree: no zero or one by chance, and around one where a zero switches things off."""
    random = np.random.default_rng(0)

    def fill(path, leaf):
        centre = float(path[-1].key in ("scale", "spatial_sigma"))
        return random.normal(centre, 0.3, leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


@dataclasses.dataclass
class RandomBatches:
    """Batch number n is a function of n alone; every third is of a longer bucket."""

    number: int = 0
    buckets: tuple[Bucket, ...] = (BUCKET, BUCKET, dataclasses.replace(BUCKET, tokens=24))

    def __enter__(self) -> RandomBatches:
        return self

    def __exit__(self, *_) -> None:
        pass

    def __next__(self) -> tuple[Batch, dict[str, float]]:
        made = batch(self.number, self.buckets[self.number % len(self.buckets)])
        self.number += 1
        return made, {"images": float(made.patches.shape[0]), "dropped": float(self.number)}

    def get_state(self) -> dict[str, int]:
        return {"number": self.number}

    def set_state(self, state: dict[str, int]) -> None:
        self.number = state["number"]


init_params = functools.partial(uhd.init_params, MODEL)


def loss_sums(params, batch, key=None):
    return uhd.loss_sums(params, batch, MODEL)


def quick_loss_sums(params, batch, config):
    """In the place of `uhd.loss_sums`: every parameter has a gradient, and nothing takes long to compile."""
    guess = sum(jnp.mean(leaf + leaf**2) for leaf in jax.tree.leaves(params))
    return jnp.sum(batch.loss_weights * (guess - batch.tokens / 64) ** 2), jnp.sum(batch.loss_weights)


@functools.cache
def params():
    return jax.jit(init_params)(jax.random.key(0))
