"""The mesh, and the table of rules over the models of every configuration."""

import dataclasses
import functools
import itertools
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

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
from uhd_jax.config import from_config_dict as build
from uhd_jax.config.presets import CLIP_L_14_336, VICUNA_7B
from uhd_jax.models import uhd
from uhd_jax.sharding.mesh import ShardingError, _arrange, make_mesh
from uhd_jax.sharding.rules import (
    RULES,
    check_decoder,
    check_params,
    check_rows,
    param_shardings,
    param_spec,
    place_batch,
    with_shardings,
)
from uhd_jax.sharding.views import fold_views, unfold_views
from uhd_jax.training import vdim

pytestmark = pytest.mark.usefixtures("unoptimised")

ROOT = Path(__file__).parents[1]

FULL = ModelConfig(DecoderConfig(151_936, 4096, 12_288, 36, 32, 8, 128, qk_norm=True))
QWEN2 = dataclasses.replace(FULL, decoder=dataclasses.replace(FULL.decoder, qk_norm=False, qkv_bias=True))
HIWIN = ModelConfig(
    DecoderConfig(**VICUNA_7B),
    TowerConfig(**CLIP_L_14_336),
    CompressorConfig("none"),
    ConnectorConfig("hiwin", pyramid=PyramidConfig(7)),
)
# Of every file the options that change what parameters there are; others change sizes, schedules or data.
CONFIGS = {
    "bench": (None,),  # takes none
    "demo": ("v1", "v2", "v4"),
    "finetune": (),  # its model is that of a folder
    "minicpm_v_4_6": ("",),
    "records": ("data.jsonl",),
    "uhd_v1": ("", "7b,arxiv", "mlp"),
    "uhd_v2": ("", "13b", "qwen2", "paper", "mask=15,pyramid=deconvolution", "pyramid=bilinear", "connector=perceiver"),
    "uhd_v2_vdim": ("", "13b,released"),
    "uhd_v4": ("", "tower=moonvit", "encoding=global,compressor=none"),
}
CONFIGS["uhd_v2"] += ("connector=bilinear_mlp",)


def model_of(file, argument=""):
    get_config = runpy.run_path(str(ROOT / f"configs/{file}.py"))["get_config"]
    return build(get_config() if argument is None else get_config(argument)).model


QWEN35 = model_of("minicpm_v_4_6")
MODELS = {
    "qwen2, tied": dataclasses.replace(QWEN2, decoder=dataclasses.replace(QWEN2.decoder, tied_head=True)),
} | {kind: dataclasses.replace(FULL, compressor=CompressorConfig(kind)) for kind in COMPRESSORS if kind != "none"}


@functools.cache
def abstract(model):
    return jax.eval_shape(lambda key: uhd.init_params(model, key), jax.random.key(0))


def shapes():
    """Name of model -> shapes by path, the scaffolds of v2's pre-training with them."""
    models = dict(MODELS)
    for path in (ROOT / "configs").glob("*.py"):
        models |= {f"{path.stem}:{argument}": model_of(path.stem, argument) for argument in CONFIGS[path.stem]}
    trees = {name: abstract(model) for name, model in models.items()}
    for form in ("paper", "released"):
        scaffold = jax.eval_shape(functools.partial(vdim.init_scaffold, HIWIN, form), jax.random.key(0))
        trees[form] = {"scaffold": scaffold}
    return {
        name: {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()} for name, tree in trees.items()
    }


def test_exactly_one_rule_of_the_right_rank_for_every_parameter_and_none_is_useless():
    used = set()
    for name, parameters in shapes().items():
        for path, shape in parameters.items():
            matching = [(pattern, axes) for pattern, axes in RULES if re.fullmatch(pattern, path)]
            assert len(matching) == 1, (name, path, matching)
            assert len(matching[0][1]) == len(shape), (name, path, shape, matching)
            used.add(matching[0][0])
    assert used == {pattern for pattern, _ in RULES}


