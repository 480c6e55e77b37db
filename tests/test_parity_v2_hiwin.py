"""Hierarchical window attention and its pyramid against the released modules (golden e), and their tensors' names."""

from __future__ import annotations

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uhd_jax.config import ConnectorConfig, PyramidConfig
from uhd_jax.convert.hiwin import VISION_COPY, hiwin_dropped, hiwin_table
from uhd_jax.convert.tables import ConvertError, export_tensors, flatten, import_tensors
from uhd_jax.models.hiwin import Hiwin
from uhd_jax.models.resampler import SpatialResampler

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 2e-5
pytestmark = pytest.mark.usefixtures("unoptimised")
WIDTH, TOWER_WIDTH, HEADS, SIDE = 32, 8, 4, 4
ROOM = 21  # patches per view, more than any view has


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name) as file:
        return dict(file)


@pytest.fixture(scope="module")
def golden():
    return load("e_v2_hiwin.npz")


def config_of(mask: int, **changes) -> ConnectorConfig:
    return ConnectorConfig("hiwin", query_side=SIDE, pyramid=PyramidConfig(mask), **changes)


def views(golden: dict[str, np.ndarray], features: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Features, grids and patches of the four views and an empty slot between them; noise behind each view."""
    random = np.random.default_rng(0)
    grids = np.insert(golden["sizes_hw"], 2, 0, axis=0).astype(np.int32)
    cells = random.normal(size=(5, ROOM, TOWER_WIDTH)).astype(np.float32)
    patches = random.normal(size=(5, ROOM, 588)).astype(np.float32)
    for slot, number in enumerate((0, 1, None, 2, 3)):
        if number is not None:
            rows, cols = grids[slot]
            cells[slot, : rows * cols] = features[number, : rows * cols]
            split = golden[f"img_{number}"].reshape(3, rows, 14, cols, 14).transpose(1, 3, 0, 2, 4)
            patches[slot, : rows * cols] = split.reshape(rows * cols, -1)
    return jnp.asarray(cells), jnp.asarray(grids), jnp.asarray(patches)


USED = np.array([0, 1, 3, 4])  # the slots of `views` that hold the four


def weights_of(golden: dict[str, np.ndarray], mask: int) -> dict[str, np.ndarray]:
    return {name.removeprefix(f"sd{mask}/"): a for name, a in golden.items() if name.startswith(f"sd{mask}/")}


def params_of(golden: dict[str, np.ndarray], mask: int) -> dict:
    config = config_of(mask)
    dropped = hiwin_dropped(config, WIDTH, TOWER_WIDTH, "")
    example = views(golden, golden[f"m{mask}_feats"])
    abstract = jax.eval_shape(lambda: Hiwin(config, WIDTH, HEADS, jnp.float32).init(jax.random.key(0), *example))
    table, weights = hiwin_table(config, ""), weights_of(golden, mask)
    return import_tensors(table, weights, {"connector": abstract["params"]}, dropped.__contains__)["connector"]


@pytest.mark.parametrize("mask", [5, 7])
def test_outputs_keys_and_values(golden, mask):
    module = Hiwin(config_of(mask), WIDTH, HEADS, jnp.float32)
    attended = []

    def spy(following, args, kwargs, context):
        if context.module.name == "attention" and context.method_name == "__call__":
            attended.append(args)
        return following(*args, **kwargs)

    @jax.jit
    def run(params, features, grids, patches):
        with nn.intercept_methods(spy):
            out = module.apply({"params": params}, features, grids, patches)
        return out, attended.pop()[1:]

    features, grids, patches = views(golden, golden[f"m{mask}_feats"])
    params = params_of(golden, mask)
    together, (keys, values, own) = run(params, features, grids, patches)
    np.testing.assert_allclose(together[USED], golden[f"m{mask}_out"], atol=TOLERANCE, rtol=0)
    assert np.isfinite(together).all()
    third = int(np.argmax((grids == jnp.array([3, 5])).all(1)))
    for name, ours in (("key", keys), ("value", values)):
        np.testing.assert_allclose(ours[third][:, own[third]], golden[f"m{mask}_{name}_3x5"], atol=TOLERANCE, rtol=0)

    alone = [run(params, features[i : i + 1], grids[i : i + 1], patches[i : i + 1])[0][0] for i in USED]
    np.testing.assert_allclose(alone, golden[f"m{mask}_out"], atol=TOLERANCE, rtol=0)
    assert run._cache_size() == 2


@pytest.mark.parametrize("mask", [5, 7])
def test_bfloat16_is_as_near_to_float32_as_the_released_modules_are(golden, mask):
    """Both round, differently. So each is compared with the float32 run, and ours may be 1.25 times as far off."""
    rounded = load("e_v2_hiwin_bf16.npz")
    module = Hiwin(config_of(mask, box_dtype="bfloat16"), WIDTH, HEADS, jnp.bfloat16)
    example = views(golden, rounded[f"m{mask}_feats"])
    ours = jax.jit(module.apply)({"params": params_of(golden, mask)}, *example)
    assert ours.dtype == jnp.bfloat16
    ours_off = np.asarray(ours, np.float32)[USED] - golden[f"m{mask}_out"]
    theirs_off = rounded[f"m{mask}_out"] - golden[f"m{mask}_out"]
    assert np.abs(ours_off).max() <= 1.25 * np.abs(theirs_off).max()
    assert np.sqrt(np.mean(ours_off**2)) <= 1.25 * np.sqrt(np.mean(theirs_off**2))


@pytest.mark.parametrize("mask", [5, 7])
def test_names_in_both_directions(golden, mask):
    config, weights = config_of(mask), weights_of(golden, mask)
    back = export_tensors(hiwin_table(config, ""), {"connector": params_of(golden, mask)})
    for name, array in back.items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)
    left = {name: array.shape for name, array in weights.items() if name not in back}
    assert left == hiwin_dropped(config, WIDTH, TOWER_WIDTH, "")


def test_nothing_but_the_unused_is_dropped(golden):
    config = config_of(5)
    weights = weights_of(golden, 5) | {"query_5": np.zeros((16, WIDTH))}
    abstract = {"connector": jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params_of(golden, 5))}
    with pytest.raises(ConvertError, match=r"unexpected query_5 \(16, 32\)$"):
        import_tensors(
            hiwin_table(config, ""), weights, abstract, hiwin_dropped(config, WIDTH, TOWER_WIDTH, "").__contains__
        )


def connector_shapes(kind: type[nn.Module], config: ConnectorConfig, width: int) -> dict[str, tuple[int, ...]]:
    """Shapes at a released size; nothing is allocated."""
    example = jnp.zeros((1, 16, 1024)), jnp.full((1, 2), 4, jnp.int32), jnp.zeros((1, 16, 588))
    module = kind(config, width, width // 128, jnp.bfloat16)
    tree = jax.eval_shape(lambda: module.init(jax.random.key(0), *example))["params"]
    return {path: leaf.shape for path, leaf in flatten(tree).items()}


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(int(np.prod(shape)) for shape in shapes.values())


@pytest.mark.parametrize(("width", "mask", "millions"), [(4096, 7, "175.59"), (5120, 5, "266.68"), (3584, 5, "137.13")])
def test_parameters_of_the_released_sizes(width, mask, millions):
    config = ConnectorConfig("hiwin", pyramid=PyramidConfig(mask))
    ours = connector_shapes(Hiwin, config, width)
    upsampler = {path: shape for path, shape in ours.items() if path.startswith("upsampler/")}
    assert count(upsampler) == 1_062_066
    dropped = hiwin_dropped(config, width, 1024, "")
    projector = {name: shape for name, shape in dropped.items() if not name.startswith("upsampler.")}
    assert f"{(count(ours) - count(upsampler) + count(projector)) / 1e6:.2f}" == millions
    assert set(dropped) - set(projector) == {"upsampler.model.1.norm.weight", "upsampler.model.1.norm.bias"}
    assert not any(name.startswith(VISION_COPY) for name in dropped)


def test_parameters_of_v1():
    assert (
        f"{count(connector_shapes(SpatialResampler, ConnectorConfig('spatial_resampler'), 5120)) / 1e6:.2f}" == "137.84"
    )
