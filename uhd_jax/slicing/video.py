"""Videos as images: which frames are shown, and composites of those in between (spec v4 section 5).

One frame a second is shown, and of a video longer than `max_frames` seconds that many frames, evenly spread. With
`stack_frames` s above 1 each second has s - 1 more frames, which are put side by side on one canvas; frame and canvas
of a second follow each other. All of them are then sliced like images.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import importlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from uhd_jax.config import ImageLimits, VideoConfig
from uhd_jax.slicing.image_io import open_image
from uhd_jax.slicing.plan import ImageRefused, Size, check_size

SEPARATOR = 6  # pixels of black between the frames of a canvas
_ANIMATIONS = ("GIF", "WEBP", "PNG")


@dataclasses.dataclass(frozen=True)
class Video:
    """Frames that are at hand, and when they are shown.

    With neither `fps` nor `timestamps` all frames are taken, and no composites are made.

    Attributes:
      frames: of the same size each; whatever `open_image` takes.
      fps: frames per second.
      timestamps: instead of fps, the seconds at which each frame begins, ascending.
      duration: seconds; None: the frames' number / fps, or the last of `timestamps` and a mean gap more.
    """

    frames: Sequence[Any]
    fps: float | None = None
    timestamps: Sequence[float] = ()
    duration: float | None = None

    def __post_init__(self):
        if not self.frames:
            raise ImageRefused("a video without frames")
        if self.fps is not None and (not self.fps > 0 or self.timestamps):
            raise ImageRefused(f"a video with fps={self.fps}: give a positive fps, or timestamps, not both")
        if self.timestamps and len(self.timestamps) != len(self.frames):
            raise ImageRefused(f"a video of {len(self.frames)} frames with {len(self.timestamps)} timestamps")
        if list(self.timestamps) != sorted(self.timestamps):
            raise ImageRefused("the timestamps of a video must be ascending")


VideoSource = str | os.PathLike | Video | Sequence[Any]


def sample_times(duration: float, video: VideoConfig) -> tuple[list[float], list[float]]:
    """Seconds of the frames that are shown by themselves, and of those that go into composites."""
    seconds = math.ceil(duration)
    shown = [float(second) for second in range(seconds)]
    if duration > video.max_frames:
        shown = _thinned([round(index * 0.1, 1) for index in range(int(duration / 0.1))], video.max_frames)
    parts = video.stack_frames
    between = [second + part / parts for second in range(seconds) for part in range(1, parts)]
    between = [time for time in between if time < duration]
    return shown, _thinned(between, video.max_frames * (parts - 1))


def sample_indices(total: int, fps: float, duration: float, video: VideoConfig) -> list[int]:
    """Indices of the frames of `sample_times` in a video of `total` frames: the shown ones, then those between."""
    return [min(int(time * fps), total - 1) for times in sample_times(duration, video) for time in times]


def composite(frames: Sequence[np.ndarray]) -> np.ndarray:
    """Frames of one second side by side on black, in rows and columns that come nearest to a square.

    Args:
      frames: uint8[H, W, 3] each.

    Returns:
      uint8[rows * H + 6 * (rows - 1), cols * W + 6 * (cols - 1), 3]: 2x2 for four frames, one row for five or more.
    """
    height, width = frames[0].shape[:2]
    rows, cols = _canvas_grid(len(frames), height, width)
    canvas = np.zeros((rows * (height + SEPARATOR) - SEPARATOR, cols * (width + SEPARATOR) - SEPARATOR, 3), np.uint8)
    for index, frame in enumerate(frames):
        top, left = (
            number * (side + SEPARATOR) for number, side in zip(divmod(index, cols), (height, width), strict=True)
        )
        canvas[top : top + height, left : left + width] = frame
    return canvas


def open_video(
    source: VideoSource, video: VideoConfig = VideoConfig(), limits: ImageLimits = ImageLimits()
) -> list[np.ndarray]:
    """The pictures that stand for a video, in order.

    Args:
      source: a `Video`; a list of frames, all of which are taken; or the path of a file: an animated GIF, WebP or PNG,
        or, where PyAV (the package `av`) is installed, any video.
      video: how many frames are shown.
      limits: what a frame may be.

    Returns:
      uint8[H, W, 3] each.

    Raises:
      ImageRefused: unreadable, of a frame size outside the limits, or PyAV would be needed; the message names the file.
    """
    if isinstance(source, list | tuple):
        source = Video(source)
    if not isinstance(source, str | os.PathLike | Video):
        raise TypeError(f"a video is a path, a Video or a list of frames, not {type(source).__name__}")
    name = "<video>" if isinstance(source, Video) else f"{os.fspath(source)!s:.300}"
    try:
        with _clip(source, limits) as clip:
            return _pictures(clip, video, limits)
    except ImageRefused as error:
        raise ImageRefused(f"{name}: {error}") from None
    except FileNotFoundError:
        raise ImageRefused(f"{name}: no such file; check the path") from None
    except Exception as error:  # Pillow's and FFmpeg's decoders raise many kinds
        message = f"{name}: damaged or unsupported ({type(error).__name__}: {error}); save it again or leave it out"
        raise ImageRefused(message) from error


@dataclasses.dataclass(frozen=True)
class _Clip:
    """A video that can be asked for frames."""

    total: int
    fps: float | None
    timestamps: Sequence[float]
    duration: float | None
    read: Callable[[set[int]], Iterator[tuple[int, Any]]]  # (index, frame) of the indices wanted

    @classmethod
    def of(cls, video: Video) -> _Clip:
        count = len(video.frames)
        duration = video.duration
        if duration is None and video.fps:
            duration = count / video.fps
        if duration is None and video.timestamps:
            duration = video.timestamps[-1] * count / (count - 1) if count > 1 else 1.0
        frames = video.frames
        return cls(
            count, video.fps, video.timestamps, duration, lambda wanted: ((i, frames[i]) for i in sorted(wanted))
        )

    def indices(self, times: Sequence[float]) -> list[int]:
        """The frame shown at each of these seconds."""
        if self.timestamps:
            found = [bisect.bisect_right(self.timestamps, time) - 1 for time in times]
        else:
            found = [int(time * self.fps) for time in times]
        return [min(max(index, 0), self.total - 1) for index in found]


def _pictures(clip: _Clip, video: VideoConfig, limits: ImageLimits) -> list[np.ndarray]:
    if clip.fps is None and not clip.timestamps:
        shown, between, seconds = list(range(clip.total)), [], []
    else:
        times, seconds = sample_times(clip.duration, video)
        shown, between = clip.indices(times), clip.indices(seconds)
    frames = {index: open_image(frame, limits) for index, frame in clip.read({*shown, *between})}
    if missing := {*shown, *between} - set(frames):
        raise ImageRefused(f"{len(missing)} of its {clip.total} frames cannot be read, the first is {min(missing)}")
    if len(sizes := {frame.shape[:2] for frame in frames.values()}) > 1:
        raise ImageRefused(f"its frames differ in size: {sorted(sizes)}")
    pictures = []
    for number, index in enumerate(shown):
        pictures.append(frames[index])
        # As in the published processor, the n-th shown frame has the canvas of second n, also where more than a second
        # lies between shown frames.
        own = [i for time, i in zip(seconds, between, strict=True) if number <= time < number + 1]
        if own:
            pictures.append(composite([frames[i] for i in own]))
    return pictures


def _thinned(items: list, count: int) -> list:
    """At most `count` of them, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[index] for index in np.linspace(0, len(items) - 1, count, dtype=int)]


