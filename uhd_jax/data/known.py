"""What is known of samples before they are read: enough to say which share a row, of a source that has an index.

Every host plans the rows of all hosts. From an index it does so without opening an image or a text, and then reads the
samples of its own rows alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from uhd_jax.config import ChatConfig
from uhd_jax.data.chat import ImagePart, Message, encode_chat
from uhd_jax.data.tokenizer import Tokenizer
from uhd_jax.slicing.plan import Plan, ViewPlan
from uhd_jax.slicing.sizes import Grid, Size

_ONE = ViewPlan(Size(1, 1), Grid(1, 1), 1)
REFERENCE = Plan(Size(1, 1), Size(1, 1), 0, Grid(0, 0), _ONE, (), False)  # one view of one visual token

_ANSWERED, _TRAINED, _READ = 1, 2, 4  # bits of a sample; `_READ`: nothing is known, it has to be read
_SMALL = 2**20  # bytes; what is not more is simply copied into other processes


class KnownSample(NamedTuple):
    """What an index says of a sample with which nothing is wrong."""

    sizes: list[Size]  # of its images
    tokens: int  # with `REFERENCE` in place of each image
    trained: bool  # whether any of them is
    answered: bool  # whether every answer says something


class Known:
    """What an index says of N samples. A copy in another process takes no memory where that would be much: it maps a
    file of this process, which is gone when this object is.

    Args:
      starts: int64[N + 1]; images of sample i are sizes[starts[i]:starts[i + 1]].
      sizes: int32[images, 2], (height, width).
      tokens: int32[N], as of `KnownSample`.
      bits: int8[N] of `bits_of`.
    """

    def __init__(self, starts: np.ndarray, sizes: np.ndarray, tokens: np.ndarray, bits: np.ndarray, digest: str = ""):
        self._arrays = starts, sizes, tokens, bits
        self._folder: tempfile.TemporaryDirectory | None = None
        self.digest = digest or _digest(self._arrays)

    @property
    def count(self) -> int:
        """Samples of which something is known."""
        return int(np.count_nonzero(self._arrays[3] != _READ))

    def get(self, sample: int) -> KnownSample | None:
        """What is known of a sample; None of one that has to be read."""
        starts, sizes, tokens, bits = self._arrays
        its = int(bits[sample])
        if its & _READ:
            return None
        found = [Size(*size) for size in sizes[starts[sample] : starts[sample + 1]].tolist()]
        return KnownSample(found, int(tokens[sample]), bool(its & _TRAINED), bool(its & _ANSWERED))

    def __reduce__(self) -> tuple[Any, ...]:
        if self._folder is None and sum(array.nbytes for array in self._arrays) > _SMALL:
            with contextlib.suppress(OSError):  # no room: they are copied
                folder = tempfile.TemporaryDirectory(prefix="uhd_jax-known-", ignore_cleanup_errors=True)
                for number, array in enumerate(self._arrays):
                    np.save(os.path.join(folder.name, f"{number}.npy"), array)
                self._folder = folder
        if self._folder is not None:
            return _mapped, (self._folder.name, self.digest)
        return Known, (*self._arrays, self.digest)


def _mapped(folder: str, digest: str) -> Known:
    """The copy of a `Known` whose arrays lie in a folder."""
    paths = [os.path.join(folder, f"{number}.npy") for number in range(4)]
    return Known(*(np.load(path, mmap_mode="r", allow_pickle=False) for path in paths), digest)


def _digest(arrays: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:16]


def bits_of(answered: np.ndarray, trained: np.ndarray, unknown: Sequence[int]) -> np.ndarray:
    """int8[N] from bool[N] `answered`, int[N] numbers of trained tokens, and the samples that have to be read."""
    bits = (_ANSWERED * answered + _TRAINED * (trained > 0)).astype(np.int8)
    bits[np.asarray(unknown, np.int64)] = _READ
    return bits


class BlockTokens:
    """How many tokens a visual block is longer than that of `REFERENCE`; worked out once per form of block."""

    def __init__(self, tokenizer: Tokenizer, chat: ChatConfig):
        self._tokenizer, self._chat = tokenizer, chat
        self._known: dict[Any, int] = {}

    def of(self, plan: Plan) -> int:
        """For an image that is seen as `plan`, with any number and at any place of the sample."""
        alike = plan.grid, tuple(view.visual_tokens for view in plan.views)
        if alike not in self._known:
            self._known[alike] = self._length(plan) - self._length(REFERENCE)
        return self._known[alike]

    def _length(self, plan: Plan) -> int:
        messages = (Message("user", (ImagePart(0),)), Message("assistant", ("a",)))
        return len(encode_chat(messages, [plan], self._tokenizer, self._chat).tokens)
