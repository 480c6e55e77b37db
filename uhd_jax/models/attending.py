"""Which implementation of self-attention a program gets, and where its pieces lie on the mesh."""

from __future__ import annotations

import functools
import math

import jax
from jax.sharding import AxisType, PartitionSpec

from uhd_jax.ops import attention_kernels as kernels
from uhd_jax.ops.attention import attention
from uhd_jax.sharding.rules import BATCH_AXES

SHORT = 256  # rows below this are left to XLA: a kernel would be mostly padding


def choose(implementation: str, platform: str | None, query: jax.Array, causal: bool) -> str:
    """The implementation for a query float[B, T, N, H]: "xla", "splash" or "cudnn".

    Args:
      implementation: of the configuration; "auto" leaves the choice here.
      platform: of the devices that the program is compiled for, which need not be there; None where no mesh says so.
      query: its shape and dtype are looked at.
      causal: whether rows are packed.
    """
    if query.shape[1] < SHORT:
        return "xla"
    if implementation != "auto":
        return implementation
    if platform == "tpu":
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
    """`ops.attention.attention` of a row with itself, by what suits the mesh in context.

    Kernels run in a `shard_map`, as the compiler cannot divide them: rows over the mesh axes of the batch, heads over
    `tensor` where it divides them. Inside of another one each device has its own rows already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    platform = device.platform if device else None
    chosen = choose(implementation, platform, query, causal) if segments is not None else "xla"
    if chosen == "xla":
        return attention(query, key, value, segments, causal=causal)
    if chosen == "splash":
        run = functools.partial(kernels.splash, causal=causal, interpret=platform != "tpu")
    else:
        run = functools.partial(kernels.cudnn, causal=causal)
    if mesh.empty or all(kind == AxisType.Manual for kind in mesh.axis_types):
        return run(query, key, value, segments)
    rows = tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
    while query.shape[0] % math.prod(mesh.shape[axis] for axis in rows):
        rows = rows[:-1]
    tensor = "tensor" if key.shape[2] % mesh.shape["tensor"] == 0 else None
    heads = PartitionSpec(rows, None, tensor, None)
    of_rows = PartitionSpec(rows, None)
    divided = jax.shard_map(run, in_specs=(heads, heads, heads, of_rows), out_specs=heads, check_vma=False)
    return divided(query, key, value, segments)
