"""Checksums: the same for the same values however they lie, another for any change; copies that differ are found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faulty import spoiled
from jax.sharding import NamedSharding, PartitionSpec

from uhd_jax.config import MeshConfig
from uhd_jax.sharding.checksums import checksums, differing_copies
from uhd_jax.sharding.mesh import make_mesh

RANDOM = np.random.default_rng(0)
TREE = {
    "kernel": RANDOM.standard_normal((3, 8, 4)).astype(np.float32),
    "half": jnp.asarray(RANDOM.standard_normal((8, 2)), jnp.bfloat16),
    "step": np.int32(7),
    "key": RANDOM.integers(0, 2**32, 2, np.uint32),
}


def by_hand(array):
    array = np.asarray(array)
    bits = np.atleast_1d(array).view(f"u{array.dtype.itemsize}").ravel().astype(np.uint64)
    return int(np.sum(bits * (2 * np.arange(bits.size, dtype=np.uint64) + 1)) % 2**32)


def test_the_formula_for_any_sharding():
    expected = {path: by_hand(leaf) for path, leaf in TREE.items()}
    assert checksums(TREE) == expected
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    specs = {"kernel": PartitionSpec(None, "fsdp"), "half": PartitionSpec(("data", "fsdp"))}
    placed = {
        path: jax.device_put(leaf, NamedSharding(mesh, specs.get(path, PartitionSpec()))) for path, leaf in TREE.items()
    }
    assert checksums(placed) == expected


@pytest.mark.parametrize("bit", [0, 9, 31])
def test_a_flipped_bit_and_an_exchange_are_noticed(bit):
    changed = TREE["kernel"].copy()
    changed.view(np.uint32)[1, 2, 3] ^= np.uint32(1 << bit)
    exchanged = TREE["kernel"].copy()
    exchanged[0, 0, 0], exchanged[2, 7, 3] = exchanged[2, 7, 3], exchanged[0, 0, 0]
    kept = checksums(TREE)
    for other in (changed, exchanged):
        assert {path for path, value in checksums(TREE | {"kernel": other}).items() if value != kept[path]} == {
            "kernel"
        }


@pytest.mark.parametrize(
    ("spec", "odd"),
    [
        (PartitionSpec(), 3),
        (PartitionSpec("fsdp"), 5),
        (PartitionSpec(None, ("tensor", "fsdp")), 6),
        (PartitionSpec(("data", "fsdp", "tensor")), None),  # no copies, so nothing to compare
    ],
)
def test_a_device_that_holds_something_else_is_named(spec, odd):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    array = jax.device_put(np.arange(64, dtype=np.float32).reshape(8, 8), NamedSharding(mesh, spec))
    fine = jax.device_put(np.float32(1), NamedSharding(mesh, PartitionSpec()))
    assert differing_copies({"array": array, "fine": fine}, mesh) == {}
    devices = mesh.devices.flatten()
    found = differing_copies({"array": spoiled(array, devices[odd or 0]), "fine": fine}, mesh)
    if odd is None:
        assert found == {}
        return
    (named,) = found["array"]
    copies = 8 // (2 if spec == PartitionSpec("fsdp") else 4 if spec else 1)
    # Of two copies nobody can say which is right; the first counts as usual.
    assert named == devices[odd] if copies > 2 else named in (devices[odd], devices[odd - 4])
    assert set(found) == {"array"}
