"""Attention against JAX's own, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uhd_jax.ops.attention import attention, packed_causal_mask


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_with_grouped_heads(dtype, tolerance, masked):
    random = np.random.default_rng(0)
    query, key, value, weights = (jnp.asarray(random.normal(size=(2, 7, heads, 8)), dtype) for heads in (6, 2, 2, 6))
    mask = packed_causal_mask(jnp.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1]])) if masked else None

    def total(function, query, key, value):
        return jnp.sum(function(query, key, value).astype(jnp.float32) * weights)

    def reference(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla")

    def ours(query, key, value):
        return attention(query, key, value, mask)

    assert ours(query, key, value).dtype == dtype

    def both(function):
        return function(query, key, value), jax.grad(total, (1, 2, 3))(function, query, key, value)

    for expected, actual in zip(*(jax.tree.leaves(both(function)) for function in (reference, ours)), strict=True):
        expected, actual = (np.asarray(array, np.float32) for array in (expected, actual))
        np.testing.assert_allclose(actual, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


def test_a_query_that_may_look_nowhere_gets_the_mean():
    value = jnp.arange(12.0).reshape(1, 3, 1, 4)
    out = attention(jnp.ones((1, 1, 1, 4)), value, value, jnp.zeros((1, 1, 1, 3), bool))
    np.testing.assert_allclose(out[0, 0, 0], value[0, :, 0].mean(0))
