"""The one struct that data, models, training and generation share: a packed batch of one bucket.

Dimension letters: B rows, S view slots per row, P patches per view, T tokens per row.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

_ALIGNMENT = 64  # bytes


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Static shapes of a batch; one compiled program serves one bucket."""

    rows: int
    slots: int
    tokens: int
    patches: int
    patch_bytes: int

    def __str__(self) -> str:
        return f"{self.rows}x(tokens {self.tokens}, views {self.slots}x{self.patches})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Arrays of one bucket (NumPy on the host, JAX on device). A row holds whole samples, one after another."""

    tokens: Any  # int32[B, T]: text ids; the placeholder id where visual tokens go
    positions: Any  # int32[B, T]: position inside its sample, from 0
    segments: Any  # int32[B, T]: number of the sample in its row, from 1; 0 is padding
    loss_weights: Any  # float32[B, T]: weight of predicting this token; 0 for prompt, visual tokens, padding
    visual_index: Any  # int32[B, T]: -1 for text, else slot * (P / 4**levels) + token inside the view
    patches: Any  # uint8[B, S, P, patch_bytes]: views in merge order, (y, x, RGB and an unused byte) inside a patch
    patch_grids: Any  # int32[B, S, 2]: patch rows and columns of the view; (0, 0) is an empty slot

    @property
    def bucket(self) -> Bucket:
        """The static shapes of this batch."""
        rows, slots, patches, patch_bytes = self.patches.shape
        return Bucket(rows, slots, self.tokens.shape[1], patches, patch_bytes)


def empty_batch(bucket: Bucket, patches: np.ndarray | None = None) -> Batch:
    """A batch of padding only, as writable NumPy arrays to be filled in. JAX takes `patches` to a CPU uncopied.

    Args:
      bucket: the static shapes.
      patches: taken for the batch's; None: zeros.
    """
    row = (bucket.rows, bucket.tokens)
    return Batch(
        tokens=np.zeros(row, np.int32),
        positions=np.zeros(row, np.int32),
        segments=np.zeros(row, np.int32),
        loss_weights=np.zeros(row, np.float32),
        visual_index=np.full(row, -1, np.int32),
        patches=aligned_zeros(patches_shape(bucket)) if patches is None else patches,
        patch_grids=np.zeros((bucket.rows, bucket.slots, 2), np.int32),
    )


def patches_shape(bucket: Bucket) -> tuple[int, int, int, int]:
    """[B, S, P, patch_bytes] of a bucket."""
    return bucket.rows, bucket.slots, bucket.patches, bucket.patch_bytes


def aligned_zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros, uint8, whose memory starts where JAX's own arrays do."""
    size = math.prod(shape)
    memory = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].reshape(shape)


def abstract_batch(bucket: Bucket) -> Batch:
    """Shapes and dtypes of a batch without data, for tracing and ahead-of-time compiles."""
    rows, tokens = bucket.rows, bucket.tokens
    integers = jax.ShapeDtypeStruct((rows, tokens), np.int32)
    return Batch(
        tokens=integers,
        positions=integers,
        segments=integers,
        loss_weights=jax.ShapeDtypeStruct((rows, tokens), np.float32),
        visual_index=integers,
        patches=jax.ShapeDtypeStruct((rows, bucket.slots, bucket.patches, bucket.patch_bytes), np.uint8),
        patch_grids=jax.ShapeDtypeStruct((rows, bucket.slots, 2), np.int32),
    )