def test_full_model_is_split_over_fsdp_and_tensor():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = param_shardings(abstract(FULL), mesh)
    assert shardings["decoder"]["layers"]["mlp"]["gate"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert shardings["decoder"]["layers"]["attention"]["out"]["kernel"].spec == P(None, "tensor", "fsdp")
    assert shardings["decoder"]["embedding"].spec == P(None, ("fsdp", "tensor"))
    assert shardings["tower"]["layers"]["mlp"]["fc2"]["bias"].spec == P(None, None)
    leaves = jax.tree.leaves(with_shardings(abstract(FULL), mesh))
    on_one = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    # Kernels, embedding and head are in four pieces, the tower's position table in two.
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


@pytest.mark.parametrize("kind", ["bilinear_mlp", "perceiver", "moonvit"])
def test_vision_gives_on_eight_devices_what_it_gives_on_one(kind):
    """Rows of five views, which four devices do not share evenly; other kinds are in test_meshes.py."""
    model = tiny.KINDS[kind]
    pyramid = PyramidConfig(3, "deconvolution") if kind == "bilinear_mlp" else PyramidConfig()
    model = dataclasses.replace(model, connector=dataclasses.replace(model.connector, pyramid=pyramid))
    batch = tiny.batch(0, dataclasses.replace(tiny.BUCKET, slots=5))
    batch.patches[:], batch.patch_grids[:, :3] = np.random.default_rng(0).integers(0, 256, batch.patches.shape), (2, 4)
    params = {name: tiny.random_params(abstract(model)[name]) for name in ("tower", "connector")}

    @jax.jit
    def run(params, batch):
        def loss(params):
            views = uhd.encode_views(params, fold_views(batch.patches), fold_views(batch.patch_grids), model)
            rows = unfold_views(views, *batch.patches.shape[:2])
            return jnp.mean(rows[:, :3, :2] ** 2), rows[:, :3, :2]

        return jax.grad(loss, has_aux=True)(params)

    expected = run(params, batch)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, sequence=2, tensor=2))
    with jax.set_mesh(mesh):
        ours = run(jax.device_put(params, param_shardings(params, mesh)), place_batch(batch, mesh))
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
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2))
    assert dict(mesh.shape) == {"dcn_data": 1, "data": 4, "fsdp": 2, "sequence": 1, "tensor": 1}
    assert make_mesh(MeshConfig(fsdp=-1, data=1), jax.devices()[:3]).shape["fsdp"] == 3
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 5
    for config, message in [
        (MeshConfig(data=3), "data=3 x fsdp=1 x sequence=1 x tensor=1 does not fit 8 devices"),
        (MeshConfig(data=-1, fsdp=3), "data=-1 x fsdp=3 x sequence=1 x tensor=1 does not fit 8 devices"),
        (MeshConfig(data=-1, fsdp=-1), "at most one may be -1"),
        (MeshConfig(data=0), "must be positive"),
    ]:
        with pytest.raises(ShardingError, match=message):
            make_mesh(config)


def stand_ins(platform, slices, side=4, processes=1):
    """Devices of `slices` squares, each with so many processes."""
    cells = list(itertools.product(range(slices), range(side), range(side)))
    kind = "TPU v5 lite" if platform == "tpu" else platform
    return [
        SimpleNamespace(
            id=number,
            platform=platform,
            device_kind=kind,
            process_index=number * slices * processes // len(cells),
            slice_index=cell[0],
            coords=(*cell[1:], 0),
            core_on_chip=0,
        )
        for number, cell in enumerate(cells)
    ]


def test_copies_over_the_slow_network_are_whole_slices():
    arranged = _arrange(stand_ins("tpu", 2, processes=4), (2, 1, 8, 1, 2), "asked")
    assert arranged.shape == (2, 1, 8, 1, 2)
    assert [{device.slice_index for device in part.flat} for part in arranged] == [{0}, {1}]
    assert len({id(device) for device in arranged.flat}) == 32
    for sizes in [(1, 4, 8, 1, 1), (4, 1, 8, 1, 1)]:
        with pytest.raises(ShardingError, match="these devices are 2 TPU slices.* set dcn_data=2, .* 16 devices"):
            _arrange(stand_ins("tpu", 2), sizes, "asked")
    assert _arrange(stand_ins("tpu", 1), (2, 1, 8, 1, 1), "asked").shape == (2, 1, 8, 1, 1)


