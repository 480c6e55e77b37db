"""Embedding lookup and loss on a mesh, with no array of the vocabulary's size whole on any device.

Table and head lie in parts. For the lookup devices exchange token ids and what they found in their part of the width.
For the loss each device gathers a block of the head at a time, all of the width and some columns, and keeps of its
logits a running maximum and a sum of exponentials; the gradient gathers the blocks once more. No more logits exist on a
device at a time than of `loss_chunk` tokens with the whole vocabulary.

Everything here runs per device (`shard_map`) with gradients written out, so that the compiler has nothing to choose.
Dimension letters: B rows, T tokens, D width, V vocabulary, G devices that hold parts of the width, d width of a part,
C columns of a block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from uhd_jax.sharding.activations import mesh_in_use, pad_tokens
from uhd_jax.sharding.mesh import BATCH_AXES, row_shards
from uhd_jax.sharding.rules import PARAM_AXES, param_spec

BLOCKS = 8  # at least so many of a head that lies in parts

_TOKENS = PartitionSpec(BATCH_AXES, "sequence")
_TOKEN_AXES = (*BATCH_AXES, "sequence")


def _axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one dimension of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else entry or ()


def _per_device(function: Callable, mesh: AbstractMesh, inputs: Any, outputs: Any) -> Callable:
    return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


# --- lookup ---------------------------------------------------------------------------------------------------------


def lookup(table: jax.Array, tokens: jax.Array, dtype: Any) -> jax.Array:
    """float32[V, D] and int32[B, T] -> float[B, T, D] in `dtype`."""
    mesh = mesh_in_use()
    if mesh is None or len(tokens) % row_shards(mesh):
        return table[tokens].astype(dtype)
    length = tokens.shape[1]
    return _lookup(table, pad_tokens(tokens), table.shape, jnp.dtype(dtype), mesh)[:, :length]


class _Width(NamedTuple):
    """How the table's width is split."""

    outer: tuple[str, ...]  # axes of PARAM_AXES, whose devices have different tokens
    inner: tuple[str, ...]  # tensor, whose devices have the same

    @classmethod
    def of(cls, shape: tuple[int, ...], mesh: AbstractMesh) -> tuple[PartitionSpec, _Width]:
        """The table's spec, and what it says about the width."""
        spec = param_spec("decoder/embedding", shape, mesh)
        axes = _axes(spec[1])
        return spec, cls(tuple(a for a in axes if a in PARAM_AXES), tuple(a for a in axes if a not in PARAM_AXES))

    def tokens(self, tokens):
        """[B, T] of this device -> [G, B, T] of all devices that hold parts of the width."""
        return jax.lax.all_gather(tokens, self.outer) if self.outer else tokens[None]

    def exchange(self, parts):
        """[G, B, T, d]: parts for others -> parts from others; its own inverse."""
        return jax.lax.all_to_all(parts, self.outer, 0, 0, tiled=True) if self.outer else parts


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _lookup(table, tokens, shape, dtype, mesh):
    spec, width = _Width.of(shape, mesh)

    def local(part, tokens):
        found = width.exchange(part[width.tokens(tokens)].astype(dtype))
        found = jnp.moveaxis(found, 0, 2)[:, :, :, None]  # [B, T, G, 1, d]
        if width.inner:
            found = jax.lax.all_gather(found, width.inner, axis=3, tiled=True)
        return found.reshape(*tokens.shape, -1)

    return _per_device(local, mesh, (spec, _TOKENS), _TOKENS)(table, tokens)


def _lookup_forward(table, tokens, shape, dtype, mesh):
    return _lookup(table, tokens, shape, dtype, mesh), tokens


def _lookup_backward(shape, dtype, mesh, tokens, gradient):
    spec, width = _Width.of(shape, mesh)
    others = tuple(axis for axis in _TOKEN_AXES if axis not in width.outer)

    def local(tokens, gradient):
        inner = math.prod(mesh.shape[axis] for axis in width.inner)
        outer = math.prod(mesh.shape[axis] for axis in width.outer)
        parts = gradient.astype(jnp.float32).reshape(*tokens.shape, outer, inner, -1)
        if width.inner:
            parts = jax.lax.dynamic_index_in_dim(parts, jax.lax.axis_index(width.inner), 3, keepdims=True)
        parts = width.exchange(jnp.moveaxis(parts[:, :, :, 0], 2, 0))
        part = jnp.zeros((shape[0], parts.shape[-1]), jnp.float32).at[width.tokens(tokens)].add(parts)
        return jax.lax.psum(part, others)

    return _per_device(local, mesh, (_TOKENS, _TOKENS), spec)(tokens, gradient), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


