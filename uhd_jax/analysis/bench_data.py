"""How fast files become batches on the device, against what Pillow needs for the same files alone.

    python -m uhd_jax.analysis.bench_data [--json] [--sizes 448x448 720x1280] [--repeats 5] [--draft] [--index]

The *floor* is the time in which Pillow opens and decodes the files and resizes them to the views of the plan, and
nothing else: no header is checked, no patch cut, no text encoded, no batch filled. The pipeline does all of that, from
a LLaVA JSON file and its images to arrays of the device. Both are measured in turns in this process, in processor time
of all its threads, so that work beside it on the machine disturbs little; of the repeats the fastest counts, and of
their ratios, each of times right after one another, the median.

The images are mosaics of the two photographs that scikit-learn ships, in their own resolution, saved as JPEG of quality
90; slicing is v4's in full size.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from PIL import Image
from sklearn.datasets import load_sample_images

from uhd_jax.config import (
    BucketConfig,
    DataConfig,
    DecoderConfig,
    MeshConfig,
    ModelConfig,
    StageConfig,
    TrainConfig,
)
from uhd_jax.data.index import index_path, open_index
from uhd_jax.data.known_from_index import known_samples
from uhd_jax.data.pipeline import BatchIterator, make_iterator
from uhd_jax.data.sources import make_source
from uhd_jax.data.tokenizer import load_tokenizer
from uhd_jax.sharding.mesh import make_mesh
from uhd_jax.sharding.rules import place_batch
from uhd_jax.slicing import image_io
from uhd_jax.slicing.plan import Plan, Size, plan_image

SIZES = (Size(448, 448), Size(720, 1280), Size(1344, 1344), Size(3136, 3136))
QUALITY = 90
_TILE = 320  # pixels per side of a piece of the mosaic
_ROUNDS = 3  # of the files, in a window of samples that are planned together
_PACKED_LENGTH = 4096
_PIXELS = 16_000_000  # of all files of a size together, if these are no more than asked for and no fewer than
_LEAST = 4
# Rows of the file that is timed, about the same images: shuffling a handful takes longer for each than shuffling many.
_SAMPLES = 20_000
_QUESTION = "<image>\nWhat is in the picture, and how is it lit? Answer in one sentence."
_ANSWER = (
    "A temple with a curved roof of tiles stands behind trees, and a red flower is seen from very near in soft light."
)
_TEXT = 256  # tokens of question, answer and marks, which are bytes
MODEL = ModelConfig(  # the decoder is never built: only its number of ids is looked at
    decoder=DecoderConfig(vocab_size=288, width=32, mlp_width=32, layers=1, heads=1, kv_heads=1, head_dim=32)
)


@dataclasses.dataclass(frozen=True)
class Speed:
    """Of images of one size. Milliseconds are processor time per image."""

    height: int
    width: int
    views: int
    bytes_per_pixel: float  # of the files
    decode_ms: float  # Pillow alone
    resize_ms: float  # Pillow alone
    pipeline_ms: float  # from files to the device
    images_per_core_second: float
    floor_share: float  # median of the repeats' (decode + resize) / pipeline


def measure(
    sizes: Sequence[Size] = SIZES, images: int = 28, repeats: int = 3, draft: bool = False, index: bool = False
) -> list[Speed]:
    """Measures images of each size.

    Args:
      sizes: (height, width) in pixels.
      images: different files of each size; less for large ones, so that a size takes a few seconds at most.
      repeats: of each measurement; the fastest counts, of ratios the median.
      draft: with `train.jpeg_draft`; the floor stays the one without.
      index: planned from an index that was made before.
    """
    with tempfile.TemporaryDirectory() as folder:
        return [_measure(size, Path(folder), images, repeats, draft, index) for size in sizes]


def _measure(size: Size, folder: Path, images: int, repeats: int, draft: bool, index: bool) -> Speed:
    images = max(_LEAST, min(images, _PIXELS // (size.height * size.width)))
    path = write_photographs(folder, size, images, _SAMPLES)
    files = sorted(folder.glob(f"{path.stem}-*.jpg"))
    plan = plan_image(size, MODEL)
    decoded = [_decode(file) for file in files]
    pipeline = _Pipeline(path, size, images, draft, index)
    try:
        times = [
            (_timed(lambda: [_decode(file) for file in files]), _timed(lambda: _resize_all(decoded, plan)), pipeline())
            for _ in range(repeats)
        ]
    finally:
        pipeline.close()
    decode, resize, whole = (1000 * min(column) for column in zip(*times, strict=True))
    return Speed(
        *size,
        views=len(plan.views),
        bytes_per_pixel=statistics.mean(file.stat().st_size for file in files) / (size.height * size.width),
        decode_ms=decode / images,
        resize_ms=resize / images,
        pipeline_ms=whole,
        images_per_core_second=1000 / whole,
        floor_share=statistics.median((one[0] + one[1]) / images / one[2] for one in times),
    )


def write_photographs(folder: Path, size: Size, images: int, samples: int = 0) -> Path:
    """LLaVA JSON lines about so many images of a size, no two alike; with more samples than images they come again."""
    names = [f"{size.height}x{size.width}-{number:03d}.jpg" for number in range(images)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(_photo(size, number))
    lines = []
    for number in range(samples or images):
        said = [{"from": "human", "value": _QUESTION}, {"from": "gpt", "value": f"{_ANSWER} ({number})"}]
        lines.append(json.dumps({"image": names[number % images], "conversations": said}))
    path = folder / f"{size.height}x{size.width}.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def open_batches(path: Path, size: Size, index: bool = False, **train: Any) -> BatchIterator:
    """Batches of one row of what `write_photographs` made for a size, planned from an index or not; options as of
    `TrainConfig`."""
    data, plan = DataConfig("json", {"path": str(path)}), plan_image(size, MODEL)
    views = len(plan.views)
    samples = _PACKED_LENGTH // (plan.visual_tokens + 2 * views + _TEXT)
    # Given, because a planner of buckets would read thousands of samples first.
    bucket = BucketConfig(views * samples, _PACKED_LENGTH, max(view.patch_grid.area for view in plan.views))
    stage = StageConfig(
        name="bench",
        data=data,
        steps=1,
        rows=1,
        packed_length=_PACKED_LENGTH,
        learning_rate=0.0,
        learning_rate_min=0.0,
        trainable=("decoder",),
        buckets=(bucket,),
    )
    source, known = make_source(data), None
    if index:
        open_index(data, [MODEL.chat], path=index_path(data))
        known = known_samples(data, source, MODEL.chat, load_tokenizer(MODEL.chat.tokenizer, MODEL.chat))
    return make_iterator(stage, MODEL, TrainConfig(stages=(stage,), **train), source, known=known)


class _Pipeline:
    """The input pipeline of a stage, on the files of one size; called, it gives seconds per image of an epoch."""

    def __init__(self, path: Path, size: Size, images: int, draft: bool, index: bool = False):
        # Nothing is prepared ahead, so that the time of a batch is that of its own images.
        self._batches = open_batches(path, size, index, packing_window=_ROUNDS * images, prefetch=0, jpeg_draft=draft)
        self._mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        self._least = _ROUNDS * images
        self.close = self._batches.close
        self()  # opens, starts threads

    def __call__(self) -> float:
        done, start = 0, time.process_time()
        while done < self._least or self._batches.get_state()["position"]["batch"]:  # whole windows
            batch, info = next(self._batches)
            jax.block_until_ready(place_batch(batch, self._mesh))
            done += info.images
        return (time.process_time() - start) / done


@functools.cache
def _photographs() -> list[Image.Image]:
    return [Image.fromarray(image) for image in load_sample_images().images]


def _photo(size: Size, number: int) -> bytes:
    """A mosaic of pieces of photographs, another for each number, as a JPEG file."""
    picture = Image.new("RGB", (size.width, size.height))
    places = itertools.product(range(0, size.height, _TILE), range(0, size.width, _TILE))
    for place, (top, left) in enumerate(places, 7 * number):
        photograph = _photographs()[place % 2]
        x, y = 37 * place % (photograph.width - _TILE), 23 * place % (photograph.height - _TILE)
        picture.paste(photograph.crop((x, y, x + _TILE, y + _TILE)), (left, top))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _decode(file: Path) -> Image.Image:
    with Image.open(file, formats=image_io.FORMATS) as picture:
        picture.load()
        return picture


def _resize_all(pictures: Sequence[Image.Image], plan: Plan) -> None:
    sizes = [view for view in (plan.thumbnail.size if plan.thumbnail else None, plan.refined) if view]
    for picture in pictures:
        for size in sizes:
            picture.resize((size.width, size.height), Image.Resampling.BICUBIC)


def _timed(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def table(speeds: Sequence[Speed]) -> str:
    """The figures as lines of text."""
    lines = ["image      views  B/px  decode  resize  pipeline  images/s of a core  floor / pipeline"]
    for speed in speeds:
        size = f"{speed.height}x{speed.width}"
        lines.append(
            f"{size:<10} {speed.views:>5}  {speed.bytes_per_pixel:.2f} {speed.decode_ms:>7.2f} {speed.resize_ms:>7.2f} "
            f"{speed.pipeline_ms:>9.2f} {speed.images_per_core_second:>19.1f} {speed.floor_share:>17.1%}"
        )
    return "\n".join([*lines, "Milliseconds of processor time per image."])


def main() -> None:
    """Prints the figures, or a list of objects with --json."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sizes", nargs="+", metavar="HxW", default=[f"{h}x{w}" for h, w in SIZES])
    parser.add_argument("--images", type=int, default=28, help="files of each size")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--draft", action="store_true", help="with train.jpeg_draft, which changes pixels")
    parser.add_argument("--index", action="store_true", help="planned from an index, as of uhd-jax data index")
    arguments = parser.parse_args()
    sizes = [Size(*map(int, size.split("x"))) for size in arguments.sizes]
    speeds = measure(sizes, arguments.images, arguments.repeats, arguments.draft, arguments.index)
    print(json.dumps([dataclasses.asdict(speed) for speed in speeds], indent=2) if arguments.json else table(speeds))


if __name__ == "__main__":
    main()