def _canvas_grid(count: int, height: int, width: int) -> tuple[int, int]:
    if count == 4:
        return 2, 2
    if count not in (2, 3):
        return 1, count

    def off_square(grid: tuple[int, int]) -> float:
        rows, cols = grid
        return abs((cols * (width + SEPARATOR) - SEPARATOR) / (rows * (height + SEPARATOR) - SEPARATOR) - 1)

    beside, below = (1, count), (count, 1)
    if off_square(beside) == off_square(below):
        return beside if count == 3 or width >= height else below
    return min(beside, below, key=off_square)


@contextlib.contextmanager
def _clip(source: str | os.PathLike | Video, limits: ImageLimits) -> Iterator[_Clip]:
    if isinstance(source, Video):
        yield _Clip.of(source)
        return
    try:
        picture = Image.open(source, formats=_ANIMATIONS)
    except UnidentifiedImageError:
        pass
    else:
        with picture:
            check_size(Size(picture.height, picture.width), limits)
            yield _animation(picture)
        return
    try:
        av = importlib.import_module("av")
    except ImportError:
        raise ImageRefused(
            f"not an animated {', '.join(_ANIMATIONS)}; to read other videos install PyAV (pip install av), "
            "or give the frames: Video(frames, fps=...)"
        ) from None
    with av.open(os.fspath(source)) as container:
        yield _decoded(container)


def _animation(picture: Image.Image) -> _Clip:
    """An animation that Pillow reads; its frames last as long as each of them says."""
    starts, end = [], 0.0
    total = getattr(picture, "n_frames", 1)
    for index in range(total):
        picture.seek(index)
        picture.load()  # WebP says a frame's time no earlier
        starts.append(end)
        end = round(end + picture.info.get("duration", 100) / 1000, 6)

    def read(wanted: set[int]) -> Iterator[tuple[int, Any]]:
        for index in sorted(wanted):
            picture.seek(index)
            yield index, picture

    return _Clip(total, None, starts, end or 1.0, read)


def _decoded(container: Any) -> _Clip:
    if not container.streams.video:
        raise ImageRefused("has no video stream")
    stream = container.streams.video[0]
    total, fps = stream.frames, float(stream.average_rate or 0)
    if not total:  # some containers do not say
        total = sum(1 for _ in container.decode(stream))
    if not total or not fps:
        raise ImageRefused(f"{total} frames at {fps} frames per second; give the frames: Video(frames, fps=...)")

    def read(wanted: set[int]) -> Iterator[tuple[int, Any]]:
        container.seek(0)
        last = max(wanted)
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                yield index, frame.to_ndarray(format="rgb24")
            if index >= last:
                return

    return _Clip(total, fps, (), total / fps, read)