# --- loss -----------------------------------------------------------------------------------------------------------


def cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, tied: bool, chunk_tokens: int
) -> jax.Array:
    """`ops.losses.weighted_cross_entropy` of the logits of `hidden`, float32[], on the mesh in use.

    Args:
      hidden: float[B, T, D]; T is a multiple of the mesh axis `sequence`.
      head: float32[D, V], or the embedding table float32[V, D] where `tied`.
      targets: int32[B, T].
      weights: float32[B, T].
      tied: which of the two `head` is.
      chunk_tokens: on a device no more logits exist at a time than of so many tokens.
    """
    return _cross_entropy(hidden, head, targets, weights, tied, chunk_tokens, mesh_in_use())


class _Head(NamedTuple):
    """Blocks of the head, as one device works through them."""

    tied: bool
    outer: tuple[str, ...]  # mesh axes that split the width
    tensor: tuple[str, ...]  # mesh axes whose devices take different columns of a block
    ways: int  # devices along `tensor`
    vocabulary: int
    blocks: int
    columns: int  # C

    @classmethod
    def of(cls, shape: tuple[int, ...], tied: bool, tokens: int, chunk: int, mesh: AbstractMesh):
        """The head's spec, and its blocks for so many tokens on a device."""
        spec = param_spec("decoder/embedding" if tied else "decoder/head", shape, mesh)
        width = _axes(spec[1 if tied else 0])
        outer = tuple(axis for axis in width if axis in PARAM_AXES)
        tensor = tuple(axis for axis in (width if tied else _axes(spec[1])) if axis not in PARAM_AXES)
        ways = math.prod(mesh.shape[axis] for axis in tensor)
        vocabulary = shape[0 if tied else 1]
        own = -(-vocabulary // ways)
        blocks = min(own, max(-(-tokens // chunk), BLOCKS if outer else 1))
        return spec, cls(tied, outer, tensor, ways, vocabulary, blocks, -(-own // blocks))

    def padded(self, part, dtype):
        """This device's part, its vocabulary filled up to whole blocks."""
        axis, size = (0, self.blocks * self.columns * self.ways) if self.tied else (1, self.blocks * self.columns)
        room = [(0, 0), (0, 0)]
        room[axis] = (0, size - part.shape[axis])
        return jnp.pad(part.astype(dtype), room)

    def kernel(self, part, block):
        """float[D, C] of the padded part."""
        if not self.tied:
            piece = jax.lax.dynamic_slice_in_dim(part, block * self.columns, self.columns, axis=1)
            return jax.lax.all_gather(piece, self.outer, axis=0, tiled=True) if self.outer else piece
        rows = self.columns * self.ways
        piece = jax.lax.dynamic_slice_in_dim(part, block * rows, rows, axis=0)
        if self.tensor:
            piece = jax.lax.all_to_all(piece, self.tensor, 0, 1, tiled=True)
        return (jax.lax.all_gather(piece, self.outer, axis=1, tiled=True) if self.outer else piece).T

    def scatter(self, gradient):
        """The gradient of `kernel`: float32[D, C] of this device's tokens -> what belongs to its part."""
        axis = 1 if self.tied else 0
        if self.tied:
            gradient = gradient.T
        if self.outer:
            gradient = jax.lax.psum_scatter(gradient, self.outer, scatter_dimension=axis, tiled=True)
        if self.tied and self.tensor:
            gradient = jax.lax.all_to_all(gradient, self.tensor, 1, 0, tiled=True)
        return gradient

    def joined(self, pieces, part):
        """The blocks' gradients [blocks, ..], stacked, as one array of the part's shape."""
        if self.tied:
            return pieces.reshape(-1, pieces.shape[-1])[: part.shape[0]]
        return jnp.moveaxis(pieces, 0, 1).reshape(part.shape[0], -1)[:, : part.shape[1]]

    def ids(self, block):
        """int32[C] ids of the block's columns, and bool[C] which of them exist."""
        way = jax.lax.axis_index(self.tensor) if self.tensor else 0
        column = jnp.arange(self.columns)
        if self.tied:
            ids = (block * self.ways + way) * self.columns + column
            return ids, ids < self.vocabulary
        own, column = self.vocabulary // self.ways, block * self.columns + column
        return way * own + column, column < own

    def logits(self, hidden, kernel, exist):
        """float32[B, T, C]."""
        logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
        return jnp.where(exist, logits, jnp.finfo(jnp.float32).min)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _cross_entropy(hidden, head, targets, weights, tied, chunk_tokens, mesh):
    return _forward(hidden, head, targets, weights, tied, chunk_tokens, mesh)[0]


def _plan(hidden, head, tied, chunk_tokens, mesh):
    tokens = hidden.shape[0] * hidden.shape[1] // math.prod(mesh.shape[axis] for axis in _TOKEN_AXES)
    return _Head.of(head.shape, tied, tokens, chunk_tokens, mesh)


def _forward(hidden, head, targets, weights, tied, chunk_tokens, mesh):
    spec, plan = _plan(hidden, head, tied, chunk_tokens, mesh)

    def local(hidden, part, targets, weights):
        part = plan.padded(part, hidden.dtype)

        def step(carry, block):
            highest, total, picked = carry
            ids, exist = plan.ids(block)
            logits = plan.logits(hidden, plan.kernel(part, block), exist)
            higher = jnp.maximum(highest, jnp.max(logits, axis=-1))
            total = total * jnp.exp(highest - higher) + jnp.sum(jnp.exp(logits - higher[..., None]), axis=-1)
            here = ids == targets[..., None]
            return (higher, total, picked + jnp.sum(jnp.where(here & exist, logits, 0), axis=-1)), None

        zero = jnp.zeros(targets.shape, jnp.float32)
        start = (jnp.full_like(zero, jnp.finfo(jnp.float32).min), zero, zero)
        (highest, total, picked), _ = jax.lax.scan(step, start, jnp.arange(plan.blocks))
        if plan.tensor:
            own, highest = highest, jax.lax.pmax(highest, plan.tensor)
            total = jax.lax.psum(total * jnp.exp(own - highest), plan.tensor)
            picked = jax.lax.psum(picked, plan.tensor)
        normaliser = highest + jnp.log(total)
        losses = jnp.where(weights > 0, (normaliser - picked) * weights, 0.0)
        return jax.lax.psum(jnp.sum(losses), _TOKEN_AXES), normaliser

    inputs = (_TOKENS, spec, _TOKENS, _TOKENS)
    loss, normaliser = _per_device(local, mesh, inputs, (PartitionSpec(), _TOKENS))(hidden, head, targets, weights)
    return loss, (hidden, head, targets, weights, normaliser)


def _backward(tied, chunk_tokens, mesh, kept, gradient):
    hidden, head, *rest = kept
    spec, plan = _plan(hidden, head, tied, chunk_tokens, mesh)
    others = tuple(axis for axis in _TOKEN_AXES if axis not in plan.outer)

    def local(hidden, part, targets, weights, normaliser, gradient):
        padded, factors = plan.padded(part, hidden.dtype), (weights * gradient)[..., None]

        def step(of_hidden, block):
            ids, exist = plan.ids(block)
            kernel = plan.kernel(padded, block)
            shares = jnp.exp(plan.logits(hidden, kernel, exist) - normaliser[..., None])
            shares -= (ids == targets[..., None]) & exist
            shares = jnp.where(weights[..., None] > 0, shares * factors, 0).astype(hidden.dtype)
            of_hidden += jnp.matmul(shares, kernel.T, preferred_element_type=jnp.float32)
            of_kernel = jnp.einsum("btd,btc->dc", hidden, shares, preferred_element_type=jnp.float32)
            return of_hidden, plan.scatter(of_kernel)

        zero = jnp.zeros(hidden.shape, jnp.float32)
        of_hidden, pieces = jax.lax.scan(step, zero, jnp.arange(plan.blocks))
        if plan.tensor:
            of_hidden = jax.lax.psum(of_hidden, plan.tensor)
        return of_hidden.astype(hidden.dtype), jax.lax.psum(plan.joined(pieces, part), others)

    inputs = (_TOKENS, spec, _TOKENS, _TOKENS, _TOKENS, PartitionSpec())
    of_hidden, of_head = _per_device(local, mesh, inputs, (_TOKENS, spec))(hidden, head, *rest, gradient)
    return of_hidden, of_head, None, None


_cross_entropy.defvjp(_forward, _backward)
