"""What is known of samples before they are read: enough to say which share a row, of a source that has an index.

Every host plans the rows of all hosts. From an index it does so without opening an image or a text, and then reads the
samples of its own rows alone.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from uhd_jax.config import ChatConfig
from uhd_jax.data.chat import ImagePart, Message, encode_chat
from uhd_jax.data.sources.stored import cache_folder, store
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
    """What an index says of N samples. Where that is much it is mapped from the user's cache, and copies of it in
    other processes take no memory.

    Args:
      starts: int64[N + 1]; images of sample i are sizes[starts[i]:starts[i + 1]].
      sizes: int32[images, 2], (height, width).
      tokens: int32[N], as of `KnownSample`.
      bits: int8[N] of `bits_of`.
    """

    def __init__(self, starts: np.ndarray, sizes: np.ndarray, tokens: np.ndarray, bits: np.ndarray):
        self._arrays = starts, sizes, tokens, bits
        digest = hashlib.sha256()
        for array in self._arrays:
            digest.update(array.tobytes())
        self.digest = digest.hexdigest()[:16]
        large = sum(array.nbytes for array in self._arrays) > _SMALL
        self._folder = _map(self._arrays, self.digest) if large else None
        if self._folder:
            self._arrays = _mapped(self._folder)

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

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | ({"_arrays": None} if self._folder else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._folder:
            self._arrays = _mapped(self._folder)


def bits_of(answered: np.ndarray, trained: np.ndarray, unknown: Sequence[int]) -> np.ndarray:
    """int8[N] from bool[N] `answered`, int[N] numbers of trained tokens, and the samples that have to be read."""
    bits = (_ANSWERED * answered + _TRAINED * (trained > 0)).astype(np.int8)
    bits[np.asarray(unknown, np.int64)] = _READ
    return bits


def _map(arrays: Sequence[np.ndarray], digest: str) -> Path | None:
    """The folder where the arrays are kept from now on; None where nothing can be written."""
    folder = cache_folder() / "known" / digest
    with contextlib.suppress(OSError):
        for number, array in enumerate(arrays):
            if not (place := folder / f"{number}.npy").is_file():
                store(place, array)
        return folder
    return None


def _mapped(folder: Path) -> tuple[np.ndarray, ...]:
    return tuple(np.load(folder / f"{number}.npy", mmap_mode="r", allow_pickle=False) for number in range(4))


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
