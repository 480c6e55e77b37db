"""The published v1's resampler against the stored outputs of the PyTorch module, and its tensors' names."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uhd_jax.config import ConnectorConfig
from uhd_jax.convert.llava_uhd import resampler_table
from uhd_jax.convert.tables import ConvertError, export_tensors, flatten, import_tensors
from uhd_jax.models.resampler import SpatialResampler, position_table

GOLDEN = np.load(Path(__file__).parent / "golden" / "a_v1_resampler.npz")
NAMES = ["8x8", "5x9", "11x4", "3x14", "7x6"]
GRIDS = [tuple(map(int, name.split("x"))) for name in NAMES]
TOLERANCE = 2e-5
PREFIX = "model.mm_projector."
MODULE = SpatialResampler(ConnectorConfig("spatial_resampler", query_side=4), 32, 4, jnp.float32)

_apply = jax.jit(MODULE.apply)


def _checkpoint() -> dict[str, np.ndarray]:
    return {PREFIX + key.removeprefix("sd/"): GOLDEN[key] for key in GOLDEN if key.startswith("sd/")}


def _abstract() -> dict:
    views = jnp.zeros((1, 4, 24)), jnp.full((1, 2), 2), jnp.zeros((1, 4, 588))
    return {"connector": jax.eval_shape(MODULE.init, jax.random.key(0), *views)["params"]}


@pytest.fixture(scope="module")
def params():
    return import_tensors(resampler_table(PREFIX), _checkpoint(), _abstract())


def _run(params: dict, names: list[str], room: int) -> np.ndarray:
    """Outputs of views with noise behind their features; the name "" is an empty slot."""
    features = np.random.default_rng(0).normal(size=(len(names), room, 24)).astype(np.float32) * 10
    grids = np.zeros((len(names), 2), np.int32)
    for view, name in enumerate(names):
        if name:
            grids[view] = GRIDS[NAMES.index(name)]
            features[view, : grids[view].prod()] = GOLDEN[f"x_{name}"][0]
    return np.asarray(_apply({"params": params["connector"]}, features, grids, np.zeros((len(names), room, 588))))


def _assert_golden(out: np.ndarray, names: list[str]) -> None:
    assert np.isfinite(out).all()
    for view, name in zip(out, names, strict=True):
        if name:
            np.testing.assert_allclose(view, GOLDEN[f"y_{name}"][0], atol=TOLERANCE, rtol=0, err_msg=name)


@pytest.mark.parametrize("room", [64, 300])
def test_all_grids_in_one_program(params, room):
    names = ["", *NAMES[:3], "", *NAMES[3:]]
    _assert_golden(_run(params, names, room), names)


@pytest.mark.parametrize("name", NAMES)
def test_each_grid_alone(params, name):
    _assert_golden(_run(params, [name], int(np.prod(GRIDS[NAMES.index(name)]))), [name])


def test_one_program_for_every_grid(params):
    before = _apply._cache_size()
    for names in (NAMES, NAMES[::-1], [*NAMES[:-1], ""]):
        _assert_golden(_run(params, names, 80), names)
    assert _apply._cache_size() == before + 1


def test_start_of_the_position_table():
    np.testing.assert_allclose(position_table(12, 64), GOLDEN["sincos_12_dim64"], atol=1e-6, rtol=0)


def test_tensors_survive_the_round_trip(params):
    out = export_tensors(resampler_table(PREFIX), params)
    given = _checkpoint()
    assert out.keys() == given.keys()
    for name, tensor in given.items():
        np.testing.assert_array_equal(out[name], tensor, err_msg=name)
        assert out[name].dtype == tensor.dtype and out[name].flags.c_contiguous


def _without(name: str) -> dict:
    tensors = _checkpoint()
    del tensors[PREFIX + name]
    return tensors


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (_without("attn.in_proj_weight"), r"missing .*attn.in_proj_weight \(for connector/attention/value/kernel"),
        (_checkpoint() | {PREFIX + "extra": np.zeros(3)}, r"unexpected .*extra"),
        (_checkpoint() | {PREFIX + "attn.in_proj_bias": np.zeros(97)}, r"in_proj_bias has shape \(97,\)"),
        (_checkpoint() | {PREFIX + "attn.in_proj_bias": np.zeros(99)}, r"in_proj_bias has shape \(99,\)"),
        (_checkpoint() | {PREFIX + "attn.in_proj_bias": np.zeros(())}, r"in_proj_bias has shape \(\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tensors, message):
    with pytest.raises(ConvertError, match=message):
        import_tensors(resampler_table(PREFIX), tensors, _abstract())


def test_a_part_that_nobody_uses_is_an_error(params):
    fewer, abstract = {"connector": dict(params["connector"])}, _abstract()
    for tree in (fewer["connector"], abstract["connector"]):
        tree["attention"] = {name: leaf for name, leaf in tree["attention"].items() if name != "key"}
    with pytest.raises(ConvertError, match=r"does not use part 1 of .*in_proj_weight"):
        import_tensors(resampler_table(PREFIX), _checkpoint(), abstract)
    with pytest.raises(ConvertError, match=r"part.*\n.*in_proj_bias"):
        export_tensors(resampler_table(PREFIX), fewer)


def test_every_parameter_has_a_name():
    assert set(flatten(_abstract())) == {entry.ours for entry in resampler_table(PREFIX)}
