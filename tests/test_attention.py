"""Attention: values and gradients against JAX's own; kernels against plain attention; which of them a program gets."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uhd_jax.config import MeshConfig
from uhd_jax.models import attending
from uhd_jax.ops import attention as plain
from uhd_jax.ops import attention_kernels as kernels
from uhd_jax.ops.attention import attention, view_segments
from uhd_jax.sharding.mesh import make_mesh


def _inputs(length, heads=6, key_heads=2, head_dim=8, rows=2, dtype="float32"):
    random = np.random.default_rng(0)
    return [
        jnp.asarray(random.normal(size=(rows, length, n, head_dim)), dtype)
        for n in (heads, key_heads, key_heads, heads)
    ]


def _packed(length, rows=2):
    """Samples of different lengths, padding behind them in the first row alone."""
    random = np.random.default_rng(1)
    segments = 1 + np.cumsum(random.random((rows, length)) < 4 / length, axis=1)
    segments[0, -length // 5 :] = 0
    return jnp.asarray(segments, jnp.int32)


def _both(function, inputs):
    """The output, and the gradients of its product with weights."""
    *inputs, weights = inputs

    @jax.jit
    def total(*inputs):
        out = function(*inputs)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    (_, out), gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(*inputs)
    return out, *gradients


def _assert_same(ours, expected, tolerance, seen=slice(None)):
    for a, b in zip(ours, expected, strict=True):
        a, b = (np.asarray(array, np.float32) for array in (a, b))
        np.testing.assert_allclose(a[seen], b[seen], atol=tolerance * np.abs(b).max(), rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_with_grouped_heads(dtype, tolerance, masked):
    inputs = _inputs(7, dtype=dtype)
    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1]]) if masked else None
    mask = (segments[:, :, None] == segments[:, None, :])[:, None] if masked else None
    reference = functools.partial(jax.nn.dot_product_attention, mask=mask, is_causal=masked, implementation="xla")
    ours = _both(functools.partial(attention, segments=segments, causal=masked), inputs)
    assert ours[0].dtype == dtype
    _assert_same(ours, _both(reference, inputs), tolerance)


@pytest.mark.parametrize("causal", [False, True])
def test_long_rows_in_blocks(causal, monkeypatch):
    inputs, segments = _inputs(37), _packed(37)
    whole = functools.partial(attention, segments=segments, causal=causal)
    expected = _both(whole, inputs)
    monkeypatch.setattr(plain, "BLOCK", 8)
    monkeypatch.setattr(plain, "LONG", 37**2)
    assert "scan" in str(jax.make_jaxpr(whole)(*inputs[:3]))  # one body for all blocks
    _assert_same(_both(whole, inputs), expected, 2e-6)


def test_a_query_that_may_look_nowhere_gets_the_mean():
    value = jnp.arange(12.0).reshape(1, 3, 1, 4)
    out = attention(jnp.ones((1, 1, 1, 4)), value, value, jnp.ones((1, 1), int), jnp.zeros((1, 3), int))
    np.testing.assert_allclose(out[0, 0, 0], value[0, :, 0].mean(0))


@pytest.mark.parametrize(
    ("length", "padded", "block"),
    [(100, 128, 128), (577, 640, 128), (1024, 1024, 512), (1216, 1280, 256), (4900, 4992, 384)],
)
def test_tiles_of_a_row(length, padded, block):
    assert kernels.tiling(length) == (padded, block)


def test_splash_is_plain_attention():
    """Interpreted; two tiles, views of several lengths, of which none is a multiple of the tile."""
    segments, inputs = view_segments(jnp.array([150, 90]), 150), _inputs(150, heads=2, key_heads=2)
    splash = functools.partial(kernels.splash, segments=segments, causal=False, interpret=True)
    _assert_same(_both(splash, inputs), _both(functools.partial(attention, segments=segments), inputs), 5e-6)


def test_splash_on_a_mesh_is_plain_attention(monkeypatch):
    """In its `shard_map`: packed rows over data and fsdp, grouped heads over tensor."""
    monkeypatch.setattr(attending, "SHORT", 100)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    inputs, segments = _inputs(150, heads=4, key_heads=2, rows=4), _packed(150, rows=4)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def on_mesh(*inputs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return attending.self_attention(*inputs, segments, causal=True, implementation="splash")

    ours = _both(on_mesh, [jax.device_put(array, whole) for array in inputs])
    assert not ours[0].sharding.is_fully_replicated
    _assert_same(ours, _both(functools.partial(attention, segments=segments, causal=True), inputs), 5e-6)


@pytest.mark.parametrize("causal", [False, True], ids=["views", "packed"])
def test_what_cudnn_is_asked_for_is_plain_attention(causal, monkeypatch):
    """cuDNN itself needs a GPU; the same arguments go to JAX's own implementation here."""
    own = jax.nn.dot_product_attention

    def instead(*arguments, implementation, **options):
        assert implementation == "cudnn"
        return own(*arguments, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    inputs = _inputs(10)
    segments = _packed(10) if causal else view_segments(jnp.array([10, 6]), 10)
    weights = inputs[-1] if causal else inputs[-1] * segments[..., None, None]  # behind a prefix come zeros
    inputs = (*inputs[:-1], weights)
    ours = _both(functools.partial(kernels.cudnn, segments=segments, causal=causal), inputs)
    expected = _both(functools.partial(attention, segments=segments, causal=causal), inputs)
    _assert_same(ours[1:], expected[1:], 5e-6)
    _assert_same(ours[:1], expected[:1], 5e-6, np.asarray(segments > 0) if not causal else slice(None))


@pytest.mark.parametrize(
    ("implementation", "platform", "length", "dtype", "chosen"),
    [
        ("auto", "tpu", 1024, "bfloat16", "splash"),
        ("auto", "tpu", 64, "bfloat16", "xla"),  # the windows of the compressor
        ("auto", "gpu", 1024, "bfloat16", "cudnn"),
        ("auto", "gpu", 1024, "float32", "xla"),
        ("auto", "gpu", 1023, "bfloat16", "xla"),
        ("auto", "cpu", 1024, "bfloat16", "xla"),
        ("auto", None, 1024, "bfloat16", "xla"),
        ("xla", "tpu", 1024, "bfloat16", "xla"),
        ("splash", "cpu", 1024, "float32", "splash"),
    ],
)
def test_choice_follows_the_devices_of_the_mesh(implementation, platform, length, dtype, chosen):
    query = jax.ShapeDtypeStruct((1, length, 2, 128), dtype)
    assert attending.choose(implementation, platform, query, True) == chosen


@pytest.mark.parametrize("mesh", [False, True], ids=["no mesh", "a mesh of CPUs"])
def test_without_a_mesh_the_default_devices_choose(mesh, monkeypatch):
    called = []
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(kernels, "splash", lambda query, *_, **options: called.append(options) or query)
    one = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    inputs, segments = _inputs(attending.SHORT)[:3], _packed(attending.SHORT)
    with jax.sharding.use_abstract_mesh(one.abstract_mesh) if mesh else contextlib.nullcontext():
        jax.eval_shape(
            functools.partial(attending.self_attention, causal=True, implementation="auto"), *inputs, segments
        )
    assert called == ([] if mesh else [{"interpret": False, "causal": True}])
