"""The mesh, and the table of rules over models of full and demo size."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P

from uhd_jax.config import (
    COMPRESSORS,
    CompressorConfig,
    ConnectorConfig,
    DecoderConfig,
    MeshConfig,
    ModelConfig,
    PyramidConfig,
    TowerConfig,
)
from uhd_jax.config.presets import CLIP_L_14_336, VICUNA_7B
from uhd_jax.models import uhd
from uhd_jax.sharding.mesh import ShardingError, make_mesh
from uhd_jax.sharding.rules import (
    RULES,
    batch_sharding,
    check_rows,
    param_shardings,
    param_spec,
    place_batch,
    with_shardings,
)

FULL = ModelConfig(DecoderConfig(151_936, 4096, 12_288, 36, 32, 8, 128, qk_norm=True))
QWEN2 = dataclasses.replace(FULL, decoder=dataclasses.replace(FULL.decoder, qk_norm=False, qkv_bias=True))
QWEN35 = dataclasses.replace(
    FULL,
    decoder=DecoderConfig(
        vocab_size=248_094,
        width=1024,
        mlp_width=3584,
        layers=24,
        heads=8,
        kv_heads=2,
        head_dim=256,
        qk_norm=True,
        tied_head=True,
        rotary_dim=64,
        mrope_sections=(11, 11, 10),
        gated_attention=True,
        zero_centred_norm=True,
        full_attention_interval=4,
        delta_key_heads=16,
        delta_value_heads=16,
        delta_key_dim=128,
        delta_value_dim=128,
    ),
)
HIWIN = ModelConfig(
    DecoderConfig(**VICUNA_7B),
    TowerConfig(**CLIP_L_14_336),
    CompressorConfig("none"),
    ConnectorConfig("hiwin", pyramid=PyramidConfig(7)),
)
MODELS = {
    "full": FULL,
    "qwen2, tied": dataclasses.replace(QWEN2, decoder=dataclasses.replace(QWEN2.decoder, tied_head=True)),
    "post-ViT": dataclasses.replace(FULL, compressor=CompressorConfig("none"), connector=ConnectorConfig(rounds=2)),
    "hiwin": HIWIN,
    "qwen3.5": QWEN35,
    "tiny": tiny.MODEL,
    "tiny hybrid": tiny.HYBRID,
    **{f"tiny {name}": model for name, model in tiny.KINDS.items()},
} | {kind: dataclasses.replace(FULL, compressor=CompressorConfig(kind)) for kind in COMPRESSORS if kind != "none"}


def abstract(model):
    return jax.eval_shape(lambda key: uhd.init_params(model, key), jax.random.key(0))


@pytest.mark.parametrize("name", MODELS)
def test_exactly_one_rule_of_the_right_rank_for_every_parameter(name):
    for path, leaf in flatten_dict(abstract(MODELS[name]), sep="/").items():
        matching = [axes for pattern, axes in RULES if re.fullmatch(pattern, path)]
        assert len(matching) == 1, (path, matching)
        assert len(matching[0]) == len(leaf.shape), (path, leaf.shape, matching)


def test_no_rule_is_useless():
    paths = {path for model in MODELS.values() for path in flatten_dict(abstract(model), sep="/")}
    for pattern, _ in RULES:
        assert any(re.fullmatch(pattern, path) for path in paths), pattern


def test_full_model_is_split_over_fsdp_and_tensor():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = param_shardings(abstract(FULL), mesh)
    assert shardings["decoder"]["layers"]["mlp"]["gate"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert shardings["decoder"]["layers"]["attention"]["out"]["kernel"].spec == P(None, "tensor", "fsdp")
    assert shardings["decoder"]["embedding"].spec == P(None, "fsdp")
    assert shardings["tower"]["layers"]["mlp"]["fc2"]["bias"].spec == P(None, None)
    leaves = jax.tree.leaves(with_shardings(abstract(FULL), mesh))
    on_one = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    # Kernels are in four pieces, the two tables in two (the head in four).
    assert on_one / sum(leaf.size for leaf in leaves) < 0.27


def test_a_hybrid_decoder_is_split_over_fsdp_and_tensor():
    """MiniCPM-V 4.6 at its full size: 1,300,428,016 parameters, all kernels in four pieces."""
    shapes = abstract(QWEN35)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 1_300_428_016
    layers = with_shardings(shapes, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))["decoder"]["delta_layers"]
    assert layers["delta"]["qkv"]["kernel"].sharding.spec == P(None, "fsdp", "tensor")
    assert layers["delta"]["out"]["kernel"].sharding.spec == P(None, "tensor", "fsdp")
    leaves = jax.tree.leaves(layers)
    on_one = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    assert on_one / sum(leaf.size for leaf in leaves) < 0.27


def test_hiwin_is_split_over_fsdp_and_tensor():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    connector = with_shardings(abstract(HIWIN), mesh)["connector"]
    assert connector["level_2"]["kernel"].sharding.spec == P("fsdp", "tensor")
    assert connector["attention"]["key"]["kernel"].sharding.spec == P("fsdp", "tensor")
    assert connector["join"]["kernel"].sharding.spec == P("fsdp", "tensor")
    assert connector["upsampler"]["up1"]["range_temperature"].sharding.spec == P()
    leaves = jax.tree.leaves(connector)
    on_one = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    assert on_one / sum(leaf.size for leaf in leaves) < 0.27


@pytest.mark.parametrize("kind", ["bilinear_mlp", "perceiver", "spatial_resampler", "hiwin"])
def test_connectors_give_on_eight_devices_what_they_give_on_one(kind):
    """Without `whole_rows` in the resamplers, XLA divided a chain of products into other numbers, without a word."""
    connector = dataclasses.replace(tiny.KINDS[kind].connector, pyramid=PyramidConfig())
    module = uhd.connector(dataclasses.replace(tiny.KINDS[kind], connector=connector))
    random = np.random.default_rng(0)
    features = random.normal(size=(8, 16, 16)).astype(np.float32)
    rest = np.full((8, 2), 4, np.int32), np.zeros((8, 16, 12), np.float32)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), features, *rest))
    params = {"connector": tiny.random_params(shapes["params"])}

    @jax.jit
    def run(params, *views):
        def loss(params):
            out = module.apply({"params": params["connector"]}, *views)
            return jnp.mean(out**2), out

        return jax.grad(loss, has_aux=True)(params)

    expected = run(params, features, *rest)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    views = jax.device_put((features, *rest), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        ours = run(jax.device_put(params, param_shardings(params, mesh)), *views)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 + 1e-4 * np.abs(b).max())


def test_rules_speak_up():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    with pytest.raises(ShardingError, match="'decoder/surprise' is matched by 0 sharding rules"):
        param_spec("decoder/surprise", (8, 8), mesh)
    with pytest.raises(ShardingError, match=r"position_table' has shape \(8,\), but .*\('table', 'embed'\)"):
        param_spec("tower/position_table", (8,), mesh)


def test_a_dimension_that_does_not_divide():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    assert param_spec("tower/position_table", (4900, 12), mesh) == P(None, None)  # small: replicated
    with pytest.raises(ShardingError, match=r"position_table' of shape \(4900, 1156\): mesh axis fsdp=8 .* 1156"):
        param_spec("tower/position_table", (4900, 1156), mesh)


def test_mesh_sizes():
    assert dict(make_mesh(MeshConfig(data=-1, fsdp=2)).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert dict(make_mesh(MeshConfig(fsdp=-1, data=1), jax.devices()[:3]).shape) == {"data": 1, "fsdp": 3, "tensor": 1}
    assert make_mesh(MeshConfig()).axis_types == (jax.sharding.AxisType.Auto,) * 3
    for config, message in [
        (MeshConfig(data=3), "data=3xfsdp=1xtensor=1 does not fit 8 devices"),
        (MeshConfig(data=-1, fsdp=3), "data=-1xfsdp=3xtensor=1 does not fit 8 devices"),
        (MeshConfig(data=-1, fsdp=-1), "at most one may be -1"),
        (MeshConfig(data=0), "must be positive"),
    ]:
        with pytest.raises(ShardingError, match=message):
            make_mesh(config)


def test_rows_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    check_rows(16, 2, mesh)
    with pytest.raises(ShardingError, match="rows=12 with accumulation=1 .* data=2 x fsdp=4 .* multiple of 8"):
        check_rows(12, 1, mesh)
    batch = tiny.batch(0)
    placed = place_batch(batch, mesh)
    assert placed.bucket == batch.bucket
    assert placed.tokens.sharding.shard_shape(placed.tokens.shape) == (1, 16)
    np.testing.assert_array_equal(placed.patches, batch.patches)