@pytest.mark.parametrize(("processes", "copies"), [(4, 2), (2, 2), (2, 4), (8, 2)])
def test_elsewhere_they_are_whole_processes_or_parts_of_one(processes, copies):
    devices = stand_ins("cuda", 1, processes=processes)
    arranged = _arrange(devices[::-1], (copies, 1, 16 // copies, 1, 1), "asked")
    groups = [{device.process_index for device in part.flat} for part in arranged]
    assert [len(group) for group in groups] == [max(1, processes // copies)] * copies
    if processes >= copies:
        assert not set.intersection(*groups)


def test_processes_that_do_not_make_equal_groups_are_refused():
    devices = [SimpleNamespace(id=n, platform="cuda", process_index=n // 2) for n in range(6)]
    with pytest.raises(ShardingError, match="3 processes do not make 2 equal groups; set dcn_data to a divisor of 3"):
        _arrange(devices, (2, 3, 1, 1, 1), "asked")


def test_parameters_left_whole_on_a_mesh_that_should_split_them_are_refused():
    """Vectors are never split; a few may be whole in any model."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, sequence=2))
    params = {"decoder": {"embedding": jnp.zeros((64, 2**15))}, "tower": {"class_token": jnp.zeros(2**14)}}
    check_params(params, mesh)
    params["tower"]["class_token"] = jnp.zeros(2**21)
    message = r"fsdp=4 sequence=2 leaves 50\.0% .*tolerance=0.02; the largest: tower/class_token \(2097152,\)"
    with pytest.raises(ShardingError, match=message):
        check_params(params, mesh)
    check_params(params, mesh, 0.5)
    check_params(params, make_mesh(MeshConfig(data=8)))


def test_heads_that_do_not_spread_are_refused():
    decoder = dataclasses.replace(FULL.decoder, heads=12, kv_heads=4)
    mesh = make_mesh(MeshConfig(data=1, sequence=4, tensor=2))
    with pytest.raises(ShardingError, match="decoder.heads=12 do not spread over tensor=2 x sequence=4"):
        check_decoder(decoder, mesh)
    mesh = make_mesh(MeshConfig(data=1, sequence=2, tensor=3), jax.devices()[:6])
    with pytest.raises(ShardingError, match="kv_heads=4 do not spread over tensor=3 x sequence=2: 2 heads .* in part"):
        check_decoder(decoder, mesh)
    for sizes in [(1, 2), (2, 2), (2, 4)]:
        mesh = make_mesh(MeshConfig(data=-1, sequence=sizes[0], tensor=sizes[1]))
        check_decoder(FULL.decoder, mesh)


def test_initialisation_never_has_a_whole_tree_on_one_device():
    """From the compiled program: what it gives and what it works on, per device."""
    wide = dataclasses.replace(tiny.MODEL.decoder, vocab_size=4096, width=256, mlp_width=1024)
    model = dataclasses.replace(tiny.MODEL, decoder=wide)
    target = with_shardings(abstract(model), make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
    init = jax.jit(functools.partial(uhd.init_params, model), out_shardings=shardings)
    program = init.lower(jax.random.key(0)).compile()
    memory, whole = program.memory_analysis(), sum(4 * leaf.size for leaf in jax.tree.leaves(target))
    assert memory.output_size_in_bytes < whole / 7
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < whole / 3


def test_rows_over_the_axes_of_the_batch():
    mesh = make_mesh(MeshConfig(dcn_data=2, data=1, fsdp=4))
    check_rows(16, 2, mesh)
    with pytest.raises(ShardingError, match="rows=12 .* dcn_data=2 x data=1 x fsdp=4 .* multiple of 8"):
        check_rows(12, 1, mesh)
    batch = tiny.batch(0)
    placed = place_batch(batch, mesh)
    assert placed.bucket == batch.bucket
    assert placed.tokens.sharding.shard_shape(placed.tokens.shape) == (1, 16)
    np.testing.assert_array_equal(placed.patches, batch.patches)
