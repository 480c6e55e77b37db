"""Visual tokens of images, each encoded once: the tower in few static shapes, and a cache of what it made."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from uhd_jax.config import ModelConfig
from uhd_jax.generation.decode import within
from uhd_jax.generation.shapes import Shapes, fit
from uhd_jax.models import uhd
from uhd_jax.slicing.pixels import cut_views
from uhd_jax.slicing.plan import Plan

CACHE_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image, or a picture of a video, and how it is cut."""

    pixels: np.ndarray  # uint8[H, W, 3]
    plan: Plan
    mode: str

    def key(self) -> tuple[Any, ...]:
        """Equal for equal pixels that are cut and encoded alike."""
        return hashlib.sha256(np.ascontiguousarray(self.pixels)).digest(), self.plan, self.mode


class VisualCache:
    """Visual tokens by content, the longest unused forgotten first. On the host, so it costs no device memory.

    Args:
      limit: bytes to hold at most; an image whose visual tokens are more by themselves is not kept.
    """

    def __init__(self, limit: int = CACHE_BYTES):
        self.limit, self.bytes, self.hits, self.misses = limit, 0, 0, 0
        self._entries: collections.OrderedDict[tuple[Any, ...], np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: tuple[Any, ...]) -> np.ndarray | None:
        """float[visual tokens, D], or None where it is not known (any more)."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return found

    def put(self, key: tuple[Any, ...], tokens: np.ndarray) -> None:
        """Keeps an image's visual tokens."""
        with self._lock:
            if key in self._entries or tokens.nbytes > self.limit:
                return
            self._entries[key] = tokens
            self.bytes += tokens.nbytes
            while self.bytes > self.limit:
                self.bytes -= self._entries.popitem(last=False)[1].nbytes


class VisualEncoder:
    """The tower and the connector, over a mesh if there is one."""

    def __init__(self, config: ModelConfig, params: Any, cache: VisualCache, mesh: Mesh | None = None):
        self.config, self.params, self.cache, self.mesh = config, params, cache, mesh
        self.views_encoded = 0

    def encode(self, pictures: Sequence[Picture], shapes: Shapes) -> Iterator[list[np.ndarray] | None]:
        """Encodes what is not in the cache. Yields None after every run of the tower, and in the end the visual tokens.

        Returns:
          For each picture float[visual tokens, D], in the order of its views.
        """
        keys = [picture.key() for picture in pictures]
        made: dict[tuple[Any, ...], np.ndarray | None] = {}
        missing: list[tuple[tuple[Any, ...], Picture]] = []
        for key, picture in zip(keys, pictures, strict=True):
            if key not in made:
                made[key] = self.cache.get(key)
                if made[key] is None:
                    missing.append((key, picture))
        for mode in dict.fromkeys(picture.mode for _, picture in missing):
            of_mode = [(key, picture) for key, picture in missing if picture.mode == mode]
            views = self._views([picture for _, picture in of_mode])
            tokens: list[np.ndarray] = []
            for start, count in chunks(len(views), shapes.views):
                tokens += self._run(views[start : start + count], mode, shapes)
                yield None
            place = 0
            for key, picture in of_mode:
                count = len(picture.plan.views)
                made[key] = np.concatenate(tokens[place : place + count])
                self.cache.put(key, made[key])
                place += count
        yield [made[key] for key in keys]

    def warm_up(self, modes: Sequence[str], shapes: Shapes) -> None:
        """Compiles every program of `shapes`."""
        for mode in modes:
            multiple = 4 ** self.config.merge_levels(mode)
            for count in shapes.views:
                for room in shapes.patches:
                    patches = np.zeros(
                        (count, -(-room // multiple) * multiple, self.config.tower.patch_bytes), np.uint8
                    )
                    self._call(patches, np.zeros((count, 2), np.int32), mode)

    def _views(self, pictures: Sequence[Picture]) -> list[tuple[np.ndarray, Any]]:
        side = self.config.tower.patch_size
        return [
            (patches, view)
            for picture in pictures
            for patches, view in zip(cut_views(picture.pixels, picture.plan, side), picture.plan.views, strict=True)
        ]

    def _run(self, views: Sequence[tuple[np.ndarray, Any]], mode: str, shapes: Shapes) -> list[np.ndarray]:
        multiple = 4 ** self.config.merge_levels(mode)
        room = -(-fit(max(len(patches) for patches, _ in views), shapes.patches) // multiple) * multiple
        patches = np.zeros((fit(len(views), shapes.views), room, self.config.tower.patch_bytes), np.uint8)
        grids = np.zeros((len(patches), 2), np.int32)
        for index, (own, view) in enumerate(views):
            patches[index, : len(own)] = own
            grids[index] = view.patch_grid
        self.views_encoded += len(views)
        features = self._call(patches, grids, mode)
        return [of_view[: view.visual_tokens] for of_view, (_, view) in zip(features, views, strict=False)]

    def _call(self, patches: np.ndarray, grids: np.ndarray, mode: str) -> np.ndarray:
        return np.asarray(_encode(self.params, patches, grids, self.config, mode, self.mesh))


@functools.partial(jax.jit, static_argnames=("config", "mode", "mesh"))
def _encode(params, patches, grids, config, mode, mesh):
    with within(mesh):
        return uhd.encode_views(params, patches, grids, config, mode)


def chunks(count: int, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Start and length of parts of `count` things, each of which fits one of the sizes with little room left over."""
    start = 0
    while start < count:
        left = count - start
        whole = [size for size in sizes if size <= left]
        length = min(left, sizes[0] if not whole else whole[-1])
        if len(sizes) > 1 and left < sizes[-1] and 2 * left > sizes[-1]:
            length = left  # rather one run with a little padding than several
        yield start, length
        start += length


def placed(pictures: Sequence[np.ndarray], plans: Sequence[Plan], view: np.ndarray, view_token: np.ndarray) -> Any:
    """The visual tokens in the order of the placeholders: float[N, D].

    Args:
      pictures: float[visual tokens, D] of each image.
      plans: of each image.
      view: int32[N], number of the view over all images.
      view_token: int32[N], token inside that view.
    """
    counts = [of_view.visual_tokens for plan in plans for of_view in plan.views]
    starts = np.cumsum([0, *counts[:-1]])
    return np.concatenate(pictures)[starts[view] + view_token]
