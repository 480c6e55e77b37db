"""The gated delta rule: chunks, single tokens and NumPy in float64 agree; samples of a row do not meet."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from uhd_jax.config import MeshConfig
from uhd_jax.models.decoder import DeltaLayer
from uhd_jax.ops.gated_delta import (
    causal_convolution,
    chunked_delta,
    convolution_step,
    convolution_tail,
    recurrent_delta,
)
from uhd_jax.sharding.activations import over_tokens
from uhd_jax.sharding.mesh import make_mesh

HEADS, GROUPS, KEY, VALUE, CHANNELS, WIDTH = 2, 2, 6, 5, 7, 4
chunked = jax.jit(chunked_delta, static_argnames="chunk")
recurrent = jax.jit(recurrent_delta)
convolution, tail_of = jax.jit(causal_convolution), jax.jit(convolution_tail, static_argnums=1)


def inputs(rows, length, dtype=np.float32, seed=0, decay=1.0):
    random = np.random.default_rng(seed)
    query, key = (random.normal(size=(rows, length, HEADS, KEY)) for _ in range(2))
    value = random.normal(size=(rows, length, HEADS * GROUPS, VALUE))
    log_decay = -decay * random.exponential(size=(rows, length, HEADS * GROUPS))
    beta = random.uniform(size=log_decay.shape)
    arrays = [a.astype(jnp.dtype(dtype)) for a in (query, key, value)]
    return *arrays, log_decay.astype(np.float32), beta.astype(np.float32)


def by_hand(query, key, value, log_decay, beta, state=None):
    """One row of one sample in float64, straight from the formula."""
    query, key, value, log_decay, beta = (
        a.astype(np.float32).astype(np.float64) for a in (query, key, value, log_decay, beta)
    )
    out = np.zeros(value.shape)
    state = np.zeros((HEADS * GROUPS, KEY, VALUE)) if state is None else state.copy()
    for t in range(len(query)):
        for n in range(HEADS * GROUPS):
            q, k = (a[t, n // GROUPS] / np.sqrt(np.sum(a[t, n // GROUPS] ** 2) + 1e-6) for a in (query, key))
            state[n] *= np.exp(log_decay[t, n])
            state[n] += np.outer(k, beta[t, n] * (value[t, n] - k @ state[n]))
            out[t, n] = q @ state[n] / np.sqrt(KEY)
    return out, state


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [1, 15, 16, 37])
@pytest.mark.parametrize("rule", [functools.partial(chunked, chunk=16), recurrent], ids=["chunked", "recurrent"])
def test_equals_the_formula_in_float64(rule, length, dtype):
    given = inputs(2, length, dtype)
    out, state = rule(*given, np.ones((2, length), int))
    assert out.dtype == state.dtype == jnp.float32  # also from bfloat16: the core is not rounded
    for row in range(2):
        expected = by_hand(*(a[row] for a in given))
        np.testing.assert_allclose(out[row], expected[0], atol=2e-6, rtol=0)
        np.testing.assert_allclose(state[row], expected[1], atol=2e-6, rtol=0)


def test_chunk_of_64_at_a_length_that_is_no_multiple():
    given = inputs(1, 150)
    out, state = chunked(*given, np.ones((1, 150), int))
    expected = by_hand(*(a[0] for a in given))
    np.testing.assert_allclose(out[0], expected[0], atol=2e-6, rtol=0)
    np.testing.assert_allclose(state[0], expected[1], atol=2e-6, rtol=0)


@pytest.mark.parametrize("decay", [1e-4, 300.0])
def test_weak_and_strong_decay(decay):
    """A sum of 64 strong decays underflows as exponential and, as float32, swallows a weak one beside it."""
    query, key, value, log_decay, beta = inputs(1, 64, decay=decay)
    log_decay[:, 40:] *= 1e-5 if decay > 1 else 1
    given = query, key, value, log_decay, beta

    def total(*given):
        return jnp.sum(jnp.square(chunked(*given, np.ones((1, 64), int))[0]))

    out, _ = chunked(*given, np.ones((1, 64), int))
    np.testing.assert_allclose(out[0], by_hand(*(a[0] for a in given))[0], atol=2e-6, rtol=0)
    assert all(np.isfinite(g).all() for g in jax.jit(jax.grad(total, argnums=range(5)))(*given))


SEGMENTS = [
    [1] * 9 + [2] * 20 + [3] * 3 + [4] + [0] * 4,
    [0] * 5 + [1] * 16 + [0] * 3 + [2] * 11 + [0] * 2,
    [1] * 16 + [2] * 16 + [3] * 5,
]


@pytest.mark.parametrize("rule", [functools.partial(chunked, chunk=16), recurrent], ids=["chunked", "recurrent"])
def test_packed_equals_separate(rule):
    segments = np.array(SEGMENTS)
    given = inputs(*segments.shape)
    out, state = rule(*given, segments)
    for row, numbers in enumerate(segments):
        for number in range(1, numbers.max() + 1):
            places = np.flatnonzero(numbers == number)
            expected, last = by_hand(*(a[row, places] for a in given))
            np.testing.assert_allclose(out[row, places], expected, atol=2e-6, rtol=0)
        np.testing.assert_allclose(state[row], last, atol=2e-6, rtol=0)  # padding behind it changes nothing


def test_gradients_of_chunks_equal_those_of_single_tokens():
    segments = np.array(SEGMENTS)
    given = inputs(*segments.shape)
    weights = np.random.default_rng(1).normal(size=given[2].shape) * (segments > 0)[..., None, None]

    def gradients(rule):
        return jax.jit(jax.grad(lambda *a: jnp.sum(weights * rule(*a, segments)[0]), argnums=range(5)))(*given)

    for ours, expected in zip(gradients(functools.partial(chunked, chunk=8)), gradients(recurrent), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)
        assert not np.asarray(ours)[np.array(SEGMENTS) == 0].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_going_on_from_a_state(dtype):
    given = inputs(2, 41, dtype)
    segments = np.ones((2, 41), int)
    expected, last = chunked(*given, segments, chunk=16)
    out, state = chunked(*(a[:, :30] for a in given), segments[:, :30], chunk=16)
    np.testing.assert_allclose(out, expected[:, :30], atol=1e-6, rtol=0)
    more, after = chunked(*(a[:, 30:] for a in given), segments[:, 30:], state, chunk=16)
    np.testing.assert_allclose(more, expected[:, 30:], atol=1e-6, rtol=0)
    np.testing.assert_allclose(after, last, atol=1e-6, rtol=0)
    for t in range(30, 41):
        token, state = recurrent(*(a[:, t : t + 1] for a in given), segments[:, :1], state)
        np.testing.assert_allclose(token, expected[:, t : t + 1], atol=1e-6, rtol=0)
    np.testing.assert_allclose(state, last, atol=1e-6, rtol=0)


@pytest.mark.parametrize("length", [1, 2, 3, 12])
def test_convolution(length):
    random = np.random.default_rng(0)
    x, kernel = random.normal(size=(2, length, CHANNELS)), random.normal(size=(WIDTH, CHANNELS))
    segments = np.ones((2, length), int)
    ours = convolution(x.astype(np.float32), kernel.astype(np.float32), segments)
    padded = np.pad(x, ((0, 0), (WIDTH - 1, 0), (0, 0)))
    expected = np.stack([(padded[:, t : t + WIDTH] * kernel).sum(1) for t in range(length)], axis=1)
    np.testing.assert_allclose(ours, expected, atol=1e-6, rtol=0)
    tail = tail_of(x.astype(np.float32), WIDTH, segments)
    np.testing.assert_array_equal(tail, padded[:, -(WIDTH - 1) :].astype(np.float32))


def test_convolution_of_packed_rows_and_its_tail():
    random = np.random.default_rng(0)
    segments = np.array([*SEGMENTS, [0] * 37])
    x = random.normal(size=(*segments.shape, CHANNELS)).astype(np.float32)
    kernel = random.normal(size=(WIDTH, CHANNELS)).astype(np.float32)
    ours = np.asarray(convolution(x, kernel, segments))
    tails = np.asarray(tail_of(x, WIDTH, segments))
    for row, numbers in enumerate(segments):
        for number in range(1, numbers.max() + 1):
            places = np.flatnonzero(numbers == number)
            alone = convolution(x[row][places][None], kernel, np.ones((1, len(places)), int))
            np.testing.assert_allclose(ours[row, places], alone[0], atol=1e-6, rtol=0)
            tail = tail_of(x[row][places][None], WIDTH, np.ones((1, len(places)), int))[0]
        if numbers.any():
            np.testing.assert_array_equal(tails[row], tail)
            step = [convolution_step(x[row][None, :1], kernel, tail[None]) for tail in (tails[row], tail)]
            np.testing.assert_array_equal(*(np.asarray(out) for out, _ in step))


def test_convolution_token_by_token():
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(2, 9, CHANNELS)), jnp.bfloat16)
    kernel = random.normal(size=(WIDTH, CHANNELS)).astype(np.float32)
    expected = convolution(x, kernel, np.ones((2, 9), int))
    tail = jnp.zeros((2, WIDTH - 1, CHANNELS), x.dtype)
    for t in range(9):
        out, tail = convolution_step(x[:, t : t + 1], kernel, tail)
        np.testing.assert_allclose(out, expected[:, t : t + 1], atol=1e-6, rtol=0)
    assert tail.dtype == x.dtype


def test_a_layer_on_split_tokens_and_heads_gives_what_it_gives_on_one_device():
    """Two samples and padding in a row, longer than a chunk; every gradient."""
    layer, random = DeltaLayer(tiny.HYBRID.decoder, jnp.float32), np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(8, 82, 32)), jnp.float32)
    segments = jnp.asarray([[1] * 15 + [2] * 64 + [0] * 3] * 8)
    weights = jnp.asarray(random.normal(size=x.shape), jnp.float32) * (segments > 0)[..., None]
    params = tiny.random_params(jax.eval_shape(lambda: layer.init(jax.random.key(0), x[:1], segments[:1])))

    def loss(params, x):
        out, _ = layer.apply(params, over_tokens(x), segments)
        return jnp.sum(over_tokens(out) * weights)

    expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, sequence=2, tensor=4))):
        ours = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
