"""Several sources mixed into one stream, in shares that hold from the first window to the last.

The stream goes round and round. In a *round* every part has a fixed number of places, and a seeded shuffle deals all
places of the round. What stands at a place follows from seed and place alone, without a table: every host and worker
sees the same order, and none has to remember where it stands.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np
from PIL import Image

from uhd_jax.config.checks import require, require_at_least
from uhd_jax.data.chat import Message
from uhd_jax.data.sources.protocol import Source, pictures_of
from uhd_jax.slicing.plan import Size

_SMALL = 4096  # samples; of fewer a whole epoch is shuffled at once, for which Grain would take milliseconds a place
_LEAST = 100  # places of the smallest part in a round, so that its share is exact to half a percent


@dataclasses.dataclass(frozen=True)
class MixturePart:
    """A named source in a mixture, with either a weight or a number of epochs."""

    name: str
    source: str  # as `DataConfig.source`
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weight: float = 0.0  # share of the stream, relative to the other parts' weights
    epochs: float = 0.0  # how often each of its samples comes in a round
    index: str = ""  # as `DataConfig.index`

    def __post_init__(self):
        require_at_least(self, 0, "weight", "epochs")
        require((self.weight > 0) != (self.epochs > 0), "weight", "give the part either a weight or epochs above 0")


@dataclasses.dataclass(frozen=True)
class MixtureOptions:
    """Options of the source "mixture" (`DataConfig.options`)."""

    parts: tuple[MixturePart, ...]

    def __post_init__(self):
        names = [part.name for part in self.parts]
        require(len(names) > 0, "parts", "is empty")
        require(len(set(names)) == len(names), "parts", f"names repeat: {names}")
        weighted = {part.weight > 0 for part in self.parts}
        require(len(weighted) == 1, "parts", "give all parts a weight, or all of them epochs")


class Stream:
    """The endless stream of a source's sample numbers: shuffled anew in every epoch."""

    def __init__(self, count: int, seed: int):
        self.epoch = count  # places after which it starts again
        self._seed = seed
        self._numbers = grain.MapDataset.range(count).seed(seed).shuffle().repeat()

    def __getitem__(self, place: int) -> int:
        if self.epoch > _SMALL:
            return int(self._numbers[place])
        epoch, number = divmod(place, self.epoch)
        return _permutation(self._seed, epoch, self.epoch)[number]

    def visit(self, place: int) -> tuple[int, int]:
        """The sample at a place, and how often it came before."""
        return self[place], place // self.epoch


class Mixture:
    """The samples of all parts, numbered one part after the other; `stream` mixes them.

    Raises:
      ConfigError: a part has no samples.
    """

    def __init__(self, options: MixtureOptions, sources: Sequence[Source]):
        for part, source in zip(options.parts, sources, strict=True):
            require(len(source) > 0, "parts", f"the part {part.name!r} has no samples")
        self._parts, self.sources = options.parts, tuple(sources)
        self._ends = np.cumsum([len(source) for source in sources])

    def stream(self, seed: int) -> MixedStream:
        """The stream in which the parts have their shares."""
        return MixedStream(self._parts, [len(source) for source in self.sources], seed)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, index: int) -> tuple[int, Source, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return part, self.sources[part], int(index - self._ends[part] + len(self.sources[part]))

    def sizes(self, index: int) -> list[Size]:
        """As the part's source."""
        _, source, number = self._place(index)
        return source.sizes(number)

    def messages(self, index: int) -> Sequence[Message]:
        """As the part's source."""
        _, source, number = self._place(index)
        return source.messages(number)

    def images(self, index: int) -> list[np.ndarray]:
        """As the part's source."""
        _, source, number = self._place(index)
        return source.images(number)

    def pictures(self, index: int, least: Sequence[Size | None] = ()) -> list[Image.Image | np.ndarray]:
        """As the part's source."""
        _, source, number = self._place(index)
        return pictures_of(source, number, least)

    def files(self, index: int) -> list[bytes]:
        """As the part's source."""
        _, source, number = self._place(index)
        return source.files(number)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts."""
        return tuple(part.name for part in self._parts)

    def part(self, index: int) -> str:
        """The name of the part that a sample belongs to."""
        return self._parts[self._place(index)[0]].name

    def where(self, index: int) -> str:
        """The part's name, and the place in its source."""
        part, source, number = self._place(index)
        return f"{self._parts[part].name}: {source.where(number)}"


class MixedStream:
    """The endless stream of a mixture's sample numbers. Every part goes through its own epochs, each shuffled anew.

    With epochs, a round is as long as it takes to see every sample of every part so many times. With weights, it is as
    long as the first part to run out lasts: a round then sees no sample twice, unless a part is so small that its share
    of such a round would be fewer than 100 places.
    """

    def __init__(self, parts: Sequence[MixturePart], counts: Sequence[int], seed: int):
        if any(part.epochs for part in parts):
            places = [part.epochs * count for part, count in zip(parts, counts, strict=True)]
        else:
            shares = [part.weight / sum(part.weight for part in parts) for part in parts]
            lasts = min(count / share for share, count in zip(shares, counts, strict=True))
            places = [share * max(lasts, _LEAST / min(shares)) for share in shares]
        self._places = np.maximum(np.rint(places), 1).astype(np.int64)  # of each part in a round
        self._ends = np.cumsum(self._places)
        self._first = np.cumsum([0, *counts[:-1]])
        self.epoch = int(self._ends[-1])
        self._dealt = Stream(self.epoch, _seed(seed, ""))
        self._streams = [Stream(count, _seed(seed, part.name)) for part, count in zip(parts, counts, strict=True)]

    def __getitem__(self, place: int) -> int:
        return self.visit(place)[0]

    def visit(self, place: int) -> tuple[int, int]:
        """The sample at a place, and how often it came before."""
        dealt = self._dealt[place]
        part = int(np.searchsorted(self._ends, dealt, side="right"))
        before = self._ends[part] - self._places[part]
        number = place // self.epoch * self._places[part] + dealt - before  # in the part's own stream
        sample, epoch = self._streams[part].visit(int(number))
        return int(self._first[part]) + sample, epoch


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, epoch: int, count: int) -> list[int]:
    return np.random.default_rng((seed, epoch)).permutation(count).tolist()


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4])
