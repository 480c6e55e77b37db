"""Which implementation of self-attention a program gets, and where its pieces lie on the mesh."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from uhd_jax.ops import attention_kernels as kernels
from uhd_jax.ops.attention import attention
from uhd_jax.sharding.activations import by_tokens, dividing, mesh_in_use
from uhd_jax.sharding.mesh import BATCH_AXES

SHORT = 256  # rows below this are left to XLA: a kernel would be mostly padding


def choose(implementation: str, platform: str | None, query: jax.Array, causal: bool) -> str:
    """The implementation for a query float[B, T, N, H]: "xla", "splash" or "cudnn".

    Args:
      implementation: of the configuration; "auto" leaves the choice here.
      platform: of the devices that the program is compiled for, which need not be there; None: not known.
      query: its shape and dtype are looked at.
      causal: whether rows are packed.
    """
    if query.shape[1] < SHORT:
        return "xla"
    if implementation != "auto":
        return implementation
    if platform == "tpu" and query.dtype != jnp.float64:  # which is there to be exact
        return "splash"
    if platform in ("gpu", "cuda") and kernels.cudnn_takes(query, causal):
        return "cudnn"
    return "xla"


def self_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None,
    *,
    causal: bool,
    implementation: str,
) -> jax.Array:
    """`ops.attention.attention` of a row with itself, by what suits the mesh in context, or without one the
    process's default backend.

    On a mesh it runs in a `shard_map`: every device has its rows whole, and of their heads a part (`_over_heads`).
    Inside of another one each device has its own rows already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    platform = device.platform if device else jax.default_backend()  # one device's programs have no mesh
    chosen = choose(implementation, platform, query, causal) if segments is not None else "xla"
    run = {
        "xla": attention,
        "splash": functools.partial(kernels.splash, interpret=platform != "tpu"),
        "cudnn": kernels.cudnn,
    }[chosen]
    run = functools.partial(run, causal=causal)
    if mesh_in_use() is None or segments is None:
        return run(query, key, value, segments)
    return _over_heads(run, query, key, value, segments)


def _over_heads(run: Callable[..., jax.Array], query, key, value, segments) -> jax.Array:
    """`run` with rows over the mesh axes of the batch, and heads over `tensor` and `sequence`.

    Elsewhere `sequence` splits a row's tokens. Here they come together and heads go apart, and back behind it: so each
    device has the same share of causal work. Where a key head serves more query heads than a device has, all of its
    devices get it.
    """
    mesh = mesh_in_use()
    rows = dividing(mesh, BATCH_AXES, query.shape[0])
    shared = query.shape[2] // key.shape[2]  # query heads of a key head
    apart = dividing(mesh, ("tensor", "sequence"), query.shape[2])
    while (here := query.shape[2] // math.prod(mesh.shape[axis] for axis in apart)) % shared and shared % here:
        apart = apart[:-1]
    heads = PartitionSpec(rows, None, apart)
    key_heads = heads if here % shared == 0 else PartitionSpec(rows)

    def local(query, key, value, segments):
        if here % shared:
            number = jax.lax.axis_index(apart) * here // shared
            key, value = (jax.lax.dynamic_slice_in_dim(array, number, 1, axis=2) for array in (key, value))
        return run(query, key, value, segments)

    inputs = (heads, key_heads, key_heads, PartitionSpec(rows))
    divided = jax.shard_map(local, in_specs=inputs, out_specs=heads, check_vma=False)
    return by_tokens(divided(*map(by_tokens, (query, key, value)), segments))
