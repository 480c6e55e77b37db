"""Memory of batches' patches, used again: a new batch of many megabytes would be zeroed by the system page by page."""

from __future__ import annotations

import collections
import math
from typing import Any

import numpy as np

from uhd_jax.batch import aligned_zeros

_KEPT = 2  # pieces of memory that wait to be used again


class BatchMemory:
    """Gives out arrays, and takes their memory back when nothing refers to them any more.

    JAX refers to an array for as long as it copies from it; on a CPU, where it does not copy, as its own array lives.
    """

    def __init__(self):
        self._free: collections.deque[np.ndarray] = collections.deque(maxlen=_KEPT)

    def take(self, shape: tuple[int, ...]) -> tuple[np.ndarray, bool]:
        """An array uint8[shape], and whether it was used before: then it holds what it held, else zeros."""
        wanted = math.prod(shape)
        for _ in range(len(self._free)):
            try:
                memory = self._free.popleft()
            except IndexError:
                break
            if memory.size == wanted:
                return np.asarray(_Lease(memory, self._free)).reshape(shape), True
            self._free.append(memory)
        return np.asarray(_Lease(aligned_zeros((wanted,)), self._free)).reshape(shape), False


class _Lease:
    """What the arrays made of a piece of memory keep alive; its end is that of the last of them."""

    def __init__(self, memory: np.ndarray, free: collections.deque[np.ndarray]):
        self._memory, self._free = memory, free
        self.__array_interface__: dict[str, Any] = memory.__array_interface__

    def __del__(self):
        self._free.append(self._memory)
