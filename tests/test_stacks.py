"""Layers in arrays of their own give what the stacked tree gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from uhd_jax.generation import decode
from uhd_jax.models import uhd
from uhd_jax.models.stacks import Apart, apart, in_groups, run_stack

STACK = {"kernel": jnp.arange(24.0).reshape(6, 2, 2), "bias": jnp.arange(12.0).reshape(6, 2)}


@pytest.mark.parametrize(("start", "stop"), [(0, None), (2, 5), (0, 0)])
def test_run_stack(start, stop):
    def step(x, layer):
        x = jnp.tanh(x @ layer["kernel"] / 20 + layer["bias"])
        return x, x.sum()

    x = jnp.ones((3, 2))
    expected = run_stack(step, x, STACK, scan=True, remat="none", start=start, stop=stop)
    if stop == 0:
        assert expected[1].shape == (0,)
        return
    found = run_stack(step, x, apart(STACK), scan=True, remat="none", start=start, stop=stop)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_groups():
    numbers = jnp.arange(6)
    layers, indices = in_groups((apart(STACK), numbers), 3)
    assert len(layers) == 2 and isinstance(layers[1], Apart) and len(layers[1]) == 3
    np.testing.assert_array_equal(layers[1][2]["bias"], STACK["bias"][5])
    np.testing.assert_array_equal(indices, numbers.reshape(2, 3))


@pytest.mark.parametrize("config", [tiny.MODEL, tiny.HYBRID], ids=["qwen3", "hybrid"])
def test_a_decoder_read_layer_by_layer(config):
    params = uhd.init_params(config, jax.random.key(0))
    read = decode.as_read(params)
    assert isinstance(read["decoder"]["layers"], Apart) and read["tower"] is params["tower"]
    x = jax.random.normal(jax.random.key(1), (2, 7, config.decoder.width))
    segments = jnp.array([[1] * 7, [1] * 4 + [0] * 3])
    expected = jax.jit(uhd.read_prompts, static_argnums=3)(params, x, segments, config)
    found = jax.jit(uhd.read_prompts, static_argnums=3)(read, x, segments, config)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-2 if a.dtype == jnp.bfloat16 else 1e-5), found, expected
    )
