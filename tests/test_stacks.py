"""Layers in arrays of their own give what the stacked tree gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from uhd_jax.generation import decode
from uhd_jax.models import uhd
from uhd_jax.models.stacks import Apart, apart, in_groups, run_stack

STACK = {"kernel": jnp.arange(24.0).reshape(6, 2, 2), "bias": jnp.arange(12.0).reshape(6, 2)}


@pytest.mark.parametrize(("start", "stop"), [(0, None), (2, 5)])
def test_run_stack(start, stop):
    def step(x, layer):
        x = jnp.tanh(x @ layer["kernel"] / 20 + layer["bias"])
        return x, x.sum()

    x = jnp.ones((3, 2))
    expected = run_stack(step, x, STACK, scan=True, remat="none", start=start, stop=stop)
    found = run_stack(step, x, apart(STACK), scan=True, remat="none", start=start, stop=stop)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_groups():
    numbers = jnp.arange(6)
    layers, indices = in_groups((apart(STACK), numbers), 3)
    assert len(layers) == 2 and isinstance(layers[1], Apart) and len(layers[1]) == 3
    np.testing.assert_array_equal(layers[1][2]["bias"], STACK["bias"][5])
    np.testing.assert_array_equal(indices, numbers.reshape(2, 3))


@pytest.mark.parametrize(
    ("config", "dtype"), [(tiny.MODEL, "float32"), (tiny.MODEL, "bfloat16"), (tiny.HYBRID, "float32")]
)
def test_a_decoder_read_layer_by_layer(config, dtype):
    config = dataclasses.replace(config, dtype=dtype)
    params = decode.as_computed(jax.jit(functools.partial(uhd.init_params, config))(jax.random.key(0)), config)
    read = decode.as_read(params)
    assert isinstance(read["decoder"]["layers"], Apart) and read["tower"] is params["tower"]
    assert decode.as_read(read) is read
    x = jax.random.normal(jax.random.key(1), (2, 7, config.decoder.width), config.dtype)
    segments = jnp.array([[1] * 7, [1] * 4 + [0] * 3])

    @jax.jit
    def two_steps(params):
        logits, cache = uhd.read_prompts(params, x, segments, config)
        room = {name: ((0, 0), (0, 0), (0, 3), (0, 0), (0, 0)) for name in ("key", "value")}
        cache = {name: jnp.pad(leaf, room[name]) if name in room else leaf for name, leaf in cache.items()}
        return logits, uhd.decode_step(params, jnp.array([5, 9]), jnp.array([7, 4]), cache, config, 8)

    found, expected = two_steps(read), two_steps(params)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    close = functools.partial(np.testing.assert_allclose, atol=2e-4 if dtype == "float32" else 0.1)  # rounding
    jax.tree.map(lambda a, b: close(np.float32(a), np.float32(b)), found, expected)
