"""Lookup and loss with table and head in parts on a mesh, against the same without one."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from uhd_jax.config import MeshConfig
from uhd_jax.ops.losses import chunked_cross_entropy
from uhd_jax.sharding.mesh import BATCH_AXES, make_mesh
from uhd_jax.sharding.rules import param_spec
from uhd_jax.sharding.vocabulary import cross_entropy, lookup

pytestmark = pytest.mark.usefixtures("unoptimised")

ROWS, LENGTH, WIDTH = 4, 6, 16


def total_on_mesh(params, hidden, tokens, weights, tied):
    looked_up = lookup(params[0], tokens[:, :-1], jnp.float32)  # five tokens, which the mesh does not divide
    loss = cross_entropy(hidden, params[-1], tokens, weights, tied, 4)
    return loss + jnp.sum(looked_up * hidden[:, 1:]), looked_up


def total_alone(params, hidden, tokens, weights, tied):
    looked_up = params[0][tokens[:, :-1]]
    loss = chunked_cross_entropy(hidden, params[0].T if tied else params[1], tokens, weights, 100)
    return loss + jnp.sum(looked_up * hidden[:, 1:]), looked_up


@pytest.mark.parametrize("vocabulary", [101, 128])  # tensor divides the second alone
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_values_and_gradients_are_those_without_a_mesh_and_nothing_is_whole(tied, vocabulary):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, sequence=2, tensor=2))
    random = np.random.default_rng(0)
    table, head, hidden = (
        random.normal(size=shape).astype(np.float32)
        for shape in ((vocabulary, WIDTH), (WIDTH, vocabulary), (ROWS, LENGTH, WIDTH))
    )
    tokens = random.integers(0, vocabulary, (ROWS, LENGTH)).astype(np.int32)
    tokens[0, :3] = 0, vocabulary - 1, vocabulary - 1  # both ends; one more than once
    weights = random.choice(np.float32([0, 0.5, 1]), (ROWS, LENGTH))

    def differentiated(total):
        return jax.jit(jax.value_and_grad(functools.partial(total, tied=tied), (0, 1), has_aux=True))

    params = {"embedding": table} if tied else {"embedding": table, "head": head}
    inputs = (tuple(params.values()), hidden, tokens, weights)
    specs = tuple(param_spec(f"decoder/{name}", array.shape, mesh) for name, array in params.items())
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), (specs, *3 * [PartitionSpec(BATCH_AXES, "sequence")])
    )
    placed = jax.device_put(inputs, shardings)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = differentiated(total_on_mesh).lower(*placed).compile()
    ours, expected = compiled(*placed), differentiated(total_alone)(*inputs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)
    shapes = re.findall(r"\w\[([\d,]+)\]", compiled.as_text())
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert largest < vocabulary * WIDTH / 3  # tensor does not split a head that it does not divide
