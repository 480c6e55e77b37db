"""Memory and speed of an import, measured on a made checkpoint beside the disk's own copying of the same bytes.

  python -m uhd_jax.analysis.measure_import --folder=NEW_FOLDER --gibibytes=13

The checkpoint is LLaVA-UHD v1 with Vicuna-7B in its official layout: bfloat16, random weights, shards of at most 5 GB;
for fewer gibibytes it has fewer decoder layers. It is copied by plain reads and writes, then imported by `uhd-jax
convert import` in a process of its own, whose peak resident memory the kernel tells. The system's file cache is told to
let go of the checkpoint before both, and both are timed until everything is on the disk. The folder is removed at the
end; it needs three times the size of the checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from uhd_jax.config import ChatConfig, CompressorConfig, ConnectorConfig, DecoderConfig, ModelConfig, TowerConfig
from uhd_jax.config.presets import CLIP_L_14_336, VICUNA_7B, VICUNA_CHAT
from uhd_jax.convert.families import family_named
from uhd_jax.convert.source import open_source
from uhd_jax.convert.tables import flatten, match_back
from uhd_jax.convert.tensors import DTYPES
from uhd_jax.convert.transfer import recognise
from uhd_jax.convert.writer import write_safetensors
from uhd_jax.models import uhd

GIB = 2**30
BLOCK = 2**24  # bytes that are copied at a time
# Starts a command, and prints its peak memory and the seconds of processor it used. In between, because the peak of a
# process counts its parent's memory at the moment of its start.
LAUNCHER = (
    "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:], stdout=sys.stderr); "
    "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
    "print(used.ru_maxrss, used.ru_utime + used.ru_stime); sys.exit(code)"
)


def model(layers: int) -> ModelConfig:
    """LLaVA-UHD v1 with the first `layers` of Vicuna-7B."""
    decoder = DecoderConfig(**VICUNA_7B)
    return ModelConfig(
        decoder=dataclasses.replace(decoder, layers=layers),
        tower=TowerConfig(**CLIP_L_14_336),
        compressor=CompressorConfig("none"),
        connector=ConnectorConfig("spatial_resampler", query_side=12),
        chat=ChatConfig(**VICUNA_CHAT, layout="A"),
    )


def abstract_of(config: ModelConfig) -> dict:
    """Our tree of shapes."""
    return jax.eval_shape(lambda: uhd.init_params(config, jax.random.key(0)))


def model_of_size(nbytes: int) -> ModelConfig:
    """The model with the most decoder layers, up to Vicuna-7B's 32, whose bfloat16 checkpoint is at most `nbytes`."""
    one, two = (sum(2 * math.prod(leaf.shape) for leaf in flatten(abstract_of(model(n))).values()) for n in (1, 2))
    return model(int(min(DecoderConfig(**VICUNA_7B).layers, max(1, 1 + (nbytes - one) // (two - one)))))


def write_checkpoint(config: ModelConfig, folder: Path) -> None:
    """A checkpoint of random weights, all finite, with about the entropy of real ones."""
    family, random, dtype = family_named("llava_uhd_v1"), np.random.default_rng(0), DTYPES["BF16"]

    def make(shape: tuple[int, ...]) -> np.ndarray:
        bits = np.frombuffer(random.bytes(2 * math.prod(shape)), np.uint16)
        return ((bits & 0x83FF) | 0x3800).view(dtype).reshape(shape)  # eight exponents, all signs and fractions

    folder.mkdir(parents=True)
    family.write_files(config, None, folder)
    moves = match_back(family.table(config), flatten(abstract_of(config)))
    infos = {move.name: jax.ShapeDtypeStruct(move.shape, dtype) for move in moves}
    write_safetensors(folder, [(name, info, lambda shape=info.shape: make(shape)) for name, info in infos.items()])


def forget(folder: Path) -> None:
    """Puts a folder's files on the disk and out of the system's file cache."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, destination: Path) -> float:
    """Seconds that plain reading and writing of a folder's files takes, until they are on the disk."""
    start = time.monotonic()
    destination.mkdir()
    for file in source.iterdir():
        with file.open("rb") as read, (destination / file.name).open("wb") as write:
            shutil.copyfileobj(read, write, BLOCK)
    os.sync()
    return time.monotonic() - start


def measure(folder: Path, gibibytes: float, dtype: str) -> dict[str, float | int | str]:
    """Makes the checkpoint in `folder`, copies and imports it, and returns the figures."""
    source = folder / "source"
    write_checkpoint(model_of_size(int(gibibytes * GIB)), source)
    with open_source(source) as opened:
        found = recognise(opened, abstract_of)
        moves = found.moves(opened)
        nbytes, largest = sum(i.nbytes for i in opened.tensors.values()), max(moves, key=lambda m: math.prod(m.shape))
        stored = {"as-is": 2, "bfloat16": 2, "float32": 4}[dtype]
    os.sync()
    forget(source)
    copying = copy(source, folder / "copy")
    shutil.rmtree(folder / "copy")
    forget(source)
    start = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "uhd_jax",
        "convert",
        "import",
        str(source),
        str(folder / "made"),
        "--dtype",
        dtype,
    ]
    done = subprocess.run([sys.executable, "-c", LAUNCHER, *command], stdout=subprocess.PIPE, text=True, check=True)
    peak, processor = done.stdout.split()[-2:]
    os.sync()
    importing = time.monotonic() - start
    made = sum(file.stat().st_size for file in (folder / "made").rglob("*") if file.is_file())
    tensor = math.prod(largest.shape) * stored
    return {
        "checkpoint_bytes": nbytes,
        "parameters": found.counts["tower"] + found.counts["connector"] + found.counts["decoder"],
        "dtype": dtype,
        "made_bytes": made,
        "largest_stacked": largest.path,
        "largest_stacked_bytes": tensor,
        "peak_bytes": int(peak) * 1024,
        "allowed_bytes": tensor + GIB,
        "import_seconds": round(importing, 2),
        "import_mb_per_second": round(nbytes / 1e6 / importing, 1),
        "import_processor_seconds": round(float(processor), 2),
        "import_processor_seconds_per_gb": round(float(processor) / nbytes * 1e9, 2),
        "import_to_copy": round(importing / copying, 2),
        "copy_seconds": round(copying, 2),
        "copy_mb_per_second": round(nbytes / 1e6 / copying, 1),
    }


def main() -> None:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="is made, and removed at the end")
    parser.add_argument("--gibibytes", type=float, default=13.0, help="size of the checkpoint at most")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "as-is"), default="float32", help="of the import")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    try:
        print(json.dumps(measure(arguments.folder, arguments.gibibytes, arguments.dtype), indent=2))
    finally:
        shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
